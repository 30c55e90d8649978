"""llama.cpp as a worker of `quality.py`: it quantizes a GGUF file, and says the logits of every token of a window.

By the C functions that its Python package binds, on the CPU, without flash attention and with a float32 cache, so that
what differs from the original is the weights and what its matmuls round activations to.
"""

import os
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np
from worker_protocol import serve


class Llama:
    def quantize(self, source: str, target: str, kind: str) -> int:
        """Write `source` as `target` in "Q4_0" or "Q4_K_M", as its own tool would; returns the file's bytes."""
        params = c.llama_model_quantize_default_params()
        params.ftype = {"Q4_0": c.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K_M": c.LLAMA_FTYPE_MOSTLY_Q4_K_M}[kind]
        code = c.llama_model_quantize(source.encode(), target.encode(), params)
        assert code == 0, f"llama_model_quantize returns {code}"
        return Path(target).stat().st_size

    def load(self, model: str, window: int) -> None:
        self.model = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
        assert self.model, f"llama.cpp cannot load {model}"
        params = c.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = window
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.type_k = params.type_v = c.GGML_TYPE_F32
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = c.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp has no context of {window} positions"

    def logits(self, ids: list[int], vocab_size: int, path: str) -> None:
        """Write the logits behind each id of a window (n_tokens, vocab_size) float32 to `path`."""
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        batch = c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token_id in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token_id, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        code = c.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode returns {code}"
        found = np.ctypeslib.as_array(c.llama_get_logits(self.context), shape=(len(ids), vocab_size))
        np.save(path, found)
        c.llama_batch_free(batch)


def main() -> None:
    c.llama_backend_init()
    llama = Llama()
    handlers: dict[str, Any] = {"quantize": llama.quantize, "load": llama.load, "logits": llama.logits}
    serve(handlers)


if __name__ == "__main__":
    main()
