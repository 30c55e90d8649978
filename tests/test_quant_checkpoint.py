"""A build is whole or not there, exactly as large as predicted, and what it holds is what was quantized."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from big_model import MISTRAL_7B, write_checkpoint
from models import all_logits, load, random_checkpoint, token_ids
from program import RESIDENT, environment
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mistralcli.checkpoint_files import Checkpoint
from mistralcli.model import Linear, Transformer
from mistralcli.weights import open_checkpoint
from quant.checkpoint import BuildReport, quantize_checkpoint
from quant.errors import DiskError, IntegrityError, QualityError, UsageError
from quant.plan import into_shards, plan_tensors
from quant.safetensors_file import file_size_bytes
from quant.scheme import Scheme, default_head_scheme
from quant.schemes.affine import Affine
from quant.schemes.float4 import Float4
from quant.schemes.llm_int8 import LlmInt8

CPU = torch.device("cpu")
INT4 = Affine(4, 64)
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
SCHEMES: list[Scheme] = [
    *(Affine(4, size, symmetric) for size in (32, 64, 128, None) for symmetric in (True, False)),
    *(Affine(8, size) for size in (None, 128)),
    Float4(),
    LlmInt8(),
]


def build(source: Path, destination: Path, scheme: Scheme = INT4, **options: Any) -> BuildReport:
    options = {"head_scheme": default_head_scheme(scheme)} | options
    return quantize_checkpoint(open_checkpoint(source), source, destination, scheme, **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small random model in bfloat16, with what a pulled one has beside its weights."""
    random_checkpoint(tmp_path / "source", dtype="bfloat16", **SHAPE)
    for name in (
        "tokenizer.json",
        "tokenizer.model.v3",
        "tekken.json",
        "chat_template.jinja",
        "LICENSE.txt",
        "README.md",
    ):
        (tmp_path / "source" / name).write_text(f"the {name}")
    return tmp_path / "source"


def card(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "quantization_card.json").read_text())
    return found


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def quantized_in_memory(source: Path, scheme: Scheme) -> Transformer:
    """The model in `source`, its layers replaced by quantized ones without a file in between."""
    model, head = load(source), default_head_scheme(scheme)
    linears = [(name, module.weight) for name, module in model.named_modules() if isinstance(module, Linear)]
    assert len(linears) == 3 * 7 + (model.output is not None)
    for name, weight in linears:
        chosen = head if name == "output" else scheme
        if chosen is not None:
            out_features, in_features = weight.shape
            fitting = chosen.for_in_features(in_features)
            linear = fitting.linear(in_features, out_features)
            linear.load_stored(fitting.quantize(weight.bfloat16(), torch.bfloat16), CPU)
            linear.prepare()
            model.set_submodule(name, linear)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_build_gives_the_logits_of_the_model_quantized_in_memory(
    scheme: Scheme, tied: bool, tmp_path: Path
) -> None:
    random_checkpoint(tmp_path / "source", dtype="bfloat16", tie_word_embeddings=tied, **SHAPE)
    build(tmp_path / "source", tmp_path / "build", scheme)
    ids = token_ids(20)
    with torch.inference_mode():
        expected = all_logits(quantized_in_memory(tmp_path / "source", scheme), ids, chunk=20, slack=20)
        logits = all_logits(load(tmp_path / "build"), ids, chunk=20, slack=20)
    assert torch.equal(logits, expected)


