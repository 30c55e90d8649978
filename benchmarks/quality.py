"""What quantization loses: one table for docs/quality.md, on SmolLM2-135M and the demo model.

    python benchmarks/quality.py --smollm2 DIR --text WIKITEXT_DIR --work DIR [--llama PYTHON] [--tokens 16384]

Every scheme and method is built as `mistral quantize` builds it, and compared with the bf16 original in windows of 512
tokens, each from position 0, in float32: the perplexity, KL(original ‖ build) of the next token's distribution, and
how often the likeliest token is the same. SmolLM2 is calibrated on WikiText-2's validation text and scored on its test
text, windows evenly spaced. The demo knows nothing of Wikipedia: it is scored on its own held-out conversations, in
windows of 250 tokens, and calibrated on what it says itself. llama.cpp quantizes the same weights and is given the
same ids.

Where llama.cpp's package ends with a general protection fault (AMX that a hypervisor shows and does not provide),
LD_LIBRARY_PATH names a folder with a `libggml-cpu` built without, as `cpu_llama_build.py` makes one.

Rows are kept in the work folder, and docs/quality.md is written after each: a run that is stopped goes on from there.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from gguf_build import write_gguf
from worker_protocol import Worker

from mistralcli.calibration_text import DEFAULT_TOKENS, SELF
from mistralcli.evaluate import estimate
from mistralcli.layerwise import LayerwiseModel
from mistralcli.quantizing import open_job, recipe_of
from mistralcli.tokenizer import load_tokenizer
from quant.scheme import parse_scheme

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 512
DEMO_WINDOW = 250
"""Within the demo's sliding window of 256, which llama.cpp does not know."""
METHODS = ("rtn", "rtn-w", "hqq", "awq", "gptq", "awq-gptq")
WITHOUT_DATA = ("int4-g128", "int4-g64", "int4-g32")
LLAMA_KINDS = ("Q4_0", "Q4_K_M")

Logits = Callable[[int], torch.Tensor]
"""Of a window by its number: (n_tokens, vocab_size) float32."""


@dataclass(frozen=True)
class Row:
    """bits: of the layers' linears, a weight. size: of all tensors, in bytes. seconds: that the build took.

    gap: perplexity less the original's; its standard error is that of the differences of the two losses.
    """

    model: str
    name: str
    bits: float
    size: int
    perplexity: float
    gap: float
    gap_stderr: float
    kl: float
    kl_stderr: float
    agreement: float
    seconds: float


@dataclass(frozen=True)
class Subject:
    """A model, the windows (n, n_tokens) that it is scored on, what it is calibrated on, and its groups."""

    name: str
    directory: Path
    windows: torch.Tensor
    calib: str
    group_sizes: Sequence[int]


