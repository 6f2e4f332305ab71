"""What the kernels' tests share: whether a kernel can be emulated here, and its random data."""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest

from kernels_cupy.proof.emulator.build import CompilerMissing, compiler


def _why_no_emulator() -> str | None:
    try:
        compiler()
    except CompilerMissing as error:
        return str(error)
    return None


NO_EMULATOR = _why_no_emulator()
needs_emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=f"no kernel can be emulated here: {NO_EMULATOR}")


def rng_of(name: str) -> np.random.Generator:
    """A generator for the test of this name: the same data in every run, so that a run can be repeated, or new data
    with BROS_REF_FRESH=1. pytest shows the seed of a failed test."""
    fresh = bool(os.environ.get("BROS_REF_FRESH"))
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if fresh else zlib.crc32(name.encode())
    print("seed", seed)
    return np.random.default_rng(seed)
