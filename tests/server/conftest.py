"""One server for the tests that leave it as they found it."""

from __future__ import annotations

import openai
import pytest
from server.support import running


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("data")) as one:
        yield one


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as one:
        yield one
