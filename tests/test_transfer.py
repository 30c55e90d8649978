"""Downloads through a network that fails in every way we know, and through kill -9: always the same bytes in the end.

What is fetched twice is counted at the server: bytes that its kernel took, less those of the files, over those of the
files. Faults and kills get a repository of 300 MB, what else is looked at here one of 40 MB.
"""

import math
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hub_models import online, write_checkpoint
from hub_server import Fault, HubServer
from huggingface_hub import constants, hf_hub_download
from hypothesis import given, settings
from hypothesis import strategies as st
from program import MISTRAL, assert_one_sentence, environment, mistral

from mistralcli import hub, transfer
from mistralcli.errors import DiskError, IntegrityError, MistralError, NetworkError
from mistralcli.fresh_blocks import BLOCK_BYTES, Block, FreshBlocks
from mistralcli.hub_body import Body
from mistralcli.hub_cache import HubModel
from mistralcli.hub_errors import HubRequest
from mistralcli.hub_files import RemoteFile
from mistralcli.hub_http import Patience, Remote
from mistralcli.part_file import PartFile, piece_size

MODEL = "mistralai/tiny"
LARGE, SMALL = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
SIZES = {LARGE: 26_000_000, "model-00002-of-00003.safetensors": 12_000_000, SMALL: 1_500_000}
QUICK = Patience(timeout_s=0.5, retries=4, first_wait_s=0.01, longest_wait_s=0.05)
MOST_TWICE = 0.05


def write_repository(directory: Path, scale: float = 1.0) -> Path:
    """A repository whose shards are random bytes: no byte can be taken for another's."""
    write_checkpoint(directory, n_shards=3)
    rng = np.random.default_rng(0)
    for name, size_bytes in SIZES.items():
        (directory / name).write_bytes(rng.bytes(int(size_bytes * scale)))
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("source"))


@pytest.fixture
def server(source: Path) -> Iterator[HubServer]:
    with HubServer({MODEL: source}) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process pulls from `server`; gives the directory of the repository in the cache."""
    use(server, tmp_path / "hf", monkeypatch)
    return tmp_path / "hf" / "hub" / "models--mistralai--tiny"


def use(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process pull from `server` into a cache below `home`."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A directory in memory where there is room in it, for what is written and removed again and again."""
    shm = Path("/dev/shm")
    has_room = shm.is_dir() and shutil.disk_usage(shm).free > 2e9
    with tempfile.TemporaryDirectory(dir=shm if has_room else None) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def large_source(memory: Path) -> Path:
    return write_repository(memory / "source", scale=300 / 40)


@pytest.fixture(scope="module")
def large_server(large_source: Path) -> Iterator[HubServer]:
    with HubServer({MODEL: large_source}) as running:
        yield running


