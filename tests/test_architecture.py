"""The imports point one way, the program starts fast, and versions agree."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY

from mistralcli import __version__

LAYERS = [
    ["mistralcli.__main__", "mistralcli.cli"],
    [
        "mistralcli.pull_plan",
        "mistralcli.remote_tensors",
        "mistralcli.doctor",
        "mistralcli.bench",
        "mistralcli.quantizing",
        "mistralcli.pull_quantized",
        "mistralcli.remote_source",
    ],
    [
        "mistralcli.session",
        "mistralcli.grammar",
        "mistralcli.logprobs",
        "mistralcli.tools",
        "mistralcli.batch",
        "mistralcli.saved_cache",
    ],
    [
        "mistralcli.plan",
        "mistralcli.evaluate",
        "mistralcli.scoring",
        "mistralcli.check",
        "mistralcli.verify",
        "mistralcli.calibration",
        "mistralcli.calibration_text",
    ],
    ["mistralcli.engine", "mistralcli.weights", "mistralcli.layerwise", "mistralcli.prompt_parts"],
    ["mistralcli.decoder", "mistralcli.cpu_decoder", "mistralcli.prefill"],
    ["mistralcli.model", "mistralcli.sampling"],
    [
        "mistralcli.cache",
        "mistralcli.ops",
        "mistralcli.kernels",
        "mistralcli.device",
        "mistralcli.threads",
        "mistralcli.staged_reading",
        "mistralcli.checkpoint_files",
        "mistralcli.dense_weights",
        "mistralcli.nvml",
    ],
    [
        "mistralcli.tokenizer",
        "mistralcli.mistral_tokenizer",
        "mistralcli.hf_tokenizer",
        "mistralcli.chat_template",
    ],
    ["mistralcli.template_sandbox", "mistralcli.detokenizer", "mistralcli.conversation"],
    ["mistralcli.disk_usage"],
    ["mistralcli.inventory"],
    ["mistralcli.hub", "mistralcli.store"],
    ["mistralcli.settings", "mistralcli.stamps"],
    ["mistralcli.transfer"],
    ["mistralcli.hub_http", "mistralcli.part_file", "mistralcli.fresh_blocks"],
    ["mistralcli.hub_body", "mistralcli.hub_cache", "mistralcli.hub_errors", "mistralcli.hub_files"],
    [
        "mistralcli.config",
        "mistralcli.quantization_config",
        "mistralcli.units",
        "mistralcli.demo",
        "mistralcli.run_options",
        "mistralcli.sequences",
        "mistralcli.whole_file",
        "mistralcli.file_lock",
    ],
    ["mistralcli.errors"],
    ["quant"],
]
"""From top to bottom: a module imports from its own layer and from those below it."""

HEAVY = [
    "torch",
    "bitsandbytes",
    "transformers",
    "numpy",
    "huggingface_hub",
    "mistral_common",
    "tokenizers",
    "prompt_toolkit",
]
HEAVY += ["safetensors", "sentencepiece", "jinja2", "psutil"]


def modules() -> list[tuple[str, Path]]:
    files = [path for package in ("mistralcli", "quant") for path in (REPOSITORY / package).rglob("*.py")]
    return [
        (".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"), path)
        for path in files
    ]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(module: str) -> int:
    """The layer that names the module or the package it is in."""
    found = [i for i, layer in enumerate(LAYERS) for one in layer if within(module, one)]
    assert found, f"{module} is in no layer: put it into LAYERS"
    return found[0]


@pytest.mark.parametrize(("module", "path"), modules())
def test_imports_point_one_way(module: str, path: Path) -> None:
    names = {name for name, _ in modules()} - {"mistralcli", "mistralcli.cli"}
    if module != "mistralcli":
        upward = [name for name in imported(path) & names if layer_of(name) < layer_of(module)]
        assert not upward, f"{module} imports {upward} from above"


def test_quant_imports_nothing_of_mistralcli() -> None:
    for module, path in modules():
        if within(module, "quant"):
            assert not any(within(name, "mistralcli") for name in imported(path)), module


def test_help_imports_neither_torch_nor_any_other_heavy_package() -> None:
    code = "import sys; from mistralcli.cli.app import main; main(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert "quantize" in done.stdout
    loaded = set(done.stderr.split())
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize(
    "arguments", [["--version"], ["chat", "--help"], ["run", "--help"], ["pull", "--help"]]
)
def test_help_of_a_command_is_light_too(arguments: list[str]) -> None:
    code = "import sys; from mistralcli.cli.app import main; main(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert not set(done.stderr.split()) & set(HEAVY)


def test_the_version_is_the_same_in_code_project_file_and_changelog() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == __version__
    newest = re.search(r"^## \[([^\]]+)\]", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None and newest[1] in (__version__, "Unreleased")
