"""Which attention the decoder runs: plain torch, the CUDA kernels on a GPU, or the same kernels emulated on the CPU.

    torch         `paged_attention` of attention.py: any device, the reference
    cupy          the kernels of kernels_cupy through CuPy: the default if there are a GPU and CuPy
    cpu-emulated  the very same kernels, thread by thread on the CPU with every access checked: slow, for study

Kernels are imported only when a kernel backend is chosen; `gpu/attention.py` calls them.
"""

from __future__ import annotations

import torch

from bros_ref.model.attention import AttentionFn, paged_attention

BACKENDS = ("auto", "torch", "cupy", "cpu-emulated")


def attention_backend(name: str = "auto", device: torch.device | str = "cpu") -> AttentionFn:
    """The attention function of a backend.

    Raises:
        ValueError: an unknown name, or one that does not fit the device.
        RuntimeError: "cupy" without a GPU or CuPy; "cpu-emulated" without a C++ compiler says so when first used.
    """
    kind = torch.device(device).type
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    if (name == "cupy" and kind != "cuda") or (name == "cpu-emulated" and kind != "cpu"):
        raise ValueError(f"backend {name} does not run on device {kind}")
    if name == "cpu-emulated":
        from bros_ref.gpu.attention import KernelAttention
        from kernels_cupy.proof.emulator import Emulator

        return KernelAttention(Emulator())
    if name == "cupy" or (name == "auto" and kind == "cuda"):
        from kernels_cupy.gpu import CupyDevice, why_unavailable

        if name == "cupy" or why_unavailable() is None:
            from bros_ref.gpu.attention import KernelAttention

            return KernelAttention(CupyDevice())
    return paged_attention
