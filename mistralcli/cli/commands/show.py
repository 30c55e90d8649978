"""`mistral show`: a model's shape, its files, and whether it fits here."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistralcli.cli import console
from mistralcli.cli.card_text import card_rows
from mistralcli.cli.options import Chunk, Ctx, Device, DType, NamedModel, Slack
from mistralcli.units import size_text

if TYPE_CHECKING:
    from mistralcli.config import ModelConfig
    from mistralcli.plan import MemoryPlan


def show(
    model: NamedModel,
    ctx: Ctx = None,
    chunk: Chunk = None,
    slack: Slack = None,
    device: Device = None,
    dtype: DType = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List the error of each tensor of a build.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a model's shape, files, size, its cache at a context length, and whether it fits in memory here.

    Of a build it shows the card: where it comes from, what was done to it, and what was lost.
    """
    from mistralcli import store
    from mistralcli.config import read_config

    directory = store.resolve(model)
    config = read_config(directory)
    plan = _plan(directory, config, ctx, chunk, slack, device, dtype)
    facts = _facts(model, directory, config, plan)
    console.write_out(json.dumps(facts) + "\n" if as_json else _as_text(facts, tensors))


def _plan(
    directory: Path,
    config: "ModelConfig",
    ctx: int | None,
    chunk: int | None,
    slack: int | None,
    device: str | None,
    dtype: str | None,
) -> "MemoryPlan":
    from mistralcli.device import choose_device, free_memory_bytes
    from mistralcli.plan import check_ctx, default_ctx, plan_memory
    from mistralcli.run_options import SessionOptions
    from mistralcli.session import demand_under

    options = SessionOptions(ctx, chunk, slack, device, dtype)  # refuses what a run would refuse
    where = choose_device(device)
    free_bytes = free_memory_bytes(where)
    demand = demand_under(options, directory, where, free_bytes)
    length = default_ctx(config) if ctx is None else check_ctx(config, ctx)
    return plan_memory(config, demand, length, free_bytes)


def _facts(model: str, directory: Path, config: "ModelConfig", plan: "MemoryPlan") -> dict[str, Any]:
    from mistralcli.config import read_json

    files = sorted(path for path in directory.iterdir() if path.is_file())
    card = directory / "quantization_card.json"
    return {
        "model": model,
        "path": str(directory),
        "config": {key: value for key, value in vars(config).items() if key != "quantization"},
        "quantization": read_json(card) if card.is_file() else None,
        "files": {path.name: path.stat().st_size for path in files},
        "size_bytes": sum(path.stat().st_size for path in files),
        "memory": {
            "ctx": plan.ctx,
            "weights_bytes": plan.weights_bytes,
            "cache_bytes": plan.cache_bytes,
            "workspace_bytes": plan.workspace_bytes,
            "free_bytes": plan.free_bytes,
            "fits": plan.fits,
        },
    }


def _as_text(facts: dict[str, Any], each_tensor: bool) -> str:
    """The facts as lines of `name  value`; names and values come from files, so they are escaped on a terminal."""
    config, memory = facts["config"], facts["memory"]
    rows = [("model", facts["model"]), ("path", facts["path"]), ("size", size_text(facts["size_bytes"]))]
    rows += [(key, _value(key, value)) for key, value in config.items()]
    if facts["quantization"] is not None:
        card = card_rows(facts["quantization"], each_tensor=each_tensor)
        rows += [("card", ""), *((f"  {name}", value) for name, value in card)]
    rows += [("files", "")] + [(f"  {name}", size_text(size)) for name, size in facts["files"].items()]
    rows += [("memory", f"at a context of {memory['ctx']} tokens")]
    rows += [
        (f"  {part}", size_text(memory[f"{part}_bytes"]))
        for part in ("weights", "cache", "workspace", "free")
    ]
    rows += [("  fits here", "yes" if memory["fits"] else "no")]
    width = max(len(name) for name, _ in rows) + 2
    return "".join(f"{name:<{width}}{value}".rstrip() + "\n" for name, value in rows)


def _value(key: str, value: Any) -> str:
    """Windows of all layers in one word where they are equal."""
    if key == "sliding_windows":
        kinds = list(dict.fromkeys("none" if window is None else str(window) for window in value))
        return kinds[0] if len(kinds) == 1 else ", ".join("none" if w is None else str(w) for w in value)
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
