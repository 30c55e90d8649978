"""`mistral pull --dry-run`: what it says is what would be, and it reads no more than headers."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import online
from hub_server import TOKEN, Fault, HubServer
from hypothesis import given
from hypothesis import strategies as st
from models import random_checkpoint
from program import assert_one_sentence, mistral
from safetensors.torch import load_file, save_file

from mistralcli.cli.pull_report import as_dict, as_text
from mistralcli.config import hugging_face_config, read_config
from mistralcli.device import free_memory_bytes
from mistralcli.errors import IntegrityError, ModelNotFoundError, NetworkError, UsageError
from mistralcli.hub import Fetching, look_up
from mistralcli.hub_cache import PART_SUFFIX, blob_path, cache_directory, parse_hub_model, repo_directory
from mistralcli.hub_files import RemoteFile
from mistralcli.hub_http import Patience
from mistralcli.plan import MemoryPlan, fitting_plan
from mistralcli.pull_plan import AS_IT_IS, BUILDS, left_out_because, plan_pull
from mistralcli.remote_tensors import parse_header, read_header
from mistralcli.run_options import SessionOptions
from mistralcli.session import demand_under
from mistralcli.transfer import part_bytes
from mistralcli.weights import hugging_face_name, open_checkpoint
from quant.checkpoint import quantize_checkpoint
from quant.scheme import default_head_scheme, parse_scheme

MODEL = "mistralai/tiny"
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
LONGEST_REQUEST = 64 << 10


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def home(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home, whose Hub is the test's, for this process too."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


def checkpoint(directory: Path, **changes: Any) -> Path:
    random_checkpoint(directory, **{"dtype": "bfloat16"} | SHAPE | changes)
    (directory / "tokenizer.model").write_bytes(b"pieces")
    return directory


def in_mistral_layout(source: Path, directory: Path) -> Path:
    """The names of Mistral's own layout, and its params.json; rows stay as they are, for nobody looks at them."""
    config = read_config(source)
    modules = [f"layers.{i}.{part}" for i in range(config.n_layers) for part in PARTS]
    theirs = {f"{hugging_face_name(name)}.weight": f"{name}.weight" for name in (*modules, *TOPS)}
    directory.mkdir()
    tensors = load_file(source / "model.safetensors")
    save_file(
        {theirs[name]: tensor for name, tensor in tensors.items()}, directory / "consolidated.safetensors"
    )
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps")
    (directory / "params.json").write_text(json.dumps({name: getattr(config, name) for name in names}))
    return directory


ATTENTION = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm")
PARTS = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "ffn_norm")
TOPS = ("tok_embeddings", "norm", "output")


def build(source: Path, destination: Path, bits: int) -> Path:
    scheme = parse_scheme(bits)
    config = None if (source / "config.json").is_file() else hugging_face_config(read_config(source))
    quantize_checkpoint(
        open_checkpoint(source),
        source,
        destination,
        scheme,
        head_scheme=default_head_scheme(scheme),
        config=config,
        max_error=1.0,
    )
    return destination


def run_plan(directory: Path) -> MemoryPlan:
    """What a run without flags would plan, for a model that is here."""
    device = torch.device("cpu")
    demand = demand_under(SessionOptions(), directory, device, free_memory_bytes(device))
    return fitting_plan(read_config(directory), demand, free_memory_bytes(device))


# What it says


@pytest.mark.parametrize("layout", ["model", "sharded", "tied", "consolidated"])
def test_builds_and_fits_are_those_that_quantize_and_run_would_get(
    layout: str, home: Path, hub: HubServer
) -> None:
    source = checkpoint(home / "source", tie_word_embeddings=layout == "tied")
    if layout == "sharded":
        shard(source)
    if layout == "consolidated":
        source = in_mistral_layout(source, home / "own")
    hub.add(MODEL, source)
    weights = plan_pull(MODEL).weights
    assert weights is not None and weights.no_builds is None
    directories = {name: build(source, home / name, bits) for name, bits in BUILDS.items()}
    for name, directory in directories.items():
        files = directory.glob("*.safetensors")
        assert weights.builds[name] == sum(file.stat().st_size for file in files)
    planned = {fit.build: fit for fit in weights.fits if fit.device == "cpu"}
    for name, directory in {AS_IT_IS: source, **directories}.items():
        expected = run_plan(directory)
        assert (planned[name].ctx, planned[name].needed_bytes) == (expected.ctx, expected.total_bytes)


