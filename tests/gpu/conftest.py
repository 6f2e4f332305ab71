"""Random data drawn fresh in every run."""

import pytest
from kernels.support import fresh_rng


@pytest.fixture
def rng():
    return fresh_rng()
