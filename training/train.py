"""Train the demo model.

    python -m training.train DATA STATE --seconds 540 --total-steps 6200

Trains for at most `--seconds`, then saves everything to STATE/state.pt; the same command goes on from there until
`--total-steps`. Every run ends with STATE/export, the model as a checkpoint (training/export.py), and training.json in
it, which says how it was made. On an H100 it takes about 1.8 million tokens a second; a step is 128 rows of 1,024.

AdamW, cosine schedule, bf16 autocast, torch.compile. Each row begins with a conversation, as the model will be
used. In the last fifth of the steps the linears compute with the weights that `mistral quantize` will store, and
the gradients go to the weights themselves: that is meant to keep the loss of the int4 build near.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from quant.methods.rtn import round_to_nearest
from training.encoding import BOS, CORPUS_FILE, TOKENIZER_FILE
from training.export import export, write_json
from training.model import Demo, DemoConfig

ROW_TOKENS = 1024
BATCH_ROWS = 128
MICRO_ROWS = 64
PEAK_LR = 3e-3
WARMUP_STEPS = 100
QUANTIZED_SHARE = 0.2
GROUP_SIZE = 128
LOG_STEPS = 100
LOG_FILE = "training.json"


@dataclass(frozen=True)
class Schedule:
    """How far and how fast: `seconds` bounds this run, `total_steps` the training."""

    total_steps: int
    seconds: float
    batch_rows: int = BATCH_ROWS
    row_tokens: int = ROW_TOKENS
    quantized_share: float = QUANTIZED_SHARE

    @property
    def step_tokens(self) -> int:
        return self.batch_rows * self.row_tokens

    def is_quantized(self, step: int) -> bool:
        return step >= self.total_steps * (1 - self.quantized_share)


@dataclass
class Trainer:
    """The model, its optimizer, and how far it has come: `log` is what training.json will say."""

    model: Demo
    optimizer: torch.optim.Optimizer
    step: int = 0
    log: dict[str, Any] = field(default_factory=lambda: {"tokens": 0, "seconds": 0.0, "losses": []})


def start(config: DemoConfig, device: str) -> Trainer:
    torch.manual_seed(0)
    model = Demo(config).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return Trainer(model, torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=device == "cuda"))


def save(trainer: Trainer, path: Path) -> None:
    """Write the state; a run that is stopped in the midst of it leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "step": trainer.step,
        "log": trainer.log,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(path)


def resume(trainer: Trainer, path: Path) -> None:
    """Go on from a saved state, if there is one."""
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step, trainer.log = state["step"], state["log"]


def learning_rate(step: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LR * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total_steps)))


def conversation_starts(ids: torch.Tensor, row_tokens: int) -> torch.Tensor:
    """Where conversations begin that a whole row of ids follows."""
    return (ids[: len(ids) - row_tokens] == BOS).nonzero()[:, 0]


def rows(ids: torch.Tensor, starts: torch.Tensor, row_tokens: int) -> torch.Tensor:
    """Rows of row_tokens + 1 ids: (n_rows, row_tokens + 1)."""
    return ids[starts[:, None] + torch.arange(row_tokens + 1, device=ids.device)].long()


def batch_of(ids: torch.Tensor, starts: torch.Tensor, step: int, schedule: Schedule) -> torch.Tensor:
    """The rows of a step, which depend on its number alone: (batch_rows, row_tokens + 1)."""
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randint(0, len(starts), (schedule.batch_rows,), generator=generator)
    return rows(ids, starts[chosen.to(ids.device)], schedule.row_tokens)


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16, enabled=batch.is_cuda):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def stored(groups: torch.Tensor) -> torch.Tensor:
    """What an int4 build makes of groups of weights, each with a scale: (n_groups, GROUP_SIZE), and so back."""
    exported = groups.to(torch.bfloat16).float()
    found = round_to_nearest(
        exported, bits=4, group_size=GROUP_SIZE, symmetric=True, scale_dtype=torch.bfloat16
    )
    return found.codes * found.scales.float()


@contextmanager
def as_quantized(model: Demo) -> Iterator[None]:
    """Put what int4 keeps of them in the place of the linears' weights, and the weights back at the end.

    All groups at once: on a GPU, a matrix at a time would take longer to launch than to compute.
    """
    weights = [module.weight.data for module in model.modules() if isinstance(module, nn.Linear)]
    groups = torch.cat([weight.view(-1, GROUP_SIZE) for weight in weights])
    _fill(weights, stored(groups))
    try:
        yield
    finally:
        _fill(weights, groups)


