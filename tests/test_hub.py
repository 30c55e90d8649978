"""`mistral pull` against a real server on loopback, through the real huggingface_hub."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_models import PARAMS, online, write_checkpoint, write_weights
from hub_server import TOKEN, Fault, HubServer
from huggingface_hub import constants, hf_hub_download, snapshot_download
from program import MISTRAL, environment, mistral

from mistralcli import hub, hub_cache
from mistralcli.errors import DiskError, IntegrityError, MistralError, NetworkError

MODEL = "mistralai/tiny"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def here(tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process pulls from `server`; gives the cache's directory."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    return tmp_path / "hf" / "hub"


def blobs(cache: Path) -> list[Path]:
    return sorted(cache.glob("models--*/blobs/*"))


# A pull that works


def test_what_was_pulled_opens_with_huggingface_hub_offline(
    server: HubServer, here: Path, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", n_shards=3)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    commit = server.add(MODEL, source)

    directory = hub.pull(MODEL)

    assert directory == here / "models--mistralai--tiny" / "snapshots" / commit
    names = {path.name for path in source.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in directory.iterdir()} == names
    for name in names:
        found = hf_hub_download(MODEL, name, cache_dir=here, local_files_only=True)
        assert Path(found) == directory / name
        assert Path(found).read_bytes() == (source / name).read_bytes()
    assert snapshot_download(MODEL, cache_dir=here, local_files_only=True) == str(directory)
    assert not huggingface_hub.scan_cache_dir(here).warnings


def test_mistral_s_own_layout_is_pulled(server: HubServer, here: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "params.json").write_text(json.dumps(PARAMS))
    (source / "tekken.json").write_text("{}")
    write_weights(source / "consolidated.safetensors")
    server.add(MODEL, source)
    assert {path.name for path in hub.pull(MODEL).iterdir()} == {path.name for path in source.iterdir()}


def test_a_second_pull_fetches_no_file_again(server: HubServer, here: Path, tmp_path: Path) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    first = hub.pull(MODEL)
    server.requests.clear()
    assert hub.pull(MODEL) == first
    assert server.paths("GET") == [f"/api/models/{MODEL}"]


def test_a_file_that_is_cached_but_damaged_is_fetched_again(
    server: HubServer, here: Path, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source")
    server.add(MODEL, source)
    weights = hub.pull(MODEL) / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.resolve().write_bytes(damaged)

    hub.pull(MODEL)

    assert weights.read_bytes() == (source / "model.safetensors").read_bytes()


def test_progress_rises_to_the_size_of_all_files(server: HubServer, here: Path, tmp_path: Path) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source", n_shards=2))
    reports: list[tuple[int, int]] = []
    directory = hub.pull(MODEL, on_progress=lambda done, total: reports.append((done, total)))
    size_bytes = sum(path.stat().st_size for path in directory.iterdir())
    assert {total for _, total in reports} == {size_bytes}
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert reports[-1][0] == size_bytes


def test_revisions_share_what_they_have_in_common(server: HubServer, here: Path, tmp_path: Path) -> None:
    old = server.add(MODEL, write_checkpoint(tmp_path / "old", seed=1), ref="v1.0")
    new = server.add(MODEL, write_checkpoint(tmp_path / "new", seed=2))

    assert hub.pull(f"{MODEL}@v1.0").name == old
    assert hub.pull(MODEL).name == new
    assert hub.pull(MODEL, revision=old).name == old

    assert hub_cache.refs(MODEL) == {"main": new, "v1.0": old}
    assert len(blobs(here)) == 6  # config, two of the tokenizer, licence; and two files of weights


def test_the_token_goes_to_the_hub_and_never_to_where_it_redirects(
    server: HubServer, here: Path, tmp_path: Path
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"), access="private")
    hub.pull(MODEL, token=TOKEN)
    seen = {(request.host, request.authorization) for request in server.requests}
    assert seen == {("hub", f"Bearer {TOKEN}"), ("cdn", None)}


def test_offline_a_pulled_model_is_still_there(server: HubServer, tmp_path: Path) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    variables = online(tmp_path, server)
    first = mistral("pull", MODEL, home=tmp_path, **variables)
    server.requests.clear()
    second = mistral("pull", MODEL, home=tmp_path, **variables | {"HF_HUB_OFFLINE": "1"})
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert not server.requests


def test_only_the_path_is_printed_into_pipes(server: HubServer, tmp_path: Path) -> None:
    commit = server.add(MODEL, write_checkpoint(tmp_path / "source"))
    done = mistral("pull", MODEL, home=tmp_path, **online(tmp_path, server))
    expected = tmp_path / "hf" / "hub" / "models--mistralai--tiny" / "snapshots" / commit
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected}\n", "")


def test_a_terminal_sees_our_progress_bar_and_the_pipe_beside_it_only_the_path(
    server: HubServer, tmp_path: Path
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [*MISTRAL, "pull", MODEL],
        env=environment(tmp_path, **online(tmp_path, server)),
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        printed, shown = process.stdout.read(), read_all(ours)
    assert process.returncode == 0
    assert printed.startswith(b"/") and b"\x1b" not in printed
    assert f"pulling {MODEL}" in shown and "100%" not in shown and "Fetching" not in shown


def read_all(terminal: int) -> str:
    """What was written to a pseudo-terminal whose other end is closed."""
    text = b""
    try:
        while piece := os.read(terminal, 4096):
            text += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    return text.decode()


# A pull that must not succeed


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_a_damaged_download_is_named_and_removed_so_that_the_next_pull_is_whole(
    server: HubServer, here: Path, tmp_path: Path, name: str
) -> None:
    source = write_checkpoint(tmp_path / "source")
    server.add(MODEL, source)
    file = server.file(MODEL, name)
    part = file.digest if file.is_lfs else f"/{name}"
    server.faults[part] = Fault("corrupt")

    with pytest.raises(IntegrityError, match=name):
        hub.pull(MODEL)
    assert not list((here / "models--mistralai--tiny" / "blobs").glob(f"{file.digest}*"))
    assert hub_cache.refs(MODEL) == {}
    assert not huggingface_hub.scan_cache_dir(here).warnings

    server.faults.clear()
    assert (hub.pull(MODEL) / name).read_bytes() == (source / name).read_bytes()


def test_an_index_that_names_a_shard_the_hub_does_not_list_is_incomplete(
    server: HubServer, here: Path, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", n_shards=2)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = "model-extra.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    server.add(MODEL, source)
    with pytest.raises(IntegrityError, match=r"model-extra\.safetensors"):
        hub.pull(MODEL)
    assert hub_cache.refs(MODEL) == {}


def test_a_branch_that_moves_under_way_changes_nothing_of_the_pull(
    server: HubServer, here: Path, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source")
    commit = server.add(MODEL, source)
    newer = write_checkpoint(tmp_path / "newer", seed=1)
    directory = hub.pull(MODEL, on_progress=lambda *_: server.add(MODEL, newer))
    assert directory.name == commit != server.repos[MODEL].refs["main"]
    assert (directory / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert hub_cache.refs(MODEL) == {"main": commit}


def test_a_history_that_is_rewritten_under_way_makes_the_pull_start_over(
    server: HubServer, here: Path, tmp_path: Path
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    newer = write_checkpoint(tmp_path / "newer", seed=1)
    notes: list[str] = []

    def rewrite(*_: int) -> None:
        del server.repos[MODEL]
        server.add(MODEL, newer)

    directory = hub.pull(MODEL, on_progress=rewrite, on_note=notes.append)
    assert directory.name == server.repos[MODEL].refs["main"]
    assert (directory / "model.safetensors").read_bytes() == (newer / "model.safetensors").read_bytes()
    assert len(notes) == 1 and f"starting over with {directory.name[:12]}" in notes[0]


def test_a_history_that_is_gone_under_way_is_said_to_be(
    server: HubServer, here: Path, tmp_path: Path
) -> None:
    commit = server.add(MODEL, write_checkpoint(tmp_path / "source"))
    listed = dict(server.repos[MODEL].commits)

    def close(*_: int) -> None:
        server.faults["/resolve/"] = Fault("status", 404, {"X-Error-Code": "RevisionNotFound"})

    with pytest.raises(IntegrityError, match="the commit that it was at is gone"):
        hub.pull(MODEL, on_progress=close)
    assert server.repos[MODEL].commits == listed and hub_cache.refs(MODEL) == {}
    server.faults.clear()
    assert hub.pull(MODEL).name == commit


def test_what_a_snapshot_links_to_outside_the_cache_is_left_alone(
    server: HubServer, here: Path, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source")
    server.add(MODEL, source)
    snapshot = hub.pull(MODEL)
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"of the user")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(mine)
    assert hub.pull(MODEL) == snapshot
    assert mine.read_bytes() == b"of the user"
    assert (snapshot / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_space_is_asked_for_where_a_file_is_to_be_copied_and_not_where_it_is(
    server: HubServer, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = (write_checkpoint(tmp_path / "source") / "model.safetensors").stat().st_size
    server.add(MODEL, tmp_path / "source")
    with_links = hub.pull(MODEL)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    monkeypatch.setattr(hub, "free_bytes", lambda _: size_bytes - 1)
    assert hub.pull(MODEL) == with_links  # all is there
    (with_links / "model.safetensors").unlink()
    with pytest.raises(DiskError, match="needs"):
        hub.pull(MODEL)
    monkeypatch.setattr(hub, "free_bytes", lambda _: size_bytes)
    assert not (hub.pull(MODEL) / "model.safetensors").is_symlink()


def test_a_pull_that_finds_all_writes_nothing(server: HubServer, here: Path, tmp_path: Path) -> None:
    """So that it works from a disk that is read-only, where no lock is needed for what is whole."""
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    snapshot = hub.pull(MODEL)

    def written() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in [here, *here.rglob("*")]}

    before = written()
    assert hub.pull(MODEL) == snapshot
    assert written() == before


def test_half_a_copy_never_has_the_files_name(
    server: HubServer, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    snapshot = hub.pull(MODEL)
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)

    def fill_disk(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:1000])
        if target.is_relative_to(here):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", fill_disk)
    with pytest.raises(DiskError, match="full"):
        hub.pull(MODEL)
    assert not (snapshot / "model.safetensors").exists()


def test_a_model_of_another_kind_is_refused_by_name_before_its_weights_are_fetched(
    server: HubServer, here: Path, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    server.add(MODEL, source)
    with pytest.raises(MistralError, match="gpt_neox"):
        hub.pull(MODEL)
    assert not here.exists()
    assert not any(request.host == "cdn" for request in server.requests)


def test_too_little_disk_is_said_with_numbers_before_anything_is_fetched(
    server: HubServer, here: Path, tmp_path: Path
) -> None:
    commit = server.add(MODEL, write_checkpoint(tmp_path / "source"))
    huge = dataclasses.replace(server.file(MODEL, "model.safetensors"), size_bytes=10**17)
    server.repos[MODEL].commits[commit]["model.safetensors"] = huge
    with pytest.raises(DiskError, match=r"needs 100 PB, and .* has .*B free"):
        hub.pull(MODEL)
    assert not here.exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"rfilename": "x", "size": 1, "blobId": "../../../escaped"},
        {"rfilename": "x", "size": -1, "blobId": "0" * 40},
        {"rfilename": "x", "size": "big", "blobId": "0" * 40},
        {"rfilename": "x", "size": 1},
        {"size": 1, "blobId": "0" * 40},
        "x",
    ],
)
def test_a_listing_that_is_no_listing_is_not_the_hub(
    server: HubServer, here: Path, tmp_path: Path, entry: dict[str, object]
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    server.repos[MODEL].extra_entries.append(entry)
    with pytest.raises(NetworkError, match="not the Hub"):
        hub.pull(MODEL)
