"""`bros-ref serve` as people start it: what it prints works, and SIGTERM ends it in order."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import httpx
import openai
import pytest
from server.support import MODEL, running, until
from server.test_faults import Slow, openai_client

from bros_ref.cli.serve import hello


@pytest.mark.parametrize("needs_key", [False, True])
def test_what_is_printed_can_be_pasted(needs_key):
    address, curl, python, dashboard = hello("http://127.0.0.1:1234", MODEL, needs_key).splitlines()
    assert address == "listening on http://127.0.0.1:1234"
    assert dashboard == "http://127.0.0.1:1234/dashboard"
    words = shlex.split(curl)
    assert json.loads(words[words.index("-d") + 1])["model"] == MODEL
    assert ("authorization: Bearer YOUR_KEY" in words) == needs_key
    compile(shlex.split(python)[2], "printed", "exec")


def test_the_command_serves_until_sigterm(tmp_path):
    command = [sys.executable, "-m", "bros_ref", "serve", "--model", MODEL, "--port", "0", "--data-dir", str(tmp_path),
               "--kv-blocks", "64"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            url = next(found[1] for line in process.stdout if (found := re.match(r"listening on (\S+)", line)))
            printed = [process.stdout.readline() for _ in range(3)]
            words = shlex.split(printed[0])
            answer = httpx.post(words[1], headers={"content-type": "application/json"},
                                content=words[words.index("-d") + 1], timeout=60)
            assert answer.status_code == 200
            assert httpx.get(f"{url}/dashboard").status_code == 200
        finally:
            process.terminate()
        assert process.wait(60) in (0, -15)
        assert "Traceback" not in process.stderr.read()


def test_the_client_waits_and_tries_again_when_the_queue_is_full(tmp_path):
    with running(tmp_path) as server, openai_client(server) as client:
        gate, refused = server.state.loop._gate, []

        def full_at_first(engine, request, waiting):
            from bros_ref.server.errors import APIError

            if len(refused) < 2:
                refused.append(APIError(429, "full"))
                return refused[-1]
            return gate(engine, request, waiting)

        server.state.loop._gate = full_at_first
        answer = client.with_options(max_retries=3).completions.create(model=MODEL, prompt="x", max_tokens=2)
        assert answer.choices[0].finish_reason == "length"
        assert len(refused) == 2


def test_a_client_that_times_out_leaves_nothing_behind(tmp_path):
    with running(tmp_path, runner=Slow) as server, openai_client(server) as client:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).completions.create(model=MODEL, prompt="x", max_tokens=900)
        until(lambda: not server.engine.scheduler.requests)
        assert server.engine.scheduler.kv.num_used_blocks == 0