def _fill(weights: list[torch.Tensor], groups: torch.Tensor) -> None:
    """Copy groups, one weight's after the other's, into the weights."""
    parts = groups.split([weight.numel() // GROUP_SIZE for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.copy_(part.view_as(weight))


def accumulate(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Add the gradients of a batch, in parts that fit; returns its mean loss."""
    total = torch.zeros((), device=batch.device)
    for part in batch.split(MICRO_ROWS):
        loss = loss_of(model, part) * (len(part) / len(batch))
        loss.backward()
        total += loss.detach()
    return total


def train_step(
    trainer: Trainer, compiled: nn.Module, batch: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """One step of the optimizer; returns the batch's loss."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate(trainer.step, schedule.total_steps)
    if schedule.is_quantized(trainer.step):
        with as_quantized(trainer.model):
            loss = accumulate(compiled, batch)
    else:
        loss = accumulate(compiled, batch)
    nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.step += 1
    return loss


def train(trainer: Trainer, ids: torch.Tensor, schedule: Schedule) -> None:
    """Step until the time or the steps are used up, and log it."""
    compiled: Any = torch.compile(trainer.model) if ids.is_cuda else trainer.model
    starts = conversation_starts(ids, schedule.row_tokens)
    started, seconds_before = time.time(), trainer.log["seconds"]
    while trainer.step < schedule.total_steps and time.time() - started < schedule.seconds:
        loss = train_step(trainer, compiled, batch_of(ids, starts, trainer.step, schedule), schedule)
        trainer.log["tokens"] += schedule.step_tokens
        if trainer.step % LOG_STEPS == 0 or trainer.step in (1, schedule.total_steps):
            trainer.log["losses"].append([trainer.step, round(float(loss), 4)])
            print(f"step {trainer.step} loss {loss:.4f} after {time.time() - started:.0f} s", flush=True)
    trainer.log["seconds"] = round(seconds_before + time.time() - started, 1)


@torch.no_grad()
def heldout_loss(model: Demo, ids: torch.Tensor, row_tokens: int) -> float:
    """The mean loss over whole rows of the held-out ids; on a CPU, where this is only tried out, over four."""
    n_rows = min(256 if ids.is_cuda else 4, (len(ids) - 1) // row_tokens)
    firsts = torch.arange(n_rows, device=ids.device) * row_tokens
    parts = rows(ids, firsts, row_tokens).split(16)
    losses = torch.stack([loss_of(model, part) for part in parts])
    return float((losses * torch.tensor([len(part) for part in parts], device=ids.device)).sum() / n_rows)


def finish_log(trainer: Trainer, schedule: Schedule, heldout: torch.Tensor, data: Path) -> None:
    """Add to the log what was trained, on what, and the held-out losses."""
    device = torch.cuda.get_device_name() if heldout.is_cuda else "CPU"
    plain = heldout_loss(trainer.model, heldout, schedule.row_tokens)
    with as_quantized(trainer.model):
        quantized = heldout_loss(trainer.model, heldout, schedule.row_tokens)
    trainer.log |= {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "device": device,
        "torch": str(torch.__version__),
        "steps": trainer.step,
        "total_steps": schedule.total_steps,
        "step_tokens": schedule.step_tokens,
        "quantized_share": schedule.quantized_share,
        "heldout_loss": round(plain, 4),
        "heldout_loss_quantized": round(quantized, 4),
        "corpus": json.loads((data / CORPUS_FILE).read_text()),
    }


def token_tensor(path: Path, device: str) -> torch.Tensor:
    """Ids below 32,768 as int16, to be small on the device."""
    return torch.from_numpy(np.load(path).astype(np.int16)).to(device)


def run(data: Path, state: Path, schedule: Schedule, config: DemoConfig) -> dict[str, Any]:
    """Train from where the last run stopped, save, and export; returns the log."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = start(config, device)
    resume(trainer, state / "state.pt")
    train(trainer, token_tensor(data / "train.npy", device), schedule)
    save(trainer, state / "state.pt")
    finish_log(trainer, schedule, token_tensor(data / "heldout.npy", device), data)
    export(trainer.model, data / TOKENIZER_FILE, state / "export")
    write_json(state / "export" / LOG_FILE, trainer.log)
    return trainer.log


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="what training.prepare wrote")
    parser.add_argument("state", type=Path)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--total-steps", type=int, default=5200)
    parser.add_argument("--batch-rows", type=int, default=BATCH_ROWS)
    parser.add_argument("--quantized-share", type=float, default=QUANTIZED_SHARE)
    options = parser.parse_args()
    schedule = Schedule(
        options.total_steps,
        options.seconds,
        batch_rows=options.batch_rows,
        quantized_share=options.quantized_share,
    )
    log = run(options.data, options.state, schedule, DemoConfig())
    print(
        f"step {log['steps']} of {log['total_steps']}, {log['tokens'] / 1e6:.0f} million tokens, held-out loss "
        f"{log['heldout_loss']:.4f}, in int4 {log['heldout_loss_quantized']:.4f}"
    )


if __name__ == "__main__":
    main()
