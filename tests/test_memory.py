"""Memory in processes of their own: what loading takes at its peak, and a 7B model in less than 6 GB."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from big_model import MISTRAL_7B, write_checkpoint
from program import RESIDENT, environment

pytestmark = pytest.mark.slow

MEASURE = f"""{RESIDENT}
import json, sys, torch
from pathlib import Path
from mistralcli.engine import Engine
from mistralcli.weights import load_model

directory, n_tokens, max_seq_len = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
before = resident_bytes()
model = load_model(directory, device=torch.device("cpu"), dtype=torch.float32)
engine = Engine(model, max_seq_len=max_seq_len, chunk=512)
if n_tokens:
    for layer in engine.cache.layers:
        layer.reserve(layer.ring.capacity)
    logits = engine.prefill([list(range(3, 3 + n_tokens))])
    assert logits.isfinite().all() and logits.std() > 0
peak = resident_bytes("VmHWM")
print(json.dumps(dict(before=before, peak=peak, cache=engine.cache.size_bytes)))
"""


def measure(directory: Path, home: Path, n_tokens: int, max_seq_len: int) -> dict[str, int]:
    """Resident bytes before loading and at the peak, and of the cache, for one chunk of `n_tokens` tokens."""
    command = [sys.executable, "-c", MEASURE, str(directory), str(n_tokens), str(max_seq_len)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(home), timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_loading_takes_the_loaded_model_and_one_tensor(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
    }
    write_checkpoint(tmp_path / "model", MISTRAL_7B | shape)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    embedding, largest = 32768 * 2048 * 2, 32768 * 2048 * 2
    found = measure(tmp_path / "model", tmp_path, 0, 16)
    loaded = 2 * (size - embedding) + embedding  # bfloat16 widened to float32, the embedding as it is
    assert loaded > 1.0e9
    assert found["peak"] - found["before"] < loaded + largest + 100e6


def test_a_7b_int4_build_runs_a_chunk_in_less_than_6_gb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("less than 8 GB free for a 4 GB build")
    directory = tmp_path / "7b"
    try:
        write_checkpoint(directory, MISTRAL_7B, int4=True)
        found = measure(directory, tmp_path, 512, 32768)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    assert found["cache"] == 2 * 32 * 8 * 128 * 4 * (4096 + 512 - 1)
    assert found["peak"] < 6e9
    with capsys.disabled():
        print(f"\n7B int4, window 4096, 32k context: {found['peak'] / 1e9:.2f} GB resident at the peak")
