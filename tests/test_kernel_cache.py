"""The CPU's compiled kernels on disk: found whole, made again where they are not, and found without numba."""

import ctypes
import inspect
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import pytest
from program import environment
from test_cpu_matmul import run_capped

from mistralcli.kernels.cpu import attention, dense, pointwise, sample
from mistralcli.kernels.cpu.floats import NUMBERS, is_known
from quant.kernels.cpu import isa, machine_code, matmul, object_code, pool, program
from quant.kernels.cpu.compiling import Compiled, bare, needed
from quant.kernels.cpu.object_code import Folder

NOWHERE = "/proc/nothing"
"""Where nobody can write, root included."""

PACKAGE = Path(pool.__file__).parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both places of compiled code are in it, and empty: "beside" the source, and "cache"."""
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "beside"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def objects(home: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(home.rglob("*.o"))}


def test_what_is_kept_is_found_under_the_same_circumstances_alone(home: Path) -> None:
    folder = Folder(PACKAGE, "this processor")
    assert not folder.is_there() and folder.read("a.o") is None
    folder.write("a.o", b"code")
    assert Folder(PACKAGE, "this processor").is_there()
    assert Folder(PACKAGE, "this processor").read("a.o") == b"code"
    assert not Folder(PACKAGE, "another one").is_there()
    assert Folder(PACKAGE, "another one").read("a.o") is None
    assert folder.read("b.o") is None
    assert [path.name for path in home.rglob("*") if path.is_file()] == ["a.o"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
)
def test_a_damaged_entry_is_none_and_is_replaced(home: Path, damage: Any) -> None:
    folder = Folder(PACKAGE, "")
    folder.write("a.o", b"some code")
    path = objects(home)["a.o"]
    path.write_bytes(damage(path.read_bytes()))
    assert folder.read("a.o") is None
    folder.write("a.o", b"some code")
    assert folder.read("a.o") == b"some code"


def test_an_entry_under_another_name_is_none(home: Path) -> None:
    folder = Folder(PACKAGE, "")
    folder.write("a.o", b"code")
    objects(home)["a.o"].rename(objects(home)["a.o"].with_name("b.o"))
    assert folder.read("b.o") is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_another_user_s_entry_is_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(PACKAGE, "")
    folder.write("a.o", b"code")
    if os.getuid() == 0:
        os.chown(objects(home)["a.o"], 12345, -1)
    else:
        own = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: own + 1)
    assert folder.read("a.o") is None


@pytest.mark.parametrize("beside", [NOWHERE, "a file"])
def test_where_the_package_cannot_be_written_it_is_kept_in_the_user_s_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    (home / "a file").touch()
    monkeypatch.setattr(sys, "pycache_prefix", str(home / beside))
    Folder(PACKAGE, "").write("a.o", b"code")
    assert objects(home / "cache" / "mistral" / "kernels").keys() == {"a.o"}
    assert Folder(PACKAGE, "").is_there() and Folder(PACKAGE, "").read("a.o") == b"code"


@pytest.mark.skipif(hasattr(os, "getuid") and os.getuid() == 0, reason="root may search everywhere")
def test_where_the_package_s_cache_may_not_be_searched_the_user_s_is(home: Path) -> None:
    Folder(PACKAGE, "").write("a.o", b"code")
    forbidden = objects(home)["a.o"].parent.parent
    forbidden.chmod(0)
    try:
        folder = Folder(PACKAGE, "")
        assert not folder.is_there() and folder.read("a.o") is None
        folder.write("a.o", b"code")
        assert objects(home / "cache").keys() == {"a.o"} and folder.read("a.o") == b"code"
    finally:
        forbidden.chmod(0o700)


def test_what_cannot_be_replaced_leaves_nothing_behind(home: Path) -> None:
    folder = Folder(PACKAGE, "")
    folder.write("a.o", b"code")
    path = objects(home)["a.o"]
    path.unlink()
    path.mkdir()
    (path / "file").touch()
    folder.write("a.o", b"code")
    (kept,) = (one for one in home.rglob("a.o") if one.is_file())
    assert kept.is_relative_to(home / "cache") and folder.read("a.o") == b"code"
    assert not list(home.rglob(".*"))


def test_folders_that_nobody_has_opened_for_long_go_when_another_is_made(home: Path) -> None:
    ages = {"old": 100, "used": 100, "young": 50}
    for name in ages:
        Folder(PACKAGE, name).write(f"{name}.o", b"code")
    for name, days in ages.items():
        moment = time.time() - days * 86400
        os.utime(objects(home)[f"{name}.o"].parent, (moment, moment))
    assert Folder(PACKAGE, "used").read("used.o") == b"code"
    Folder(PACKAGE, "new").write("new.o", b"code")
    assert objects(home).keys() == {"used.o", "young.o", "new.o"}


START = """
import hashlib, sys
from pathlib import Path
import torch
from quant.kernels.cpu import object_code
object_code.places = lambda package: [Path(sys.argv[1])]
from quant.kernels.cpu.layout import interleave
from quant.ops import interleaved_matmul

