"""What the kernels' tests share: whether a kernel can be emulated here, and fresh random data."""

from __future__ import annotations

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


def fresh_rng() -> np.random.Generator:
    """A generator with a new seed in every run; pytest shows the seed of a failed test."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)