def test_what_is_not_quantized_is_kept_bit_for_bit(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build")
    before, after = tensors(source), tensors(tmp_path / "build")
    dense = {name for name in before if "proj" not in name and "lm_head" not in name}
    assert dense < after.keys() and len(dense) == 8
    assert all(torch.equal(before[name], after[name]) for name in dense)


def test_tokenizer_and_licence_come_along_and_the_readme_does_not(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build")
    ours = {"config.json", "model.safetensors", "quantization_card.json"}
    copied = {file.name for file in source.iterdir()} - {"README.md"} - ours
    assert {file.name for file in (tmp_path / "build").iterdir()} == copied | ours
    assert all((tmp_path / "build" / name).read_bytes() == (source / name).read_bytes() for name in copied)


def test_the_configuration_is_the_sources_with_the_quantization_added(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build")
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "build" / "config.json").read_text())
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before


def test_a_source_without_config_json_takes_the_configuration_that_is_given(
    source: Path, tmp_path: Path
) -> None:
    config = json.loads((source / "config.json").read_text())
    opened = open_checkpoint(source)
    (source / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        quantize_checkpoint(opened, source, tmp_path / "build", INT4, head_scheme=None)
    (tmp_path / "config.json").rename(source / "config.json")
    build(source, tmp_path / "build", config=config | {"dtype": "float16"})
    assert tensors(tmp_path / "build")["lm_head.weight_scale"].dtype == torch.float16


def test_the_card_states_source_sizes_and_errors(source: Path, tmp_path: Path) -> None:
    scheme = Affine(4, 128)
    report = build(source, tmp_path / "build", scheme, source_name="someone/model", revision="abc")
    made, before, after = card(tmp_path / "build"), tensors(source), tensors(tmp_path / "build")
    weights = (source / "model.safetensors").read_bytes()
    assert made["source"] == {
        "name": "someone/model",
        "revision": "abc",
        "files": {
            "model.safetensors": {"size_bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        },
    }
    assert (made["format_version"], made["scheme"], made["method"]) == (1, "int4-g128", "rtn")
    sizes = {"before": sum(t.nbytes for t in before.values()), "after": sum(t.nbytes for t in after.values())}
    assert made["size_bytes"] == sizes
    assert (report.size_before_bytes, report.size_after_bytes) == (sizes["before"], sizes["after"])
    quantized = {name for name in after if name.rpartition(".")[2] != "weight"}
    n_weights = sum(before[name].numel() for name in made["tensors"])
    bits = 8 * sum(after[name].nbytes for name in quantized) / n_weights
    assert made["bits_per_weight"]["quantized"] == report.bits_per_weight == pytest.approx(bits)
    n_all = sum(t.numel() for t in before.values())
    assert made["bits_per_weight"]["all"] == pytest.approx(8 * sizes["after"] / n_all)
    for name, entry in made["tensors"].items():
        fitting = Affine(8) if name == "lm_head.weight" else scheme.for_in_features(before[name].shape[1])
        linear = fitting.linear(*reversed(before[name].shape))
        module = name.removesuffix(".weight")
        linear.load_stored({key: after[f"{module}.{key}"] for key in linear.stored()}, CPU)
        exact = before[name].double()
        error = (linear.dense_rows(0, len(exact)).double() - exact).norm() / exact.norm()
        assert entry == {"scheme": fitting.name, "relative_error": pytest.approx(float(error), rel=1e-5)}
    worst = max(made["tensors"], key=lambda name: made["tensors"][name]["relative_error"])
    assert made["gate"] == {
        "max_error": 0.3,
        "worst_tensor": worst,
        "worst_error": made["tensors"][worst]["relative_error"],
        "max_kl": 1.0,
        "kl": None,
        "passed": True,
    }
    assert (report.worst_tensor, report.worst_error) == (worst, made["gate"]["worst_error"])


def planned_sizes(source: Path, scheme: Scheme, max_bytes: int) -> dict[str, int]:
    """The size of each file of a build, from the source's shapes alone."""
    head = default_head_scheme(scheme)
    planned = plan_tensors(open_checkpoint(source), scheme, head, tied=False, dtype=torch.bfloat16)
    shards = into_shards(planned, max_bytes)
    return {
        name: file_size_bytes({key: spec for tensor in shard for key, spec in tensor.stored.items()})
        for name, shard in shards.items()
    }


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_file_has_exactly_the_predicted_size(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build", scheme)
    size = (tmp_path / "build" / "model.safetensors").stat().st_size
    assert planned_sizes(source, scheme, 10**9) == {"model.safetensors": size}


@pytest.mark.parametrize("max_bytes", [100_000, 1])
def test_shards_hold_what_one_file_would_and_are_no_larger_than_asked(
    max_bytes: int, source: Path, tmp_path: Path
) -> None:
    build(source, tmp_path / "one")
    build(source, tmp_path / "many", max_shard_bytes=max_bytes)
    whole, found = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in found)
    files = {file.name: file.stat().st_size for file in (tmp_path / "many").glob("*.safetensors")}
    assert files == planned_sizes(source, INT4, max_bytes) and len(files) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "many" / file)
    assert load(tmp_path / "many")
    if max_bytes == 1:
        assert len(files) == len(load_file(source / "model.safetensors"))
    else:
        assert max(files.values()) < max_bytes + 10_000  # the header


def test_every_tensor_is_aligned_to_its_width(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build", Affine(4, 32, symmetric=False))
    data = (tmp_path / "build" / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    with safe_open(tmp_path / "build" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            start = 8 + header_bytes + header[name]["data_offsets"][0]
            assert start % file.get_tensor(name).dtype.itemsize == 0


def test_a_build_is_the_same_to_the_byte_each_time(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "one")
    build(source, tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_head_beside_tied_embeddings_is_left_out(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "source", dtype="bfloat16", tie_word_embeddings=True, **SHAPE)
    file = tmp_path / "source" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros((96, 128))}, file)
    build(tmp_path / "source", tmp_path / "build")
    assert not any(name.startswith("lm_head") for name in tensors(tmp_path / "build"))
    config = json.loads((tmp_path / "build" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_progress_grows_to_the_total(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    build(source, tmp_path / "build", on_progress=lambda done, total: calls.append((done, total)))
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}
    read = sum(t.nbytes for t in tensors(source).values()) + (source / "model.safetensors").stat().st_size
    made = [path for path in (tmp_path / "build").iterdir() if path.name != "quantization_card.json"]
    assert done[-1] == read + sum(path.stat().st_size for path in made)  # the build's files, for their hashes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    name: str, value: float, source: Path, tmp_path: Path
) -> None:
    weights = load_file(source / "model.safetensors")
    weights[name].view(-1)[5] = value
    save_file(weights, source / "model.safetensors")
    with pytest.raises(IntegrityError, match=name):
        build(source, tmp_path / "build")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_values_beyond_the_range_of_the_scheme_are_refused(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "source", **SHAPE)
    weights = load_file(tmp_path / "source" / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = 1e9  # bitsandbytes quantizes from float16
    save_file(weights, tmp_path / "source" / "model.safetensors")
    with pytest.raises(UsageError, match=r"layers\.2\.mlp\.up_proj\.weight .*llm\.int8"):
        build(tmp_path / "source", tmp_path / "build", LlmInt8())


def test_a_build_is_not_quantized_again(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build")
    with pytest.raises(UsageError, match="quantized already"):
        build(tmp_path / "build", tmp_path / "again")


def to_float8(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = weights[name].to(torch.float8_e4m3fn)

    return change


def without_layers(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "layers" in name]:
        del weights[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_float8("model.layers.0.mlp.up_proj.weight"), r"up_proj\.weight .*float8"),
        (to_float8("model.embed_tokens.weight"), r"embed_tokens\.weight .*float8"),
        (without_layers, "no linear layers"),
    ],
)
def test_what_cannot_be_quantized_is_said(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, source: Path, tmp_path: Path
) -> None:
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors")
    # `open_checkpoint` would refuse it before.
    unchecked = Checkpoint(source, dict.fromkeys(weights, source / "model.safetensors"), {})
    with pytest.raises(UsageError, match=message):
        quantize_checkpoint(unchecked, source, tmp_path / "build", INT4, head_scheme=None)


def test_the_gate_fails_a_build_and_marks_it(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QualityError) as caught:
        build(source, tmp_path / "build", max_error=0.05)
    verdict = card(tmp_path / "build")["gate"]
    assert verdict["passed"] is False and verdict["max_error"] == 0.05
    assert verdict["worst_tensor"] in caught.value.message
    assert f"{verdict['worst_error']:.4f}" in caught.value.message


def test_a_build_that_fails_its_gate_replaces_none(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build", Affine(8))
    with pytest.raises(QualityError, match="stays as it was"):
        build(source, tmp_path / "build", max_error=0.05, replace=True)
    assert card(tmp_path / "build")["scheme"] == "int8"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["build", "source"]


def test_an_existing_build_is_replaced_only_when_asked(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build", Affine(8))
    with pytest.raises(UsageError, match="exists already"):
        build(source, tmp_path / "build")
    assert card(tmp_path / "build")["scheme"] == "int8"
    build(source, tmp_path / "build", replace=True)
    assert card(tmp_path / "build")["scheme"] == "int4-g64"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["build", "source"]


def test_a_directory_that_is_no_build_is_never_replaced(source: Path, tmp_path: Path) -> None:
    for victim in (tmp_path / "mine", source):
        victim.mkdir(exist_ok=True)
        (victim / "precious").write_text("precious")
        with pytest.raises(UsageError, match="exists already"):
            build(source, victim, replace=True)
        assert (victim / "precious").read_text() == "precious"


def test_a_replacement_that_fails_leaves_the_old_build(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build", Affine(8))

    def stop(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "build", replace=True, on_progress=stop)
    assert card(tmp_path / "build")["scheme"] == "int8"
    build(source, tmp_path / "build", replace=True, resume=True)
    assert card(tmp_path / "build")["scheme"] == "int4-g64"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["build", "source"]


def test_of_two_that_make_the_same_build_the_second_is_refused(source: Path, tmp_path: Path) -> None:
    second: list[str] = []

    def start_another(done: int, total: int) -> None:
        if not second:
            with pytest.raises(UsageError, match="another process is making") as caught:
                build(source, tmp_path / "build")
            second.append(caught.value.message)

    build(source, tmp_path / "build", on_progress=start_another)
    assert second and load(tmp_path / "build")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["build", "source"]


def test_a_source_that_cannot_be_read_is_not_called_a_failure_to_write(source: Path, tmp_path: Path) -> None:
    def lose_the_source(done: int, total: int) -> None:
        (source / "tekken.json").unlink(missing_ok=True)

    with pytest.raises(DiskError, match=r"source/tekken\.json cannot be read: No such file"):
        build(source, tmp_path / "build", on_progress=lose_the_source)


def test_a_source_whose_name_has_the_builds_in_it_is_still_the_source(source: Path, tmp_path: Path) -> None:
    named_alike = source.rename(tmp_path / "build-source")

    def lose_the_source(done: int, total: int) -> None:
        (named_alike / "tekken.json").unlink(missing_ok=True)

    with pytest.raises(DiskError, match=r"tekken\.json cannot be read"):
        build(named_alike, tmp_path / "build", on_progress=lose_the_source)


IN_A_PROCESS = """
import os, sys
from pathlib import Path
from mistralcli.weights import open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.errors import MistralError
from quant.schemes.affine import Affine

source, destination = Path(sys.argv[1]), Path(sys.argv[2])
def on_progress(done, total):
    if done > total // 2:
        {event}
try:
    quantize_checkpoint(open_checkpoint(source), source, destination, Affine(4, 64), head_scheme=Affine(8),
                        on_progress=on_progress)
except MistralError as error:
    print(error.message, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def run(event: str, source: Path, destination: Path, *wrapper: str) -> subprocess.CompletedProcess[str]:
    """Quantize in a process in which `event` happens half-way."""
    command = [
        *wrapper,
        sys.executable,
        "-c",
        IN_A_PROCESS.format(event=event),
        str(source),
        str(destination),
    ]
    env = environment(source.parent)
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_a_killed_process_leaves_no_build_and_does_not_hinder_the_next(source: Path, tmp_path: Path) -> None:
    done = run("os.kill(os.getpid(), 9)", source, tmp_path / "build")
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "build").exists()
    assert not (tmp_path / "build.partial" / "config.json").exists()
    assert not (tmp_path / "build.partial" / "quantization_card.json").exists()
    assert run("pass", source, tmp_path / "build").returncode == 0
    assert load(tmp_path / "build")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["build", "source"]


def test_a_file_size_limit_is_a_full_disk(source: Path, tmp_path: Path) -> None:
    done = run("pass", source, tmp_path / "build", "sh", "-c", 'ulimit -f 50; exec "$@"', "sh")
    assert done.returncode == DiskError.exit_code
    assert "bytes are needed" in done.stderr and "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def small_disk(size: str, mount_point: Path) -> list[str]:
    """A command prefix that gives the process a disk of its own at `mount_point`; skips where that is forbidden."""
    script = f'mount -t tmpfs -o size={size} tmpfs "{mount_point}" && exec "$@"'
    wrapper = [
        "unshare",
        "--mount",
        *(["--user", "--map-root-user"] if os.getuid() else []),
        "sh",
        "-c",
        script,
        "sh",
    ]
    mount_point.mkdir()
    try:
        subprocess.run([*wrapper, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets no test mount a disk of its own")
    return wrapper


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    wrapper = small_disk("128k", tmp_path / "disk")
    done = run("raise AssertionError('too late')", source, tmp_path / "disk" / "build", *wrapper)
    assert done.returncode == DiskError.exit_code
    assert "131,072 are free" in done.stderr and "bytes are needed" in done.stderr


def test_a_disk_that_fills_up_half_way_is_a_disk_error(source: Path, tmp_path: Path) -> None:
    wrapper = small_disk("8m", tmp_path / "disk")
    filler = f"os.system('cat /dev/zero > {tmp_path}/disk/filler 2> /dev/null')"
    done = run(
        f"{filler}; print(os.listdir('{tmp_path}/disk'))", source, tmp_path / "disk" / "build", *wrapper
    )
    assert done.returncode == DiskError.exit_code, done.stderr
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr


def test_a_directory_that_cannot_be_written_is_a_disk_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(DiskError, match="cannot be written"):
        build(source, tmp_path / "file" / "build")


PEAK = f"""{RESIDENT}
import sys
from pathlib import Path
from mistralcli.quantizing import open_job, recipe_of
from quant.scheme import parse_scheme

source = Path(sys.argv[1])
job = open_job("source", source, recipe_of(parse_scheme(), "rtn", [], None))
job.require_memory(job.peak().total, check=False)
job.build(Path(sys.argv[2]), None, check=False, replace=False, resume=False, on_progress=lambda done, total: None)
print(resident_bytes("VmHWM"), job.peak().total)
"""


@pytest.mark.slow
def test_the_peak_of_memory_is_below_what_was_planned_and_that_below_the_model(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
    }
    write_checkpoint(tmp_path / "source", MISTRAL_7B | shape)
    file = tmp_path / "source" / "model.safetensors"
    size_bytes = file.stat().st_size
    try:
        command = [sys.executable, "-c", PEAK, str(tmp_path / "source"), str(tmp_path / "build")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=280)
    finally:
        file.unlink()
    assert done.returncode == 0, done.stderr
    peak_bytes, planned_bytes = map(int, done.stdout.split())
    assert peak_bytes <= planned_bytes < 0.7 * size_bytes
    assert planned_bytes < 2 * (32768 * 2048 * 2) + 1e9  # embedding and head, and what Python and torch take
