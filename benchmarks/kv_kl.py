"""What an int8 cache adds: KL of the next token's distribution against that with an unquantized cache, on the CPU.

    python benchmarks/kv_kl.py MODEL TEXT [--tokens 2048]

Each window of the text goes through the model in chunks, in float32, once with a cache as it is computed and once with
int8, so that the chunks' queries read what earlier ones stored. Prints KL(unquantized ‖ int8) in nats a token, its mean
and 99th percentile, how often the likeliest token is the same, and for scale the same of a bfloat16 cache.
"""

import argparse
from pathlib import Path

import torch
from distributions import kl_by_token, log_probs

from mistralcli.tokenizer import load_tokenizer
from mistralcli.weights import load_model

WINDOW, CHUNK = 1024, 128


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
    print(f"{len(ids)} tokens, entropy {entropy:.2f} nats", flush=True)
    for dtype in (torch.bfloat16, torch.int8):
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
