"""`mistral pull --quantize`: the build that `mistral quantize` makes, byte for byte, without the model on the disk."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_models import online
from hub_server import Fault, HubServer
from huggingface_hub import constants
from models import random_checkpoint
from program import assert_one_sentence, mistral
from safetensors.torch import load_file, save_file

from mistralcli import pull_quantized as pulling
from mistralcli import transfer
from mistralcli.errors import DiskError, IntegrityError, NetworkError, UsageError
from mistralcli.hub_http import Patience
from mistralcli.quantizing import open_job, recipe_of
from quant.build_plan import Recipe
from quant.scheme import parse_scheme
from quant.staging import partial_of

MODEL = "mistralai/Tiny-Model"
N_SHARDS = 3
QUICK = Patience(timeout_s=2, retries=3, first_wait_s=0.01, longest_wait_s=0.05)


def recipe(bits: int = 4) -> Recipe:
    return recipe_of(parse_scheme(bits), None, [], None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in three shards, whose layers lie across their borders."""
    directory = tmp_path_factory.mktemp("source")
    random_checkpoint(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "LICENSE").write_text("Do what you like.")
    names = sorted(tensors)
    shards = {
        name: f"model-{i * N_SHARDS // len(names) + 1:05}-of-{N_SHARDS:05}.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(shards.values()):
        save_file({name: tensors[name] for name in names if shards[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return directory


@pytest.fixture
def server(source: Path) -> Iterator[HubServer]:
    with HubServer({MODEL: source}) as running:
        yield running


@pytest.fixture
def place(tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process pulls from `server`; gives a directory for builds."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    return tmp_path


@pytest.fixture
def expected(source: Path, server: HubServer, tmp_path: Path) -> dict[str, bytes]:
    """The files of the build that is made of the model on the disk, as one that was pulled."""
    snapshot = tmp_path / "snapshots" / server.repos[MODEL].refs["main"]
    shutil.copytree(source, snapshot)
    job = open_job(MODEL, snapshot, recipe())
    job.build(
        tmp_path / "expected", None, check=False, replace=False, resume=False, on_progress=lambda *_: None
    )
    return contents(tmp_path / "expected")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def pull(place: Path, patience: Patience = QUICK) -> Path:
    report = pulling.pull_quantized(
        MODEL,
        place / "build",
        recipe(),
        token=None,
        patience=patience,
        on_progress=lambda done, total: None,
        on_note=lambda _: None,
    )
    return report.path


def without_room_for_a_shard(monkeypatch: pytest.MonkeyPatch, room_bytes: int) -> None:
    """The disk has so much room beside what is there."""
    monkeypatch.setattr(pulling, "free_bytes", lambda _: room_bytes)


def streamed_room(expected: dict[str, bytes]) -> int:
    return sum(map(len, expected.values())) + 30_000


@pytest.mark.parametrize("streams", [False, True])
def test_it_is_the_build_of_the_model_byte_for_byte_and_nothing_else_stays(
    server: HubServer, place: Path, expected: dict[str, bytes], streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streams:
        without_room_for_a_shard(monkeypatch, streamed_room(expected))
    for number in range(1, N_SHARDS + 1):
        name = f"model-{number:05}-of-{N_SHARDS:05}.safetensors"
        server.faults[server.file(MODEL, name).digest] = Fault("cut", after=9_000, times=2)
    assert contents(pull(place)) == expected
    assert not [path.name for path in place.glob("build*") if path.name != "build"]
    assert not list((place / "hf").rglob("*.safetensors"))


@pytest.mark.parametrize("streams", [False, True])
def test_what_is_done_when_the_network_ends_is_kept_and_the_rest_follows(
    server: HubServer, place: Path, expected: dict[str, bytes], streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streams:
        without_room_for_a_shard(monkeypatch, streamed_room(expected))
    last = server.file(MODEL, f"model-{N_SHARDS:05}-of-{N_SHARDS:05}.safetensors")
    server.faults[last.digest] = Fault("status", 503, skip=1)  # its header comes
    with pytest.raises(NetworkError, match="trouble answering") as caught:
        pull(place)
    assert "the same command goes on with it" in (caught.value.hint or "")
    assert partial_of(place / "build").is_dir()
    server.faults.clear()
    before = server.sent_bytes
    assert contents(pull(place)) == expected
    headers = N_SHARDS * (64 << 10)
    assert server.sent_bytes - before <= last.size_bytes + headers


@pytest.mark.parametrize("streams", [False, True])
def test_a_shard_that_is_damaged_comes_once_more_and_then_is_named(
    server: HubServer, place: Path, expected: dict[str, bytes], streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streams:
        without_room_for_a_shard(monkeypatch, streamed_room(expected))
    name = f"model-00002-of-{N_SHARDS:05}.safetensors"
    server.faults[server.file(MODEL, name).digest] = Fault("corrupt", skip=1)
    with pytest.raises(IntegrityError, match=name):
        pull(place)
    server.faults[server.file(MODEL, name).digest] = Fault("corrupt", skip=1, times=1)
    assert contents(pull(place)) == expected


def test_a_disk_without_room_for_the_build_is_said_before_any_weight_comes(
    server: HubServer, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_room_for_a_shard(monkeypatch, 10_000)
    with pytest.raises(DiskError, match=r"the build takes .* has .* free"):
        pull(place)


def test_a_disk_that_fills_up_under_way_names_the_flag_that_moves_the_build(
    server: HubServer, place: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = server.file(MODEL, f"model-{N_SHARDS:05}-of-{N_SHARDS:05}.safetensors")

    def free_bytes(directory: Path) -> int:
        return 0 if any(directory.glob(f"model-{N_SHARDS:05}*")) else 10**12  # the last one's part file

    with monkeypatch.context() as full:
        full.setattr(transfer, "free_bytes", free_bytes)
        with pytest.raises(DiskError, match="filling up") as caught:
            pull(place)
    hint = caught.value.hint or ""
    assert "-o" in hint and "HF_HOME" not in hint and "the same command goes on with it" in hint
    before = server.sent_bytes
    assert contents(pull(place)) == expected
    assert server.sent_bytes - before <= last.size_bytes + N_SHARDS * (64 << 10)


def test_two_at_once_do_not_fetch_into_one_place(
    server: HubServer, place: Path, expected: dict[str, bytes]
) -> None:
    spool = place / "build.spool.partial"
    spool.mkdir()
    other = os.open(spool, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match=r"another process is making .*build"):
        pull(place)
    assert not list(spool.iterdir())
    os.close(other)
    assert contents(pull(place)) == expected


def test_a_place_that_cannot_be_written_names_the_flag_that_moves_the_build(
    server: HubServer, place: Path
) -> None:
    (place / "file").touch()
    with pytest.raises(DiskError, match="file") as caught:
        pull(place / "file")
    assert "-o" in (caught.value.hint or "") and "HF_HOME" not in (caught.value.hint or "")


def test_the_command_prints_the_builds_name_and_refuses_to_replace_one(
    server: HubServer, tmp_path: Path
) -> None:
    variables = online(tmp_path, server)
    done = mistral("pull", MODEL, "--quantize", "8", home=tmp_path, **variables)
    assert (done.returncode, done.stdout) == (0, "tiny-model-int8\n"), done.stderr
    assert "not checked (the source is not kept)" in done.stderr
    assert mistral("verify", "tiny-model-int8", home=tmp_path).returncode == 0
    refused = mistral("pull", MODEL, "--quantize", "3", home=tmp_path, **variables)
    assert_one_sentence(refused, 2, "--quantize 3 is no number of bits", "choose 4 or 8")
    again = mistral("pull", MODEL, "--quantize", "8", home=tmp_path, **variables)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_a_tensor_that_streams_is_what_is_stored(server: HubServer, place: Path, source: Path) -> None:
    from mistralcli.hub import Fetching, look_up
    from mistralcli.hub_cache import parse_hub_model
    from mistralcli.remote_source import Stream, read_shard

    hub_source, listing = look_up(parse_hub_model(MODEL))
    fetching = Fetching(hub_source, QUICK, lambda _: None)
    file = next(file for file in listing if file.name.startswith("model-00001"))
    shard, stream = read_shard(fetching, file), Stream(fetching, lambda _: None)
    stored = load_file(source / file.name)
    assert set(shard.specs) == set(stored)
    for name in shard.specs:
        assert torch.equal(stream.read(shard, name), stored[name])