generator = torch.Generator().manual_seed(0)
codes = torch.randint(0, 256, (50, 96), dtype=torch.uint8, generator=generator)
weight = interleave(codes, torch.rand((50, 3), generator=generator), None, 192, bits=4)
y = interleaved_matmul(torch.rand((5, 192), generator=generator), weight)
print(hashlib.sha256(y.numpy().tobytes()).hexdigest(), "numba" in sys.modules)
"""
"""A product, which takes two kernels, in a process that keeps them in one place only."""


def start(place: str | Path, cap: str = "", first: Path | None = None) -> "subprocess.Popen[str]":
    env = environment(Path.home(), **{isa.CAP: cap})
    env["PYTHONPATH"] = os.pathsep.join(map(str, (*([first] if first else []), env["PYTHONPATH"])))
    command, pipe = [sys.executable, "-c", START, str(place)], subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def outcome(process: "subprocess.Popen[str]") -> tuple[str, bool]:
    """A digest of the product, and whether numba was imported; nothing was said."""
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    digest, with_numba = out.split()
    return digest, with_numba == "True"


def test_kernels_are_compiled_once_for_each_processor_and_then_need_no_numba(tmp_path: Path) -> None:
    """A cap stands for another processor: one without the better instructions."""
    first, other = [one.name for one in isa.available()][:2]
    digests = {}
    for n_kept, name in ((2, first), (4, other)):
        digests[name], with_numba = outcome(start(tmp_path, name))
        assert with_numba and sum(1 for _ in tmp_path.rglob("*.o")) == n_kept
    for name, digest in digests.items():
        assert outcome(start(tmp_path, name)) == (digest, False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A place with both kernels of the product, and its digest."""
    place = tmp_path_factory.mktemp("kept")
    digest, with_numba = outcome(start(place))
    assert with_numba
    return place, digest


def copied(place: Path, to: Path) -> Path:
    return Path(shutil.copytree(place, to / "kernels"))


def test_damaged_kernels_are_compiled_again(kept: tuple[Path, str], tmp_path: Path) -> None:
    place, digest = copied(kept[0], tmp_path), kept[1]
    whole = {path: path.read_bytes() for path in objects(place).values()}
    assert len(whole) == 2
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2])
    assert outcome(start(place)) == (digest, True)
    assert outcome(start(place)) == (digest, False)


def test_a_cache_that_cannot_be_written_is_done_without(kept: tuple[Path, str]) -> None:
    assert outcome(start(NOWHERE)) == (kept[1], True)


def test_processes_that_compile_at_once_do_not_disturb_each_other(
    kept: tuple[Path, str], tmp_path: Path
) -> None:
    for process in [start(tmp_path) for _ in range(2)]:
        assert outcome(process)[0] == kept[1]
    assert outcome(start(tmp_path)) == (kept[1], False)
    assert len(objects(tmp_path)) == 2 and not list(tmp_path.rglob(".*"))


def test_a_numba_that_cannot_be_imported_is_missed_only_where_nothing_is_kept(
    kept: tuple[Path, str], tmp_path: Path
) -> None:
    (tmp_path / "broken" / "numba").mkdir(parents=True)
    (tmp_path / "broken" / "numba" / "__init__.py").write_text("raise ImportError('NumPy is too new')")
    process = start(tmp_path, first=tmp_path / "broken")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "NumPy is too new" in err and len(err.splitlines()) == 1
    assert outcome(start(kept[0], first=tmp_path / "broken")) == (kept[1], False)


RUN = """
import sys
from pathlib import Path
from quant.kernels.cpu import object_code
from mistralcli.__main__ import main

object_code.places = lambda package, place=Path(sys.argv[1]): [place]
sys.argv[1:] = ["run", "-m", "demo", "--device", "cpu", "-n", "8", "--seed", "1", "Hi"]
try:
    main()
finally:
    print("numba" in sys.modules)
"""


