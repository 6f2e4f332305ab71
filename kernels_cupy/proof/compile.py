"""Compiles kernels for GPUs that are not here: NVRTC, cuobjdump and nvdisasm from pip packages; no driver is needed.

NVRTC is called the way CuPy calls it on a GPU (same flags, same header folder), so what compiles here compiles there.
Binaries are kept in the user's cache folder under a hash of everything that went into them.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kernels_cupy.device import SHARED_KIB, Kernel, source_text
from kernels_cupy.proof.cache import cached

ARCHITECTURES = tuple(SHARED_KIB)  # what CUDA 13 compiles for, from Turing on


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message is its log."""


@dataclass(frozen=True)
class Resources:
    """The resources of a multiprocessor that a kernel uses.

    Attributes:
        registers: 32-bit registers per thread.
        spill_bytes: local memory and stack per thread: values that did not fit the registers.
        shared_bytes: static shared memory per block.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int


def why_unavailable() -> str | None:
    """None if kernels can be compiled here, else the reason in a sentence."""
    try:
        _toolkit()
    except FileNotFoundError as error:
        return str(error)
    return None


@cache
def _toolkit() -> Path:
    """The folder of the pip packages nvidia-cuda-*: bin, include, lib."""
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or []) if found else []:
        for folder in sorted(Path(place).glob("cu*"), reverse=True):
            parts = (list(folder.glob("lib/libnvrtc.so*")), folder / "bin/cuobjdump", folder / "bin/nvdisasm",
                     folder / "include/cuda_fp16.h")
            if parts[0] and all(part.exists() for part in parts[1:]):
                return folder
    raise FileNotFoundError("NVRTC, cuobjdump, nvdisasm or the CUDA headers are missing: pip install bros-ref[kernels]")


def compile_ptx(kernel: Kernel, arch: int, sources: Mapping[str, str] | None = None, line_info: bool = False) -> str:
    """The PTX text that NVRTC emits for sm_`arch`.

    Args:
        sources: texts that stand in for files of the same name.
        line_info: name the source line of every instruction (.loc); the instructions stay the same.

    Raises:
        CompileError: NVRTC refused the text.
        FileNotFoundError: `why_unavailable` says what is missing.
    """
    return _compiled(kernel, f"compute_{arch}", sources, line_info).read_bytes().rstrip(b"\0").decode()


def compile_cubin(kernel: Kernel, arch: int, sources: Mapping[str, str] | None = None) -> Path:
    """A file with the machine code for sm_`arch`; raises as `compile_ptx`."""
    return _compiled(kernel, f"sm_{arch}", sources)


def resources(cubin: Path, function: str) -> Resources:
    """Reads a kernel's registers, spills and static shared memory from its binary."""
    text = _run("cuobjdump", "--dump-resource-usage", str(cubin))
    match = re.search(rf"Function {function}:\s*\n(.*)", text)
    if match is None:
        raise LookupError(f"{cubin} has no function {function}")
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", match[1])}
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"])


def machine_code(cubin: Path, function: str) -> tuple[list[str], dict[str, int]]:
    """A kernel's SASS instructions in order, and its labels: name -> index of the instruction that follows."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    inside = False
    for line in _run("nvdisasm", "-c", "-ndf", str(cubin)).splitlines():
        if section := re.match(r"\.text\.(\w+):", line):
            inside = section[1] == function
        elif inside and (label := re.match(r"\s*(\.L_\w+):", line)):
            labels[label[1]] = len(instructions)
        elif inside and (instruction := re.search(r"/\*[0-9a-f]+\*/\s+(.*?);", line)):
            instructions.append(instruction[1].strip())
    return instructions, labels


def _compiled(kernel: Kernel, target: str, sources: Mapping[str, str] | None, line_info: bool = False) -> Path:
    """The binary (sm_) or PTX (compute_) file, from the cache or made now."""
    text = source_text(kernel.file, sources)
    options = (f"-arch={target}", "-std=c++17", "-ftz=true", f"-I{_toolkit() / 'include'}",
               *(f"-D{name}={value}" for name, value in kernel.defines), *(["-lineinfo"] if line_info else []))
    key = hashlib.sha256(repr((_version(), options, text)).encode()).hexdigest()

    def make(path: Path) -> None:
        path.write_bytes(_nvrtc_compile(kernel.file, text, options, target))

    return cached(f"{target}-{key[:32]}", make)


@cache
def _nvrtc() -> ctypes.CDLL:
    folder = _toolkit() / "lib"
    for builtins in sorted(folder.glob("libnvrtc-builtins.so*")):
        ctypes.CDLL(str(builtins))  # NVRTC asks for it by name, and then finds it loaded
    return ctypes.CDLL(str(next(iter(sorted(folder.glob("libnvrtc.so*"))))))


@cache
def _version() -> tuple[int, int]:
    """NVRTC's version: code for the same GPU changes with it."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _nvrtc_compile(name: str, text: str, options: tuple[str, ...], target: str) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), _strings(options)):
            raise CompileError(f"{name} for {target}: {_read(program, 'ProgramLog').decode().strip()}")
        return _read(program, "CUBIN" if target.startswith("sm_") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(_nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(_nvrtc(), f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _strings(texts: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_toolkit() / "bin" / tool), *arguments], capture_output=True, text=True,
                          check=True).stdout
