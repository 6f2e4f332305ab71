"""One instruction at a time: a PTX kernel in which every thread loads its inputs, runs a few lines, stores a result."""

from __future__ import annotations

import numpy as np
import torch

from kernels_cupy.proof.ptx import PtxDevice

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
_REGISTERS = """.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<33>; .reg .f32 %f<33>; .reg .b64 %rd<33>;
.reg .b32 %tid; mov.u32 %tid, %tid.x;
"""


def tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same bytes in the same memory; torch has no unsigned arithmetic, and none is needed."""
    return torch.from_numpy(array.view(f"i{array.itemsize}"))


def kernel(body: str, num_pointers: int, variables: str = "") -> str:
    """The text of `k`, whose pointers are %rd0 ... and whose thread is %tid."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(num_pointers))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(num_pointers))
    return f"{HEADER}.visible .entry k({parameters})\n{{\n{variables}{_REGISTERS}{loads}\n{body}\nret;\n}}\n"


def run(text: str, *arrays: np.ndarray, grid: int = 1, block: int | None = None, shared_bytes: int = 0,
        counters: bool = False) -> PtxDevice:
    """Runs `k` on arrays in place; a block of as many threads as the first array has entries, unless given."""
    device = PtxDevice(80, counters=counters)
    device.run(text, "k", (grid, 1, 1), (block or len(arrays[0]), 1, 1), shared_bytes, [tensor(a) for a in arrays])
    return device


def lanes(line: str, result: str, *inputs: np.ndarray) -> np.ndarray:
    """What `line` leaves in %out, of type `result`, given the inputs in %a, %b, %c; types are the arrays'."""
    kinds = [f"{'f' if a.dtype.kind == 'f' and a.itemsize >= 4 else 'b'}{8 * a.itemsize}" for a in inputs]
    out = np.zeros(len(inputs[0]), "u4" if result == "pred" else f"u{int(result[1:]) // 8}")
    body = f".reg .{result} %out;\n"
    for i, (name, kind) in enumerate(zip("abcd", kinds, strict=False)):
        body += (f".reg .{kind} %{name};\nmul.wide.u32 %rd10, %tid, {int(kind[1:]) // 8};\nadd.s64 %rd11, %rd{i}, "
                 f"%rd10;\nld.global.{kind} %{name}, [%rd11];\n")
    body += f"{line}\nmul.wide.u32 %rd10, %tid, {out.itemsize};\nadd.s64 %rd11, %rd{len(inputs)}, %rd10;\n"
    body += "selp.u32 %r0, 1, 0, %out;\nst.global.u32 [%rd11], %r0;" if result == "pred" else \
        f"st.global.{result} [%rd11], %out;"
    run(kernel(body, len(inputs) + 1), *inputs, out)
    return out
