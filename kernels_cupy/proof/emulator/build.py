"""From the text of a .cu file to a loaded library: two rewrites, a C++ compiler, and a cache by content.

The text stays as it is but for `__shared__` declarations, which C++ does not know; line numbers do not move. Libraries
are kept in the user's cache folder under a hash of everything that went into them.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from kernels_cupy.device import Kernel, source_text
from kernels_cupy.proof.cache import cached

HERE = Path(__file__).parent
COMMON_FLAGS = ("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-strict-aliasing",
                "-ffp-contract=off", "-w")
STEP_FLAG = "-fsanitize-coverage=trace-pc"  # every basic block calls hooks.cpp, which counts them
# A 16-byte load must stay one access, so the optimiser may not take vector types apart.
GCC_KERNEL_FLAGS = ("-O1", "-fno-tree-sra", "-fno-ipa-sra")
CLANG_KERNEL_FLAGS = ("-O0",)


class CompilerMissing(RuntimeError):
    """No C++ compiler was found; the message names packages that bring one."""


@cache
def compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: $CXX, g++, clang++, c++, or the one inside the pip package ziglang.

    Raises:
        CompilerMissing: none of them is there.
    """
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    raise CompilerMissing("the CPU emulator compiles kernels with a C++ compiler, and none was found: install g++ "
                          "(apt-get install g++, conda install gxx) or pip install ziglang")


def load(kernel: Kernel, arch: int, instrumented: bool, sources: Mapping[str, str]) -> tuple[ctypes.CDLL, Path]:
    """The kernel as a library, built if the cache does not have it.

    Args:
        arch: compute capability, which the text may ask for as __CUDA_ARCH__.
        instrumented: every access is reported to the runtime; without it kernels run faster and unchecked.
        sources: texts that stand in for files of the same name.

    Raises:
        CompilerMissing: see `compiler`.
        RuntimeError: the compiler refused the text; its message is included.
    """
    defines = (*kernel.defines, ("__CUDA_ARCH__", f"{arch}0"))
    path = _library(unit(kernel, sources), defines, instrumented)
    return _open(path), path


@cache
def _open(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def unit(kernel: Kernel, sources: Mapping[str, str]) -> str:
    """The C++ text of a kernel: our header, the .cu file with local includes in place, and its entry point."""
    text = _rewrite_shared(source_text(kernel.file, sources))
    return f'#include "cuda_emulation.h"\n{text}\nEMU_KERNEL({kernel.function})\n'


_ALIGN = r"(?:(?:__align__|alignas)\s*\([^)]*\)\s*)?"
_DIMENSIONS = r"(?:\s*\[[^\]]*\])*"
_DYNAMIC = re.compile(rf"extern\s+__shared__\s+{_ALIGN}([\w:\s]+?)\s+(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(rf"__shared__\s+{_ALIGN}(?P<type>[\w:]+(?:<[^;]*?>)?(?:\s+[\w:]+)*?)\s+"
                     rf"(?P<names>\w+{_DIMENSIONS}(?:\s*,\s*\w+{_DIMENSIONS})*)\s*;")


def _rewrite_shared(text: str) -> str:
    """`__shared__ T a[N];` becomes a reference into the runtime's arena; `extern __shared__` a pointer to its end."""
    count = 0

    def static(match: re.Match[str]) -> str:
        nonlocal count
        out = []
        for name, dimensions in re.findall(rf"(\w+)({_DIMENSIONS})\s*(?:,|$)", match["names"]):
            count += 1
            out.append(f"typedef {match['type']} {name}_in_shared{dimensions}; {name}_in_shared& {name} = "
                       f"*({name}_in_shared*)emu_static_shared({count}, sizeof({name}_in_shared));")
        return " ".join(out) + "\n" * (match[0].count("\n") - sum(line.count("\n") for line in out))

    text = _DYNAMIC.sub(r"\1* \2 = (\1*)emu_dynamic_shared();", text)
    return _STATIC.sub(static, text)


def _library(text: str, defines: tuple[tuple[str, str], ...], instrumented: bool) -> Path:
    command = compiler()
    flags = [*COMMON_FLAGS, *(GCC_KERNEL_FLAGS if _is_gcc(command) else CLANG_KERNEL_FLAGS), f"-I{HERE / 'include'}",
             *(f"-D{name}={value}" for name, value in defines), STEP_FLAG,
             *(["-fsanitize=thread"] if instrumented else [])]
    runtime = _runtime()

    def make(path: Path) -> None:
        source, made = (str(path.with_name(name)) for name in ("unit.cpp", "unit.o"))
        Path(source).write_text(text)
        _run([*command, *flags, "-c", source, "-o", made])
        _run([*command, "-shared", made, str(runtime), "-Wl,-Bsymbolic", "-lm", "-o", str(path)])

    return cached(f"kernel-{_hash(text, *command, *flags, str(runtime), _texts('include'))}.so", make)


@cache
def _runtime() -> Path:
    command = compiler()
    flags = [*COMMON_FLAGS, "-O2"]
    return cached(f"runtime-{_hash(*command, *flags, _texts('runtime'))}.o",
                  lambda path: _run([*command, *flags, "-c", str(HERE / "runtime" / "runtime.cpp"), "-o", str(path)]))


@cache
def _is_gcc(command: tuple[str, ...]) -> bool:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    return "Free Software Foundation" in version


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} refused the kernel:\n{done.stderr}")


@cache
def _texts(folder: str) -> str:
    return "".join(path.read_text() for path in sorted((HERE / folder).iterdir()) if path.is_file())


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
