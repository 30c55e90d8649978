"""What a cache of fewer bits adds: KL of the next token's distribution against that with a float32 cache, on the CPU.

    python benchmarks/kv_kl.py MODEL TEXT [--tokens 2048]

Each window of the text goes through the model in chunks, in float32, once with a float32 cache and once with each other
type, so that the chunks' queries read what earlier ones stored. Prints KL(float32 ‖ other) in nats a token, its mean
and 99th percentile, how often the likeliest token is the same, and the largest number that was in a float32 cache.
"""

import argparse
from pathlib import Path

import torch
from distributions import kl_by_token, log_probs

from mistralcli.cache import KVCache
from mistralcli.model import Transformer
from mistralcli.tokenizer import load_tokenizer
from mistralcli.weights import load_model

WINDOW, CHUNK = 1024, 128


@torch.no_grad()
def largest_number(model: Transformer, ids: list[int]) -> float:
    """In the keys and values of the first window: float16 ends at 65,504."""
    part = torch.tensor(ids[:WINDOW])[None]
    cache = KVCache(model.config, max_seq_len=WINDOW)
    model(part, torch.arange(part.shape[1])[None], cache)
    return max(float(one.abs().max()) for layer in cache.layers for one in (layer.keys, layer.values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    ids = load_tokenizer(options.model).encode(text[: 8 * options.tokens])[: options.tokens]
    model = load_model(options.model, device=torch.device("cpu"), dtype=torch.float32)
    exact = log_probs(model, ids, WINDOW, CHUNK)
    entropy = float(-(exact.exp() * exact).sum(-1).mean())
    largest = largest_number(model, ids)
    print(f"{len(ids)} tokens, entropy {entropy:.2f} nats, largest key or value {largest:.1f}", flush=True)
    for dtype in (torch.float16, torch.bfloat16, torch.int8):
        rounded = log_probs(model, ids, WINDOW, CHUNK, dtype)
        kl = kl_by_token(exact, rounded)
        same = (exact.argmax(-1) == rounded.argmax(-1)).float().mean()
        print(
            f"{str(dtype).removeprefix('torch.')} cache: KL mean {float(kl.mean()):.2e}, 99th percentile "
            f"{float(kl.quantile(0.99)):.2e} nats a token; the likeliest token is the same for {float(same):.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
