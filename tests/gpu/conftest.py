"""Random data, the same in every run unless BROS_REF_FRESH asks for new ones."""

import pytest
from kernels.support import rng_of


@pytest.fixture
def rng(request):
    return rng_of(request.node.name)
