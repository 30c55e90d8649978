"""`--threads` and `--exact` of run, chat and bench, and kernels that are there before the first prompt."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program import assert_one_sentence, environment, mistral

from mistralcli import session
from mistralcli.demo import demo_directory
from mistralcli.errors import UsageError
from mistralcli.run_options import SessionOptions
from mistralcli.session import open_session
from mistralcli.threads import cgroup_cpus, default_threads, n_cores, set_threads, usable_cpus
from quant.schemes.affine import AffineLinear

COMMANDS = {
    "run": ("run", "Hi", "-t", "0", "-n", "3"),
    "chat": ("chat", "-t", "0", "-n", "3"),
    "bench": ("bench", "-p", "5", "-d", "5", "-n", "2", "-r", "1", "--json"),
}
MODEL = ("-m", "demo", "--device", "cpu")


@pytest.mark.parametrize("command", COMMANDS)
def test_both_options_are_taken_by_each_command(command: str, tmp_path: Path) -> None:
    done = mistral(*COMMANDS[command], *MODEL, "--threads", "1", "--exact", home=tmp_path, stdin="Hi")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if command == "bench":
        assert json.loads(done.stdout)["device_name"].endswith(" 1 threads")


@pytest.mark.parametrize(
    ("command", "options", "facts"),
    [
        ("run", ("--threads", "0"), ("--threads 0", "at least 1")),
        ("run", ("--threads", "99999"), ("--threads 99999", f": {len(usable_cpus())}")),
        ("chat", ("--threads", "-3"), ("--threads -3", "at least 1")),
        ("bench", ("--exact", "--dtype", "bf16"), ("--exact", "float32", "bfloat16")),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    command: str, options: tuple[str, ...], facts: tuple[str, ...], tmp_path: Path
) -> None:
    done = mistral(*COMMANDS[command], *MODEL, *options, home=tmp_path, stdin="Hi")
    assert_one_sentence(done, 2, *facts)


def test_exactness_is_not_promised_where_a_gpu_rounds() -> None:
    with pytest.raises(UsageError, match="--exact is for the CPU"):
        session._require_exact(torch.device("cuda"), torch.float32)


def test_exact_leaves_weights_as_they_are_stored_and_activations_as_they_are() -> None:
    rounded, exact = (
        open_session(demo_directory(), SessionOptions(ctx=64, device="cpu", exact=one))
        for one in (False, True)
    )
    pairs = [
        (ours, theirs)
        for ours, theirs in zip(rounded.engine.model.modules(), exact.engine.model.modules(), strict=True)
        if isinstance(ours, AffineLinear) and isinstance(theirs, AffineLinear)
    ]
    assert pairs
    for ours, theirs in pairs:
        assert ours.interleaved is not None and theirs.interleaved is None
        x = torch.randn((2, ours.in_features), generator=torch.Generator().manual_seed(0))
        y = x.double() @ theirs.dense_rows(0, theirs.out_features).double().T
        assert float((theirs(x) - y).norm() / y.norm()) < 1e-6
        assert 1e-4 < float((ours(x) - y).norm() / y.norm()) < 0.02


THREADS = """
import os, sys
from pathlib import Path
import torch
from mistralcli.demo import demo_directory
from mistralcli.run_options import SessionOptions
from mistralcli.session import open_session

for asked in (None, 1, len(os.sched_getaffinity(0)), None):
    open_session(demo_directory(), SessionOptions(ctx=64, device="cpu", threads=asked))
    print(torch.get_num_threads())
"""


def threads_of_sessions(home: Path, omp: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        capture_output=True,
        text=True,
        env=environment(home, OMP_NUM_THREADS=omp),
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the affinity mask")
def test_a_session_computes_with_the_threads_that_were_asked_for_or_one_a_core(tmp_path: Path) -> None:
    most = len(usable_cpus())
    assert threads_of_sessions(tmp_path, "") == [default_threads(), 1, most, default_threads()]
    # What torch was told elsewhere is left alone.
    assert threads_of_sessions(tmp_path, "1") == [1, 1, most, most]


def test_threads_of_a_core_count_once(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(("0,4", "1,5", "2,6", "3", "0,4", "1,5", "2,6")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert n_cores(range(7), tmp_path) == 4
    assert n_cores({0, 4}, tmp_path) == 1
    assert n_cores({4, 5, 3}, tmp_path) == 3
    assert n_cores(range(7), tmp_path / "none") == 7


def test_the_quotas_of_control_groups_of_both_versions_are_read(tmp_path: Path) -> None:
    new, old = tmp_path / "user" / "a", tmp_path / "cpu" / "docker"
    for folder in (new, old):
        folder.mkdir(parents=True)
    (new / "cpu.max").write_text("max 100000\n")
    (new.parent / "cpu.max").write_text("150000 100000\n")
    (old / "cpu.cfs_quota_us").write_text("300000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    (old.parent / "cpu.cfs_quota_us").write_text("-1\n")
    (old.parent / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_cpus("0::/user/a\n", tmp_path) == [1.5]
    assert cgroup_cpus("2:cpu,cpuacct:/docker\n1:memory:/docker\n", tmp_path) == [3.0]
    assert cgroup_cpus("2:cpu:/elsewhere\n", tmp_path) == []
    assert cgroup_cpus("", tmp_path) == []


@pytest.mark.parametrize(("quotas", "expected"), [([], 6), ([2.5, 9.0], 2), ([0.5], 1)])
def test_the_default_is_a_thread_for_each_core_within_the_quota(
    quotas: list[float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistralcli.threads.n_cores", lambda cpus: 6)
    monkeypatch.setattr("mistralcli.threads.cgroup_cpus", lambda groups, root: quotas)
    assert default_threads() == expected


def test_a_refused_number_changes_nothing() -> None:
    before = torch.get_num_threads()
    for asked in (0, 1 << 20):
        with pytest.raises(UsageError):
            set_threads(asked)
    assert torch.get_num_threads() == before


KERNELS = """
import sys
from pathlib import Path
from quant.kernels.cpu import object_code
kept = Path(sys.argv[1])
object_code.places = lambda package: [kept]
from mistralcli import session
from mistralcli.demo import demo_directory
from mistralcli.run_options import SamplingParams, SessionOptions

session._COMPILING["cpu"] = (session._COMPILING["cpu"][0], 0.0)  # whatever this machine's speed
options = SessionOptions(ctx=64, device="cpu")
opened = session.open_session(demo_directory(), options, on_note=lambda note: print("note:", note, flush=True))
before = set(kept.rglob("*.o"))
assert "".join(opened.complete([1, 2, 3], SamplingParams(0), max_tokens=2))
print(len(before), len(set(kept.rglob("*.o")) - before), "numba" in sys.modules)
"""


def test_kernels_are_compiled_before_the_first_prompt_with_a_note(tmp_path: Path) -> None:
    counts = []
    for _ in ("compiled", "loaded"):
        done = subprocess.run(
            [sys.executable, "-c", KERNELS, str(tmp_path / "kernels")],
            capture_output=True,
            text=True,
            env=environment(tmp_path),
        )
        assert done.returncode == 0, done.stderr
        *notes, count = done.stdout.splitlines()
        assert sum(line.startswith("note: ") and "compiled once and kept" in line for line in notes) == 1
        counts.append(count.split())
    (n_first, *first), (n_second, *second) = counts
    assert int(n_first) > 2 and n_first == n_second
    assert (first, second) == (["0", "True"], ["0", "False"])
