"""How much memory a process may take: control groups of both versions, and what running out of it looks like."""

import subprocess
import sys
from pathlib import Path

import torch
from models import tiny_instruct_checkpoint
from program import environment

from mistralcli.config import read_config
from mistralcli.device import cgroup_rooms_bytes
from mistralcli.plan import Demand, plan_memory


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def test_the_tightest_limit_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    group(tmp_path, memory__stat="file 7\nshmem 0")  # the root has no limit
    group(tmp_path / "user", memory__max="1000", memory__current="900", memory__stat="file 300\nshmem 100")
    group(tmp_path / "user" / "a", memory__max="max", memory__current="5", memory__stat="file 0")
    group(tmp_path / "user" / "a" / "b", memory__max="400", memory__current="50", memory__stat="anon 1")
    assert cgroup_rooms_bytes("0::/user/a/b\n", tmp_path) == [350, 300]
    assert cgroup_rooms_bytes("0::/user/a\n", tmp_path) == [300]
    assert cgroup_rooms_bytes("0::/\n", tmp_path) == []
    assert cgroup_rooms_bytes("", tmp_path) == []


def test_version_1_keeps_memory_in_a_folder_of_its_own_and_may_show_a_path_from_outside(
    tmp_path: Path,
) -> None:
    group(
        tmp_path / "memory",
        memory__limit_in_bytes="1000",
        memory__usage_in_bytes="800",
        memory__stat="cache 1\ntotal_cache 300\ntotal_shmem 100",
    )
    listing = "3:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n1:name=systemd:/\n0::/docker/abc\n"
    assert cgroup_rooms_bytes(listing, tmp_path) == [400]


def test_a_chunk_longer_than_the_context_plans_no_more_than_the_context(tmp_path: Path) -> None:
    tiny_instruct_checkpoint(tmp_path)
    config = read_config(tmp_path)
    plans = [plan_memory(config, Demand(0, torch.float32, chunk), 512, 1 << 40) for chunk in (512, 2_000_000)]
    assert plans[0] == plans[1]


LOAD_WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from mistralcli.errors import NotEnoughMemoryError
from mistralcli.run_options import SessionOptions
from mistralcli.session import open_session

options, directory = SessionOptions(ctx=64, device="cpu"), Path(sys.argv[1])
open_session(directory, options)  # imports what it imports
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    open_session(directory, options)
except NotEnoughMemoryError as error:
    print(error.message)
"""


def test_memory_that_runs_out_while_loading_says_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Of 8 MB the file takes 6.5 where it is mapped, for its headers or for its tensors; the head wants more."""
    command = [sys.executable, "-c", LOAD_WITH_LITTLE_MEMORY, str(tiny_model_dir), "8000000"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path))
    assert f"memory ran out while loading {tiny_model_dir}" in done.stdout, done.stderr
