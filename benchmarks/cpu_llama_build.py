"""llama.cpp's Python package, built for `cpu_vs_llamacpp.py`, and variants of the library that has its CPU kernels.

An environment of its own has the package as pip builds it for this processor. Beside it lie other builds of
`libggml-cpu` alone, which LD_LIBRARY_PATH puts in that one's place: a minute each on two cores.
"""

import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import llvmlite.binding as llvm

VERSION = "0.3.36"

_AVX2 = ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")
_BETTER = {
    "AVX512": "avx512dq",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512vnni",
    "AVX512_BF16": "avx512bf16",
    "AVX_VNNI": "avxvnni",
}
"""llama.cpp's names of what not every processor with AVX2 has, and LLVM's.

AMX is left out: under a hypervisor that shows the feature and does not provide it, `ldtilecfg` ends the process.
"""
_HERE = (*_AVX2, *(name for name, feature in _BETTER.items() if llvm.get_host_cpu_features().get(feature)))
VARIANTS: Mapping[str, tuple[Sequence[str], bool]] = {
    "stock": (_HERE, False),
    "prefetch": (_HERE, True),
    "avx2": (_AVX2, False),
}
"""The instructions that each is built for, and whether it is patched to prefetch."""

_SOURCE = "vendor/llama.cpp"
_KERNEL = "ggml/src/ggml-cpu/arch/x86/repack.cpp"
_FUNCTION, _LOOP = "static void gemv_q4_b32_8x8_q8_0_lut_avx", "for (int64_t b = 0; b < nb; b++) {\n"
_PREFETCH = (
    "for (int k = 0; k < 144; k += 64) _mm_prefetch((const char *) (b_ptr + b) + 2304 + k, _MM_HINT_T0);\n"
)
"""A block of eight rows has 144 bytes, in three cache lines, of which it asks for those of 16 blocks ahead."""


def installed_python(folder: Path) -> Path:
    """The interpreter of an environment in `folder` that has the package; made if it is not there.

    Raises:
        SystemExit: pip failed; its last words are in the message.
    """
    python = folder / "venv" / "bin" / "python"
    if not any((folder / "venv").glob("lib/python*/site-packages/llama_cpp")):
        print("building llama.cpp's Python package, which takes some minutes", file=sys.stderr)
        _run([sys.executable, "-m", "venv", str(folder / "venv")])
        _run([str(python), "-m", "pip", "install", "--no-binary", "llama-cpp-python", _REQUIREMENT])
    return python


def library_folder(folder: Path, variant: str) -> Path:
    """A folder with a variant of the library, built if it is not there.

    Raises:
        SystemExit: pip, CMake or the compiler failed; their last words are in the message.
    """
    instructions, prefetches = VARIANTS[variant]
    name = "-".join([*instructions, *(["prefetch"] if prefetches else [])]).lower()
    made, build = folder / f"lib-{name}", folder / f"build-{name}"
    if not made.exists():
        print(f"building {name}, which takes a minute or two", file=sys.stderr)
        kernel = _source(folder) / _KERNEL
        plain = kernel.read_text(encoding="utf-8")
        try:
            kernel.write_text(with_prefetch(plain) if prefetches else plain, encoding="utf-8")
            flags = [f"-DGGML_{one}=ON" for one in instructions]
            _run(["cmake", "-S", str(_source(folder)), "-B", str(build), *_OPTIONS, *flags])
            _run(["cmake", "--build", str(build), "--target", "ggml-cpu", "-j"])
        finally:
            kernel.write_text(plain, encoding="utf-8")
        (build / "bin").rename(made)
    return made


_REQUIREMENT = f"llama-cpp-python=={VERSION}"
_LEFT_OUT = ("BUILD_TESTS", "BUILD_TOOLS", "BUILD_EXAMPLES", "BUILD_SERVER", "CURL")
_OPTIONS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=OFF",
    *(f"-DLLAMA_{part}=OFF" for part in _LEFT_OUT),
]


def with_prefetch(source: str) -> str:
    """The kernel's source with a line that asks for the weights of 2.3 KB ahead, as ours does on Intel's."""
    at = source.index(_LOOP, source.index(_FUNCTION)) + len(_LOOP)
    return source[:at] + _PREFETCH + source[at:]


def _source(folder: Path) -> Path:
    """The package's source, downloaded if it is not there."""
    name = f"llama_cpp_python-{VERSION}"
    if not (folder / name).exists():
        options = ["--no-deps", "--no-binary", ":all:", "-d", str(folder)]
        _run([sys.executable, "-m", "pip", "download", *options, _REQUIREMENT])
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder / name / _SOURCE


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} … failed:\n{(done.stdout + done.stderr)[-2000:]}")