@pytest.fixture
def server_of_300_mb(
    large_server: HubServer, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    """This process pulls 300 MB from the server, into a cache that is in memory and then removed."""
    large_server.faults.clear()
    large_server.sent_bytes = 0
    use(large_server, memory / "hf", monkeypatch)
    yield large_server
    shutil.rmtree(memory / "hf")


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def assert_same(directory: Path, source: Path) -> None:
    """Every file is there byte for byte, and nothing unfinished is."""
    assert {path.name for path in directory.iterdir()} == {path.name for path in source.iterdir()}
    for path in source.iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(directory.parent.parent.glob("blobs/*mistral-part*"))


def twice(server: HubServer, source: Path) -> float:
    """The share of bytes that were fetched twice."""
    return server.sent_bytes / size_of(source) - 1


FAULTS = {
    "cut": Fault("cut", after=3_000_000, times=3),
    "cut again and again": Fault("cut", after=6_000_000),
    "truncated": Fault("truncate", times=4),
    "short": Fault("short", times=4),
    "stalled": Fault("stall", after=900_000, times=2),
    "drip": Fault("drip", after=900_000, times=2),
    "ranges ignored at first": Fault("whole", times=1),
    "ranges ignored in between": Fault("whole", skip=1, times=2),
    "ranges always ignored": Fault("whole"),
    "wrong range": Fault("range", skip=1, times=3),
    "another ETag": Fault("etag", skip=1, times=2),
    "login page": Fault("html", skip=1, times=2),
    "redirect expired": Fault("expire", skip=1, times=2),
    "host gone": Fault("vanish", skip=1, times=1),
    "503": Fault("status", 503, skip=1, times=3),
    "429": Fault("status", 429, {"Retry-After": "0"}, skip=1, times=3),
    "410": Fault("status", 410, skip=1, times=3),
}


@pytest.mark.parametrize("enough_bytes_per_s", [math.inf, 0], ids=["four connections", "one"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_at_most_a_twentieth_and_no_byte(
    server_of_300_mb: HubServer,
    large_source: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    enough_bytes_per_s: float,
) -> None:
    fault, server = FAULTS[name], server_of_300_mb
    monkeypatch.setattr(transfer, "_ENOUGH_BYTES_PER_S", enough_bytes_per_s)
    monkeypatch.setattr(transfer, "_TRIAL_S", 0)
    server.faults[server.file(MODEL, LARGE).digest] = Fault(**vars(fault))
    directory = hub.pull(MODEL, patience=QUICK)
    assert_same(directory, large_source)
    assert 0 <= twice(server, large_source) <= MOST_TWICE
    assert server.faults[server.file(MODEL, LARGE).digest].times < fault.times


@pytest.mark.parametrize("name", [SMALL, "tokenizer_config.json"])
def test_a_damaged_byte_makes_the_file_come_again_and_no_other(
    server_of_300_mb: HubServer, large_source: Path, name: str
) -> None:
    file = server_of_300_mb.file(MODEL, name)
    server_of_300_mb.faults[file.digest if file.is_lfs else f"/{name}"] = Fault("corrupt", times=1)
    assert_same(hub.pull(MODEL, patience=QUICK), large_source)
    assert file.size_bytes / size_of(large_source) <= twice(server_of_300_mb, large_source) <= MOST_TWICE


def test_a_file_that_stays_damaged_is_named_and_all_others_are_kept(
    server: HubServer, cache: Path, source: Path
) -> None:
    server.faults[server.file(MODEL, SMALL).digest] = Fault("corrupt")
    with pytest.raises(IntegrityError, match=SMALL):
        hub.pull(MODEL, patience=QUICK)
    kept = {path.resolve().name for path in cache.glob("snapshots/*/*")}
    assert kept == {path.name for path in cache.glob("blobs/*")}
    assert len(kept) == len(list(source.iterdir())) - 1
    server.faults.clear()
    assert_same(hub.pull(MODEL, patience=QUICK), source)


def test_when_patience_is_over_the_error_says_what_is_kept_and_the_next_pull_goes_on(
    server: HubServer, cache: Path, source: Path
) -> None:
    digest = server.file(MODEL, LARGE).digest
    server.faults[digest] = Fault("cut", after=4_000_000, times=2)
    server.faults[f"/{digest}"] = Fault("status", 503)  # all that comes after those two
    with pytest.raises(NetworkError, match="has trouble answering") as caught:
        hub.pull(MODEL, patience=QUICK)
    assert caught.value.hint is not None
    assert f"of 26.0 MB of {LARGE} are kept: pulling again goes on from there" in caught.value.hint
    server.faults.clear()
    assert_same(hub.pull(MODEL, patience=QUICK), source)
    assert twice(server, source) <= MOST_TWICE


def test_retry_after_is_waited_for(server: HubServer, cache: Path, source: Path) -> None:
    fault = Fault("status", 429, {"Retry-After": "1"}, times=1)
    server.faults[server.file(MODEL, SMALL).digest] = fault
    started = time.monotonic()
    assert_same(hub.pull(MODEL, patience=QUICK), source)
    assert time.monotonic() - started >= 1


def test_a_wait_that_is_too_long_is_not_begun(server: HubServer, cache: Path) -> None:
    server.faults[server.file(MODEL, SMALL).digest] = Fault("status", 429, {"Retry-After": "86400"})
    with pytest.raises(NetworkError, match="limits how often") as caught:
        hub.pull(MODEL, patience=QUICK)
    assert "86400 seconds" in (caught.value.hint or "")


def test_the_listing_is_asked_for_again_when_the_hub_has_trouble(
    server: HubServer, cache: Path, source: Path
) -> None:
    server.faults["/api/models/"] = Fault("status", 503, times=2)
    notes: list[str] = []
    assert_same(hub.pull(MODEL, patience=QUICK, on_note=notes.append), source)
    assert len(notes) == 2 and "trying again" in notes[0]


def test_waits_grow_and_never_undercut_what_the_server_asks() -> None:
    patience = Patience(first_wait_s=1, longest_wait_s=10)
    for failures, longest_s in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (50, 10)):
        waits = [patience.wait_s(failures, None) for _ in range(50)]
        assert longest_s / 2 <= min(waits) < max(waits) <= longest_s
    assert patience.wait_s(1, 30.0) == 30


# Killed


def pull_process(home: Path, server: HubServer) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*MISTRAL, "pull", MODEL],
        env=environment(home, **online(home, server)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(1200)  # it starts the program 21 times
def test_twenty_kills_cost_at_most_a_twentieth_and_no_byte(tmp_path: Path) -> None:
    """The server sends 50 MB/s: what it sent and the pull did not receive yet is lost by a kill, and counts."""
    source = write_repository(tmp_path / "source", scale=300 / 40)
    rng = random.Random(0)
    with HubServer({MODEL: source}) as server:
        server.bytes_per_s = 50e6
        for n_bytes in sorted(rng.sample(range(size_of(source)), 20)):
            process = pull_process(tmp_path, server)
            server.wait_until_sent(n_bytes)
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.communicate()
        process = pull_process(tmp_path, server)
        printed, said = process.communicate()
        assert (process.returncode, said) == (0, "")
        assert_same(Path(printed.strip()), source)
        assert 0 <= twice(server, source) <= MOST_TWICE


def test_two_pulls_at_once_fetch_every_file_once(server: HubServer, source: Path, tmp_path: Path) -> None:
    server.bytes_per_s = 1e5
    first = pull_process(tmp_path, server)
    server.wait_until_sent(200_000)
    second = pull_process(tmp_path, server)
    line = second.stderr.readline() if second.stderr else ""
    assert line == f"another program is fetching {LARGE}: waiting for it\n"
    server.bytes_per_s = None
    results = [process.communicate() for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert_same(Path(results[0][0].strip()), source)
    assert server.sent_bytes < size_of(source) + 10_000  # the configuration is looked at before


# The part file


CONTENT = np.random.default_rng(1).bytes(9_000_001)


def content_of(path: Path) -> bytes:
    return path.with_name("file").read_bytes()


def whole(part: PartFile) -> bool:
    return part.frontier == part.received_bytes == len(CONTENT) and not part.missing()


@settings(max_examples=30, deadline=None)
@given(writes=st.lists(st.tuples(st.integers(0, len(CONTENT)), st.integers(0, 2_000_000)), max_size=30))
def test_whatever_is_written_where_only_right_bytes_count(
    writes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("part") / "file.part"
    part = PartFile(path, len(CONTENT))
    for offset, n_bytes in writes:
        part.write(offset, CONTENT[offset : offset + n_bytes])
    again = PartFile(path, len(CONTENT))
    assert (again.received_bytes, again.missing()) == (part.received_bytes, part.missing())
    for index in range(len(CONTENT) // piece_size(len(CONTENT)) + 1):
        start, end = index * again.piece_bytes, again.gap(index)[0]
        assert path.read_bytes()[start:end] == CONTENT[start:end]
    again.write(0, CONTENT)
    assert whole(again)
    again.move_to(path.with_name("file"))
    assert content_of(path) == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_after_a_power_cut_only_what_was_flushed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = PartFile(tmp_path / "part", len(CONTENT))
    part.write(0, CONTENT[:3_000_000])
    part.flush()
    part.write(3_000_000, CONTENT[3_000_000:5_000_000])
    assert PartFile(tmp_path / "part", len(CONTENT)).received_bytes == 5_000_000
    monkeypatch.setattr("mistralcli.part_file.boot_id", lambda: "after the cut")
    assert PartFile(tmp_path / "part", len(CONTENT)).received_bytes == 3_000_000
    assert PartFile(tmp_path / "part", len(CONTENT)).received_bytes == 3_000_000


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:300],
        lambda data: b"{" + data,
        lambda data: data[:-8] + b"\xff" * 8,
        lambda data: data.replace(b'"size": 9000001', b'"size": 9000002'),
        lambda data: data[:-16],
    ],
)
def test_a_journal_that_is_none_starts_the_file_over(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistralcli.part_file.boot_id", lambda: "always the same")
    part = PartFile(tmp_path / "part", len(CONTENT))
    part.write(0, CONTENT)
    part.flush()
    journal = tmp_path / "part.journal"
    journal.write_bytes(damage(journal.read_bytes()))
    assert PartFile(tmp_path / "part", len(CONTENT)).received_bytes == 0


def test_a_part_that_was_damaged_on_the_disk_is_found_out_and_fetched_again(
    server: HubServer, cache: Path, source: Path
) -> None:
    digest = server.file(MODEL, LARGE).digest
    server.faults[f"/{digest}"] = Fault("status", 503, skip=1)  # after its first piece
    with pytest.raises(NetworkError):
        hub.pull(MODEL, patience=QUICK)
    server.faults.clear()
    with (cache / "blobs" / f"{digest}.mistral-part").open("r+b") as part:
        part.write(b"damaged")
    assert_same(hub.pull(MODEL, patience=QUICK), source)


def test_a_block_in_memory_speaks_for_the_disk_only_where_all_of_it_was_written(
    tmp_path: Path, server: HubServer
) -> None:
    part = PartFile(tmp_path / "file.mistral-part", len(CONTENT))
    part.write(0, CONTENT[: BLOCK_BYTES + 1])
    request = HubRequest(HubModel(MODEL), server.url, None)
    remote = Remote(request, False, "0" * 40, RemoteFile("file", len(CONTENT), "0" * 64), 1.0)
    moving = transfer._Transfer(remote, part, QUICK, lambda _: None, lambda _: None)
    for start in range(0, 4 * BLOCK_BYTES, BLOCK_BYTES):
        body = Comes(start, len(CONTENT))
        assert moving._take_block(body, start) == start + BLOCK_BYTES
    assert [moving._fresh.has(i * BLOCK_BYTES) for i in range(4)] == [False, False, True, True]


class Comes(Body):
    """A body of CONTENT's bytes, of which 100,000 at a time are here."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def read_into(self, buffer: memoryview) -> int:
        piece = CONTENT[self.start : self.start + min(len(buffer), 100_000)]
        buffer[: len(piece)] = piece
        self.start += len(piece)
        return len(piece)


def test_blocks_are_kept_for_the_hash_as_far_as_they_are_close_ahead_of_it() -> None:
    fresh, far = FreshBlocks(), 64 * BLOCK_BYTES
    blocks = {start: Block(fresh.buffer(), BLOCK_BYTES) for start in (0, BLOCK_BYTES, 3 * BLOCK_BYTES, far)}
    for start in (3 * BLOCK_BYTES, far, BLOCK_BYTES, 0):
        fresh.give(start, blocks[start])
    assert fresh.buffer() is blocks[far].buffer  # not kept, so filled again
    assert fresh.take(0, far) == (blocks[0], BLOCK_BYTES)
    assert fresh.take(BLOCK_BYTES, far) == (blocks[BLOCK_BYTES], 2 * BLOCK_BYTES)
    assert fresh.take(2 * BLOCK_BYTES, far) == (None, 3 * BLOCK_BYTES)  # as far as none is
    fresh.give(2 * BLOCK_BYTES, blocks[0])  # the hash is past it
    assert not fresh.has(2 * BLOCK_BYTES) and fresh.has(3 * BLOCK_BYTES)
    assert fresh.take(3 * BLOCK_BYTES, far) == (blocks[3 * BLOCK_BYTES], 4 * BLOCK_BYTES)
    assert fresh.take(4 * BLOCK_BYTES, far) == (None, far)


# The disk, and other tools


def test_a_disk_that_fills_up_under_way_is_an_error_that_loses_nothing(
    server: HubServer, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "free_bytes", lambda _: 10**12 if server.sent_bytes < 5e6 else 1_000_000)
    with pytest.raises(DiskError, match="filling up") as caught:
        hub.pull(MODEL, patience=QUICK)
    assert "are kept: pulling again goes on from there" in (caught.value.hint or "")
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(cache.parent.parent))
    assert_same(hub.pull(MODEL, patience=QUICK), source)
    assert twice(server, source) <= MOST_TWICE


def test_what_huggingface_hub_left_is_used(server: HubServer, cache: Path, source: Path) -> None:
    (cache / "blobs").mkdir(parents=True)
    hf_hub_download(MODEL, LARGE, cache_dir=cache.parent, endpoint=server.url)
    before = server.sent_bytes
    assert_same(hub.pull(MODEL, patience=QUICK), source)
    assert server.sent_bytes - before < size_of(source) - SIZES[LARGE] + 10_000


def test_without_links_files_are_where_huggingface_hub_looks_for_them(
    server: HubServer, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    directory = hub.pull(MODEL, patience=QUICK)
    assert_same(directory, source)
    assert not any(path.is_symlink() for path in directory.iterdir())
    found = hf_hub_download(MODEL, LARGE, cache_dir=cache.parent, local_files_only=True)
    assert Path(found) == directory / LARGE
    assert not list((cache / "blobs").iterdir())
    sent = server.sent_bytes
    assert hub.pull(MODEL, patience=QUICK) == directory
    assert server.sent_bytes - sent < 1000


def test_a_part_file_is_nothing_to_huggingface_hub(server: HubServer, cache: Path, source: Path) -> None:
    server.faults[server.file(MODEL, LARGE).digest] = Fault("status", 503, skip=1)
    with pytest.raises(MistralError):
        hub.pull(MODEL, patience=QUICK)
    assert len(list(cache.glob("blobs/*.mistral-part*"))) == 2
    assert not huggingface_hub.scan_cache_dir(cache.parent).warnings


def test_flags_bound_the_patience_and_offline_asks_nobody(
    server: HubServer, source: Path, tmp_path: Path
) -> None:
    server.faults["/resolve/"] = Fault("stall")
    variables = online(tmp_path, server)
    failed = mistral("pull", MODEL, "--timeout", "0.3", "--retries", "1", home=tmp_path, **variables)
    assert_one_sentence(failed, 5, "did not answer in time")
    server.faults.clear()
    done = mistral("pull", MODEL, home=tmp_path, MISTRAL_CLI_TIMEOUT="5", **variables)
    server.requests.clear()
    offline = mistral("pull", MODEL, "--offline", home=tmp_path, **variables)
    assert (offline.returncode, offline.stdout) == (done.returncode, done.stdout) == (0, done.stdout)
    assert not server.requests
