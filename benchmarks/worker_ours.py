"""Our engine as a worker of `cpu_vs_llamacpp.py` and `gpu_llamacpp.py`: the session of `mistral run`, greedy."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the program sets it, before torch reads it

from pathlib import Path

import torch
from worker_protocol import memory, serve, timed

from mistralcli.doctor.bandwidth import cpu_bandwidth
from mistralcli.run_options import SamplingParams, SessionOptions
from mistralcli.sampling import Sampler
from mistralcli.session import Session, open_session
from quant.huge_pages import Arena

READ_BYTES = 1 << 30
"""More than the last cache of any machine that we know, 480 MB."""


class Ours:
    session: Session

    def load(self, model: str, threads: int, ctx: int, device: str = "cpu") -> float:
        """Seconds that it took."""
        self.session = open_session(Path(model), SessionOptions(ctx=ctx, threads=threads, device=device))
        return self.session.load_s

    def generate(self, ids: list[int], n: int) -> dict[str, list[float]]:
        greedy = Sampler(SamplingParams(temperature=0))
        return timed(self.session.engine.generate(ids, greedy, max_tokens=n))

    def fill(self) -> None:
        """Take the memory of a context that is full."""
        for layer in self.session.engine.cache.layers:
            layer.reserve(layer.ring.capacity)

    def read(self, threads: int) -> float:
        """Bytes a second of a plain read."""
        if not hasattr(self, "data"):
            self.data = Arena().empty(READ_BYTES // 8, dtype=torch.int64).fill_(1)
        return cpu_bandwidth(self.data, threads)


if __name__ == "__main__":
    ours = Ours()
    serve(
        {"load": ours.load, "generate": ours.generate, "fill": ours.fill, "read": ours.read, "memory": memory}
    )
