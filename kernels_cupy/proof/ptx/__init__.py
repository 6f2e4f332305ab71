"""Runs the PTX that NVRTC emits, all threads of a launch at once, and counts what it executes. No C++ compiler."""

from kernels_cupy.proof.ptx.device import PtxCounters, PtxDevice, Traffic
from kernels_cupy.proof.ptx.faults import PtxFault
from kernels_cupy.proof.ptx.parser import PtxError

__all__ = ["PtxCounters", "PtxDevice", "PtxError", "PtxFault", "Traffic"]
