"""llama.cpp as a worker of `cpu_vs_llamacpp.py` and `gpu_llamacpp.py`, by the C functions of its package, greedy.

Its own defaults hold but for the number of threads and the context: weights repacked, a float16 cache, batches of 2,048
tokens in pieces of 512, flash attention where it chooses that.
"""

import time
from collections.abc import Iterator

import llama_cpp as c
from worker_protocol import memory, serve, timed


class Llama:
    def load(self, model: str, threads: int, ctx: int) -> float:
        """Seconds that it took."""
        started = time.perf_counter()
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
        assert self.model, f"llama.cpp cannot load {model}"
        params = c.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = ctx, threads, threads
        self.context = c.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp has no context of {ctx} positions"
        self.n_batch = c.llama_n_batch(self.context)
        self.sampler = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        c.llama_sampler_chain_add(self.sampler, c.llama_sampler_init_greedy())
        return time.perf_counter() - started

    def generate(self, ids: list[int], n: int) -> dict[str, list[float]]:
        return timed(self._generate(ids, n))

    def _generate(self, ids: list[int], n: int) -> Iterator[int]:
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        for _ in range(n):
            for start in range(0, len(ids), self.n_batch):
                piece = ids[start : start + self.n_batch]
                tokens = (c.llama_token * len(piece))(*piece)
                code = c.llama_decode(self.context, c.llama_batch_get_one(tokens, len(piece)))
                assert code == 0, f"llama_decode returns {code}"
            ids = [c.llama_sampler_sample(self.sampler, self.context, -1)]
            yield ids[0]

    def fill(self) -> None:
        """Nothing: a context has its memory from the start."""


if __name__ == "__main__":
    llama = Llama()
    handlers = {"load": llama.load, "generate": llama.generate, "fill": llama.fill, "memory": memory}
    serve(handlers)