def shard(directory: Path) -> None:
    """The single file of a checkpoint in two, with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number in (0, 1):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        names = sorted(tensors)[number::2]
        save_file({one: tensors[one] for one in names}, directory / name)
        weight_map |= dict.fromkeys(names, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_device_without_room_gets_no_context(
    home: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(MODEL, checkpoint(home / "source"))
    monkeypatch.setattr("mistralcli.pull_plan.free_memory_bytes", lambda device: 1000)
    plan = plan_pull(MODEL)
    assert plan.weights is not None
    assert all(fit.ctx is None and fit.needed_bytes > 1000 for fit in plan.weights.fits)
    assert "no: " in as_text(plan)


def test_each_gpu_of_the_machine_is_planned_for_and_the_cpu(
    home: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with two GPUs, one of them almost full: what the driver would say is made up, the plan is not."""
    free = {0: 80 * 10**9, 1: 10**6}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 80 * 10**9))
    source = checkpoint(home / "source")
    hub.add(MODEL, source)
    weights = plan_pull(MODEL).weights
    assert weights is not None
    fits = {fit.device: fit for fit in weights.fits if fit.build == AS_IT_IS}
    assert fits.keys() == {"cuda:0", "cuda:1", "cpu"}
    device = torch.device("cuda", 0)
    demand = demand_under(SessionOptions(), source, device, free[0])
    expected = fitting_plan(read_config(source), demand, free[0])
    assert (fits["cuda:0"].ctx, fits["cuda:0"].needed_bytes) == (expected.ctx, expected.total_bytes)
    assert (fits["cuda:1"].ctx, fits["cuda:1"].free_bytes) == (None, 10**6)


def test_files_that_are_here_need_not_be_fetched_and_others_are_left_out(home: Path, hub: HubServer) -> None:
    source = checkpoint(home / "source")
    (source / "pytorch_model.bin").write_bytes(b"pickle" * 10)
    (source / "README.md").write_text("read me")
    hub.add(MODEL, source)
    weights = hub.file(MODEL, "model.safetensors")
    blob = repo_directory(MODEL) / "blobs" / weights.digest
    before = plan_pull(MODEL)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(weights.path.read_bytes())
    after = plan_pull(MODEL)
    chosen = {file.name: file.size_bytes for file in before.chosen}
    assert chosen == {
        path.name: path.stat().st_size
        for path in source.iterdir()
        if path.name not in ("pytorch_model.bin", "README.md")
    }
    assert (before.fetch_bytes, before.here_bytes) == (sum(chosen.values()), 0)
    assert after.here["model.safetensors"] == after.here_bytes == weights.size_bytes
    assert after.fetch_bytes == sum(chosen.values()) - weights.size_bytes
    assert {one.file.name: one.reason for one in after.left_out} == {
        "pytorch_model.bin": "another format of the weights",
        "README.md": "documents and pictures",
    }


def test_what_an_interrupted_pull_has_is_not_fetched_again(home: Path, hub: HubServer) -> None:
    hub.add(MODEL, checkpoint(home / "source"))
    weights = hub.file(MODEL, "model.safetensors")
    blob = blob_path(MODEL, weights.digest)
    blob.parent.mkdir(parents=True)
    part = blob.with_name(blob.name + PART_SUFFIX)
    part.write_bytes(weights.path.read_bytes()[: 16 << 10])
    plan = plan_pull(MODEL)
    assert plan.here_bytes == plan.here["model.safetensors"] == part_bytes(blob) >= 16 << 10
    assert plan.fetch_bytes == sum(file.size_bytes for file in plan.chosen) - plan.here_bytes
    assert "kB of it here" in as_text(plan)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("consolidated.safetensors", "a second copy of the weights"),
        ("model.safetensors.index.json", "a second copy of the weights"),
        ("onnx/model.ONNX", "another format of the weights"),
        ("modeling_x.py", "code, which is never run"),
        ("images/a.png", "documents and pictures"),
        (".gitattributes", "documents and pictures"),
        ("trainer_state.json", "not needed to run it"),
    ],
)
def test_each_file_that_is_left_out_has_its_reason(name: str, reason: str) -> None:
    assert left_out_because(name) == reason


def test_a_quantized_model_says_that_it_is_and_where_it_fits(home: Path, hub: HubServer) -> None:
    hub.add(MODEL, build(checkpoint(home / "source"), home / "build", 4))
    plan = plan_pull(MODEL)
    assert plan.weights is not None
    assert (plan.weights.builds, plan.weights.no_builds) == ({}, "it is quantized already")
    assert [fit.build for fit in plan.weights.fits if fit.device == "cpu"] == [AS_IT_IS]