class Original:
    """The model as it is: what builds are compared with. Keeps the last hidden states of all windows."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.logits = logits_of(subject.directory, subject.windows)

    def row(self, name: str, bits: float, size: int, seconds: float, logits: Logits) -> Row:
        """What another model's logits say."""
        found = [self._scores(i, logits(i)) for i in range(len(self.subject.windows))]
        loss, exact, kl, agrees = (torch.cat(parts) for parts in zip(*found, strict=True))
        perplexity, base = float(loss.mean().exp()), float(exact.mean().exp())
        divergence, difference = estimate(kl), estimate(loss - exact)
        return Row(
            self.subject.name,
            name,
            bits,
            size,
            perplexity,
            perplexity - base,
            difference.stderr * perplexity,
            divergence.mean,
            divergence.stderr,
            float(agrees.mean()),
            seconds,
        )

    def _scores(self, i: int, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Losses of the build and the original, KL and agreement of each token of a window that has a next one."""
        ids = self.subject.windows[i, 1:]
        q, p = logits[:-1].log_softmax(-1), self.logits(i)[:-1].log_softmax(-1)
        loss, exact = (F.nll_loss(one, ids, reduction="none") for one in (q, p))
        return loss, exact, (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).float()


@torch.no_grad()
def logits_of(directory: Path, windows: torch.Tensor) -> Logits:
    """Those of a checkpoint, run through its layers once."""
    model = LayerwiseModel(directory)
    hidden = model.embed(windows)
    for index in range(model.config.n_layers):
        layer = model.layer(index)
        for part in hidden.split(4):
            part.copy_(model.run_layer(layer, part))
    return lambda i: model.logits(hidden[i])


def ours(original: Original, work: Path, scheme: Any, method: str) -> Row:
    """A build of ours, made, measured and removed."""
    subject = original.subject
    recipe = recipe_of(scheme, method, [], None)
    calib = subject.calib if recipe.method.needs_data else None
    job = open_job(subject.name, subject.directory, recipe, calib)
    destination = work / "build"
    shutil.rmtree(destination, ignore_errors=True)
    report = job.build(
        destination, 1.0, check=False, replace=False, resume=False, on_progress=lambda done, total: None
    )
    logits = logits_of(destination, subject.windows)
    name, bits = name_of(scheme, method), report.bits_per_weight
    return original.row(name, bits, report.size_after_bytes, report.seconds, logits)


def llamas(original: Original, work: Path, python: str, kind: str) -> Row:
    """What llama.cpp makes of the same weights."""
    subject = original.subject
    source, target, exchanged = (work / name for name in ("dense.gguf", "llama.gguf", "logits.npy"))
    write_gguf(subject.directory, source)
    vocab_size = LayerwiseModel(subject.directory).config.vocab_size
    script = Path(__file__).with_name("quality_worker_llama.py")
    with Worker([python, str(script)]) as worker:
        worker.ask("quantize", source=str(source), target=str(target), kind=kind)
        worker.ask("load", model=str(target), window=subject.windows.shape[1])

        def logits(i: int) -> torch.Tensor:
            ids = subject.windows[i].tolist()
            worker.ask("logits", ids=ids, vocab_size=vocab_size, path=str(exchanged))
            return torch.from_numpy(np.load(exchanged))

        bits, size = gguf_bits(target)
        return original.row(f"llama.cpp {kind}", bits, size, float("nan"), logits)


def gguf_bits(path: Path) -> tuple[float, int]:
    """Bits a weight of the layers' linears in a GGUF file, and the bytes of all its tensors."""
    tensors = gguf.GGUFReader(path).tensors
    linears = [one for one in tensors if one.name.startswith("blk.") and len(one.shape) == 2]
    weights = sum(int(one.n_elements) for one in linears)
    return 8 * sum(int(one.n_bytes) for one in linears) / weights, sum(int(one.n_bytes) for one in tensors)


def wanted(group_sizes: Sequence[int]) -> Iterator[tuple[Any, str]]:
    """Schemes and methods."""
    yield parse_scheme(scheme="int8"), "rtn"
    yield parse_scheme(scheme="nf4"), "rtn"
    for group_size in group_sizes:
        for symmetric in (True, False):
            for method in METHODS:
                yield parse_scheme(4, group_size=group_size, symmetric=symmetric), method


def name_of(scheme: Any, method: str) -> str:
    """Of a row; int8 and nf4 have one method each."""
    return f"{method} {scheme.name}" if scheme.name.startswith("int4") else str(scheme.name)


def smollm2(directory: Path, text: Path, n_tokens: int) -> Subject:
    ids = load_tokenizer(directory).encode((text / "test.txt").read_text(encoding="utf-8"))
    n = n_tokens // WINDOW
    windows = torch.tensor([ids[i * (len(ids) // n) :][:WINDOW] for i in range(n)])
    return Subject("SmolLM2-135M", directory, windows, str(text / "valid.txt"), (64, 32))


def demo(n_tokens: int) -> Subject:
    from training.losses import passages, texts_by_kind

    directory = ROOT / "training" / "original"
    texts = texts_by_kind(directory / "tokenizer.model")
    windows = torch.tensor(passages(texts, n_tokens // DEMO_WINDOW))[:, :DEMO_WINDOW]
    return Subject("demo", directory, windows, SELF, (128, 64, 32))


def measure(
    subject: Subject, work: Path, llama: str | None, rows: list[Row], keep: Callable[[], None]
) -> None:
    """Add the rows of a model that are not there, the methods that take the most time last."""
    original = Original(subject)
    done = {row.name for row in rows if row.model == subject.name}
    n_bytes = sum(file.stat().st_size for file in subject.directory.glob("model*.safetensors"))
    if "bf16" not in done:
        rows.append(original.row("bf16", 16.0, n_bytes, 0.0, original.logits))
    for kind in LLAMA_KINDS if llama else ():
        if f"llama.cpp {kind}" not in done:
            rows.append(llamas(original, work, str(llama), kind))
            keep()
    for scheme, method in sorted(wanted(subject.group_sizes), key=lambda pair: METHODS.index(pair[1])):
        if name_of(scheme, method) not in done:
            rows.append(ours(original, work, scheme, method))
            keep()
            print(rows[-1], flush=True)


def table(rows: Sequence[Row], subjects: Sequence[Subject]) -> str:
    """docs/quality.md."""
    lines = [
        "# What quantization loses",
        "",
        "Written by `benchmarks/quality.py`, which says how; do not edit. Gap in perplexity and KL (nats a token)",
        "are those to the bf16 original, with standard errors. Bits are those of the layers' linears, scales and all;",
        "seconds those of one build on the machine that measured, calibrated with",
        f"{DEFAULT_TOKENS} tokens where the method takes data.",
    ]
    for subject in subjects:
        n_tokens = subject.windows.numel()
        lines += [
            "",
            f"## {subject.name}",
            "",
            f"{n_tokens} tokens; calibrated on {Path(subject.calib).name}.",
            "",
        ]
        lines += ["| | bits | MB | perplexity | gap | KL | same top token | s |", "|---|" + "---:|" * 7]
        order = ["bf16", *(f"llama.cpp {kind}" for kind in LLAMA_KINDS)]
        order += [name_of(*pair) for pair in wanted(subject.group_sizes)]
        mine = [row for row in rows if row.model == subject.name]
        for row in sorted(mine, key=lambda row: order.index(row.name)):
            seconds = "" if row.seconds != row.seconds else f"{row.seconds:.0f}"
            lines.append(
                f"| {row.name} | {row.bits:.2f} | {row.size / 1e6:.1f} | {row.perplexity:.3f} "
                f"| {row.gap:+.3f} ± {row.gap_stderr:.3f} | {row.kl:.4f} ± {row.kl_stderr:.4f} "
                f"| {row.agreement:.2%} | {seconds} |"
            )
        lines += ["", *bars({row.name: row for row in mine}, subject)]
    return "\n".join(lines) + "\n"


def bars(rows: Mapping[str, Row], subject: Subject) -> Iterator[str]:
    """What was asked for, as far as the rows tell."""
    group_size = subject.group_sizes[0]
    for suffix in ("", "-asym"):
        scheme = f"int4-g{group_size}{suffix}"
        for method in ("gptq", "awq", "awq-gptq"):
            if {f"rtn {scheme}", f"{method} {scheme}"} <= rows.keys():
                closed = 1 - rows[f"{method} {scheme}"].gap / rows[f"rtn {scheme}"].gap
                yield f"- {method} closes {closed:.0%} of rtn's gap at {scheme} (asked for: a third)."
    if "nf4" not in rows:
        return
    nf4 = rows["nf4"]
    for name in (f"{method} {scheme}" for scheme in WITHOUT_DATA for method in ("rtn", "rtn-w", "hqq")):
        if name in rows:
            part, bits = rows[name].gap / nf4.gap, rows[name].bits
            yield f"- {name} ({bits:.2f} bits): {part:.0%} of nf4's gap at {nf4.bits:.2f} (asked for: at most all)."
    # As shown: the 16 bytes that say a weight's shape are 0.0003 of a bit.
    small = [row for row in rows.values() if row.name.split()[0] in METHODS and round(row.bits, 2) <= 4.5]
    best = min(small, key=lambda row: row.kl, default=None)
    if best is not None:
        yield f"- Best at most 4.5 bits: {best.name}, {best.gap / nf4.gap:.0%} of nf4's gap (asked for: half)."
        for kind in LLAMA_KINDS:
            if f"llama.cpp {kind}" in rows:
                other = rows[f"llama.cpp {kind}"]
                yield f"- Its KL is {best.kl:.4f}, llama.cpp's {kind} has {other.kl:.4f} at {other.bits:.2f} bits."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's test.txt and valid.txt")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama", help="a Python that has llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=16384)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / f"rows-{options.tokens}.json"
    rows = [Row(**row) for row in json.loads(kept.read_text())] if kept.exists() else []
    subjects = [smollm2(options.smollm2, options.text, options.tokens), demo(options.tokens)]

    def keep() -> None:
        kept.write_text(json.dumps([asdict(row) for row in rows]))
        (ROOT / "docs" / "quality.md").write_text(table(rows, subjects), encoding="utf-8")

    for subject in subjects:
        measure(subject, options.work, options.llama, rows, keep)


if __name__ == "__main__":
    main()
