"""Runs the very same .cu text on the CPU: a C++ compiler, fibers for threads, and a check on every access."""

from kernels_cupy.proof.emulator.build import CompilerMissing
from kernels_cupy.proof.emulator.emulator import Access, Emulator, LaunchCounters, SiteCounters
from kernels_cupy.proof.emulator.faults import KernelFault

__all__ = ["Access", "CompilerMissing", "Emulator", "KernelFault", "LaunchCounters", "SiteCounters"]