def test_text_and_json_say_the_same_and_nothing_is_left_behind(home: Path, hub: HubServer) -> None:
    hub.add(MODEL, checkpoint(home / "source"))
    hub.repos[MODEL].facts = {"cardData": {"license": "apache-2.0"}, "gated": "manual"}
    done = mistral("pull", MODEL, "--dry-run", home=home, **online(home, hub))
    assert (done.returncode, done.stderr) == (0, "")
    said = as_dict(plan_pull(MODEL))
    assert json.loads(json.dumps(said)) == said
    assert (said["licence"], said["gated"]) == ("apache-2.0", "manual")
    assert said["disk"]["needed_bytes"] == said["fetch_bytes"] == sum(f["size_bytes"] for f in said["files"])
    for part in ("apache-2.0", "its owner decides", "model.safetensors", "as int4", "cpu ("):
        assert part in done.stdout
    assert not list((home / "hf").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("card", "tags", "licence"),
    [
        ({"license": "apache-2.0"}, [], "apache-2.0"),
        ({"license": "other", "license_name": "mrl", "license_link": "https://x.y"}, [], "mrl, https://x.y"),
        ({"license": "other"}, ["license:other"], "other"),
        ({"license": 7}, ["license:mit"], "mit"),
        (None, [], None),
    ],
)
def test_the_licence_is_what_the_card_states(
    card: Any, tags: list[str], licence: str | None, home: Path, hub: HubServer
) -> None:
    hub.add(MODEL, checkpoint(home / "source"))
    hub.repos[MODEL].facts = {"cardData": card, "tags": tags}
    source, _ = look_up(parse_hub_model(MODEL))
    assert source.licence == licence


def test_a_licence_with_escape_bytes_and_without_end_is_a_short_line_without_them(
    home: Path, hub: HubServer
) -> None:
    hub.add(MODEL, checkpoint(home / "source"))
    hub.repos[MODEL].facts = {"cardData": {"license": "free\x1b]0;x\n" + "word " * 1000}}
    text = as_text(plan_pull(MODEL))
    assert "\x1b" not in text and "free\\x1b" in text and max(map(len, text.splitlines())) < 300


# What it reads


def test_no_weights_are_read_and_no_host_but_the_hub_s_sees_the_token(home: Path, hub: HubServer) -> None:
    hub.add(MODEL, checkpoint(home / "source", vocab_size=4096), access="private")
    plan_pull(MODEL, token=TOKEN)
    files = [request for request in hub.requests if not request.path.startswith("/api/")]
    assert {request.host for request in files} == {"hub", "cdn"}
    for request in files:
        assert request.method == "GET" and request.range is not None
        assert int(request.range.rpartition("-")[2]) < LONGEST_REQUEST
        assert (request.authorization is None) == (request.host == "cdn")
    assert not cache_directory().exists()


