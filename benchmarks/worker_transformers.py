"""transformers in bfloat16 as a worker of `cpu_vs_llamacpp.py`: random weights in the shape of a build, greedy."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM
from worker_protocol import memory, serve, timed


class Transformers:
    def load(self, model: str, threads: int, ctx: int) -> float:
        """Seconds that it took."""
        started = time.perf_counter()
        torch.set_num_threads(threads)
        stated = json.loads((Path(model) / "config.json").read_text())
        stated.pop("quantization_config")
        torch.set_default_dtype(torch.bfloat16)
        self.model = MistralForCausalLM(MistralConfig(**stated)).eval()
        torch.set_default_dtype(torch.float32)
        return time.perf_counter() - started

    def generate(self, ids: list[int], n: int) -> dict[str, list[float]]:
        with torch.inference_mode():
            return timed(self._generate(ids, n))

    def _generate(self, ids: list[int], n: int) -> Iterator[int]:
        tokens, cache = torch.tensor([ids]), None
        for _ in range(n):
            out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield int(tokens)


if __name__ == "__main__":
    peer = Transformers()
    serve({"load": peer.load, "generate": peer.generate, "memory": memory})