def test_a_run_whose_kernels_are_kept_imports_no_numba_and_answers_alike(tmp_path: Path) -> None:
    answers = []
    for with_numba in ("True", "False"):
        command = [sys.executable, "-c", RUN, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=240)
        assert done.returncode == 0, done.stderr
        *answer, last = done.stdout.splitlines()
        assert last.endswith(with_numba)
        answers.append((answer, last.removesuffix(with_numba)))
    assert answers[0] == answers[1] and len(objects(tmp_path)) > 8


KINDS: dict[str, tuple[int | str, ...]] = {
    "bits": (4, 8),
    "most": (8,),
    "head_dim": (24,),
    "width": (4,),
}
"""What the parameters of what builds kernels can be."""


def builders() -> list[tuple[Any, tuple[int | str, ...]]]:
    """All that build kernels, each with all kinds of kernel that it builds."""
    numbers = [name for dtype, name in NUMBERS.items() if is_known(dtype)]
    here = KINDS | {
        "numbers": tuple(numbers),
        "kind": tuple(
            f"{isa.chosen().name} {bits} {scale} {symmetry}"
            for bits, scale, symmetry in product((4, 8), ("bf16", "f16", "f32"), ("sym", "asym"))
        ),
    }
    found = []
    for module in (matmul, program, attention, dense, pointwise, sample):
        for name, one in vars(module).items():
            if name.endswith("_kernel"):
                found += [
                    (one, kind)
                    for kind in product(*(here[name] for name in inspect.signature(one).parameters))
                ]
    return found


def check_that_all_can_be_kept() -> None:
    found, machine = builders(), machine_code.target_machine()
    assert len({build for build, _ in found}) == 12
    for build, kind in found:
        assert Compiled(build(*kind)).object_code(machine) is not None, (build, kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in isa.available()])
def test_every_kernel_can_be_kept(name: str) -> None:
    done = run_capped(name, "from test_kernel_cache import *; check_that_all_can_be_kept()")
    assert done.returncode == 0, done.stderr


def dividing_kernel() -> machine_code.Code:
    def divide(job: Any) -> None:
        job[1] = 12 // job[0] if job[0] else 0

    return divide


def raising_kernel() -> machine_code.Code:
    def divide(job: Any) -> None:
        if job[0] == 0:
            raise ValueError
        job[1] = 12 // job[0]

    return divide


def calling_kernel() -> machine_code.Code:
    absolute = ctypes.CDLL(None).labs
    absolute.argtypes, absolute.restype = [ctypes.c_int64], ctypes.c_int64

    def call(job: Any) -> None:
        job[1] = absolute(job[0]) + 1

    return call


def test_a_kernel_that_needs_the_process_it_was_compiled_in_runs_and_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_code, "places", lambda package: [tmp_path])
    for build in (raising_kernel, calling_kernel, dividing_kernel):
        numbers = (ctypes.c_int64 * 2)(3)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(machine_code.kernel(build))(numbers)
        assert numbers[1] == 4
    (kept,) = objects(tmp_path)
    assert kept.startswith("dividing_kernel")


MODULE = """
declare void @foreign(i64)
declare void @foreign.not()
declare float @llvm.fabs.f32(float)
@there = external global i64
@unused = external global i64
@own = private constant i64 1
@numba.dynamic.globals.1f = linkonce global i64 31
define internal void @local() {
  %x = load i64, ptr @there
  call void @foreign(i64 %x)
  %y = call float @llvm.fabs.f32(float 1.0)
  ret void
}
"""


def test_what_code_needs_is_what_it_uses_and_does_not_define() -> None:
    assert needed(MODULE) == {"foreign", "there", "numba.dynamic.globals.1f"}


def test_a_function_that_is_not_as_numba_writes_it_is_not_cut() -> None:
    whole = """
define noundef i32 @kernel.1(ptr %out, ptr %error, ptr %job) {
entry:
  ret i32 0
}

define ptr @cfunc.1(ptr %.1) {
entry:
  %.2 = alloca ptr
  %.3 = call i32 @kernel.1(ptr %.2, ptr poison, ptr %.1)
  %.4 = icmp eq i32 %.3, 0
  br i1 %.4, label %end, label %error
error:
  call void @print_error()
  br label %end
end:
  ret ptr null
}

declare void @print_error()
"""
    text = bare(whole, "cfunc.1")
    assert text is not None and not needed(text) and needed(whole) == {"print_error"}
    llvm.parse_assembly(text).verify()
    for old, new in (("ret i32 0", "ret i32 1"), ("@cfunc.1(", "@other("), ("call i32", "call i64")):
        assert old in whole and bare(whole.replace(old, new), "cfunc.1") is None