def test_a_header_longer_than_the_first_request_is_read_whole(home: Path, hub: HubServer) -> None:
    source = checkpoint(home / "source")
    tensors = {f"a.tensor.with.a.long.name.{i}": torch.zeros(2, i % 3) for i in range(1500)}
    save_file(tensors, source / "model.safetensors")
    hub.add(MODEL, source)
    listed, listing = look_up(parse_hub_model(MODEL))
    file = next(file for file in listing if file.name == "model.safetensors")
    found = read_header(Fetching(listed, Patience(), print), file)
    assert {name: (spec.shape, spec.dtype) for name, spec in found.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("part", ["/api/models/", "/config.json"])
def test_a_server_that_stalls_is_borne_with_as_long_as_was_said(
    home: Path, hub: HubServer, part: str
) -> None:
    hub.add(MODEL, checkpoint(home / "source"))
    hub.faults[part] = Fault("silence")
    started = time.monotonic()
    with pytest.raises(NetworkError, match="did not answer in time"):
        plan_pull(MODEL, patience=Patience(timeout_s=0.2, retries=1, first_wait_s=0.01))
    assert time.monotonic() - started < 5  # by default it is 30 s, twice


def test_of_a_server_that_knows_no_ranges_no_more_is_read(home: Path, hub: HubServer) -> None:
    hub.add(MODEL, checkpoint(home / "source", vocab_size=4096))
    expected = plan_pull(MODEL)
    hub.faults["/"] = Fault("whole")
    plan = plan_pull(MODEL)
    assert plan.weights is not None and expected.weights is not None
    assert plan.weights.builds == expected.weights.builds


def header(value: Any, length: int | None = None, data: bytes = b"") -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: Any = (2, 2), dtype: Any = "F32", offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        header(b"{}", length=2**63),
        header(b"{}", length=3),
        header(b"{}" + b" " * (17 << 20)),
        header(b"[]"),
        header(b"{"),
        header(b"\xff\xff"),
        header(b"[" * 50_000),
        header(b"{}", data=b"more"),
        header(tensor(), data=b"x" * 15),
        header(tensor(dtype="F3"), data=b"x" * 16),
        header(tensor(dtype=["F32"]), data=b"x" * 16),
        header(tensor(shape=[2, -2]), data=b"x" * 16),
        header(tensor(shape=[2.0, 2]), data=b"x" * 16),
        header(tensor(shape=[True, 4]), data=b"x" * 16),
        header(tensor(shape="22"), data=b"x" * 16),
        header(tensor(offsets=[0, 16, 3]), data=b"x" * 16),
        header(tensor(offsets=None), data=b"x" * 16),
        header(tensor(shape=[2**47] * 8, offsets=[0, 2**378]), data=b"x" * 16),
    ],
    ids=range(20),
)
def test_a_hostile_header_is_refused_and_no_more_than_a_header_is_read(
    content: bytes, home: Path, hub: HubServer
) -> None:
    source = checkpoint(home / "source")
    (source / "model.safetensors").write_bytes(content)
    hub.add(MODEL, source)
    with pytest.raises(IntegrityError, match=r"model\.safetensors is not a sound safetensors file"):
        plan_pull(MODEL)
    ranges = [request.range for request in hub.requests if request.host == "cdn" and request.range]
    assert all(int(one.rpartition("-")[2]) < LONGEST_REQUEST for one in ranges)


def json_tree(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"])
    return st.lists(leaves, max_size=3) | st.dictionaries(keys, leaves, max_size=4)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), json_tree))
def test_any_json_is_a_header_or_an_integrity_error(value: Any) -> None:
    text = json.dumps(value).encode()
    try:
        parse_header(RemoteFile("model.safetensors", 8 + len(text), "0" * 64), text)
    except IntegrityError:
        return
    assert isinstance(value, dict)


# What it refuses


def test_weights_of_another_model_than_the_configuration_s_are_refused_by_name(
    home: Path, hub: HubServer
) -> None:
    source = checkpoint(home / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))
    hub.add(MODEL, source)
    with pytest.raises(IntegrityError, match=r"\[96, 64\].*\[97, 64\]"):
        plan_pull(MODEL)


def test_a_configuration_that_was_damaged_on_the_way_is_refused(home: Path, hub: HubServer) -> None:
    hub.add(MODEL, checkpoint(home / "source"))
    hub.faults["config.json"] = Fault("corrupt")
    with pytest.raises(IntegrityError, match="config"):
        plan_pull(MODEL)


def test_a_gated_model_without_access_shows_what_the_listing_tells_and_fails_with_4(
    home: Path, hub: HubServer
) -> None:
    hub.add(MODEL, checkpoint(home / "source"), access="gated")
    hub.repos[MODEL].facts = {"cardData": {"license": "mit"}, "gated": "auto"}
    done = mistral("pull", MODEL, "--dry-run", "--json", home=home, **online(home, hub))
    assert done.returncode == 4 and "is gated" in done.stderr
    said = json.loads(done.stdout)
    assert (said["licence"], said["gated"], said["builds"], said["devices"]) == ("mit", "auto", None, None)
    assert any(file["name"] == "model.safetensors" for file in said["files"])


def test_json_without_a_dry_run_is_refused(home: Path, hub: HubServer) -> None:
    assert_one_sentence(mistral("pull", MODEL, "--json", home=home, **online(home, hub)), 2, "--dry-run")
    assert not hub.requests


def test_a_plan_that_cannot_be_made_fails_as_a_pull_would(
    home: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(MODEL, checkpoint(home / "source"), ref="v1")
    assert plan_pull(f"{MODEL}@v1").source.commit == commit
    with pytest.raises(ModelNotFoundError, match="no revision"):
        plan_pull(f"{MODEL}@v2")
    with pytest.raises(ModelNotFoundError, match="no model"):
        plan_pull("mistralai/missing")
    with pytest.raises(UsageError):
        plan_pull("no name")
    with monkeypatch.context() as offline, pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        offline.setattr("mistralcli.pull_plan.is_offline_mode", lambda: True)
        plan_pull(MODEL)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(NetworkError, match=r"127\.0\.0\.1:1"):
        plan_pull(MODEL)
