"""Two replicas behind nginx with the configuration in docs/server/nginx.conf, where nginx is installed."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import openai
import pytest
from server.support import MODEL, running, until

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed here")
CONFIG = (Path(__file__).resolve().parents[2] / "docs" / "server" / "nginx.conf").read_text()


LONG = 300  # tokens; at STEP_S a request with as many outlasts the test that starts it
STEP_S = 0.1


class SlowRunner:
    """Takes its time for each step."""

    def __init__(self, runner):
        self._runner = runner

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def execute(self, output):
        time.sleep(STEP_S)
        return self._runner.execute(output)


def free_port():
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def proxy(folder, *ports):
    """nginx with our configuration, before servers at these ports; yields its address."""
    own, config = free_port(), CONFIG
    for there, here in zip(("8000", "8001", "8002"), (own, *ports), strict=True):
        assert f":{there};" in config
        config = config.replace(f":{there};", f":{here};")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in (
        "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    path = folder / "nginx.conf"
    path.write_text(f"pid {folder}/pid; daemon off; error_log {folder}/log; events {{}}\n"
                    f"http {{ access_log off; {temporary} {config} }}")
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(path), "-e", str(folder / "log")])
    try:
        until(lambda: accepts(own), 60)
        yield f"http://127.0.0.1:{own}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """The proxy's address, and the two servers behind it."""
    folder = tmp_path_factory.mktemp("replicas")
    with (running(folder / "1", runner=SlowRunner) as first, running(folder / "2", runner=SlowRunner) as second,
          proxy(folder, first.port, second.port) as url):
        yield url, first, second


def accepts(port):
    with contextlib.suppress(OSError), contextlib.closing(socket.create_connection(("127.0.0.1", port), 1)):
        return True
    return False


def num_served(server):
    return len(server.engine.trace.requests)


def client_of(url, replica=None):
    headers = {} if replica is None else {"x-replica": str(replica)}
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", default_headers=headers, max_retries=0)


def test_interactive_requests_go_to_the_replica_with_fewer_in_flight(replicas):
    url, first, second = replicas
    before = num_served(first), num_served(second)
    client = client_of(url)
    streams = []
    for _ in range(6):
        streams.append(client.completions.create(model=MODEL, prompt="x", max_tokens=LONG, stream=True))
        assert next(iter(streams[-1]))  # it is being generated
    assert [num_served(first) - before[0], num_served(second) - before[1]] == [3, 3]
    for stream in streams:
        stream.close()


def test_tokens_are_passed_on_as_they_are_generated(replicas):
    url, *_ = replicas
    stream = client_of(url).completions.create(model=MODEL, prompt="x", max_tokens=12, stream=True)
    times = [time.monotonic() for chunk in stream if chunk.choices]
    assert times[-1] - times[0] > 5 * STEP_S  # a buffer would pass them on at once


@pytest.mark.parametrize(("replica", "index"), [(1, 0), (2, 1), (None, 0)])
def test_a_batch_stays_on_the_replica_that_has_its_file(replicas, replica, index):
    url, *servers = replicas
    client = client_of(url, replica)
    lines = [{"custom_id": str(number), "method": "POST", "url": "/v1/completions",
              "body": {"model": MODEL, "prompt": "x", "max_tokens": 3}} for number in range(4)]
    before = [num_served(server) for server in servers]
    file = client.files.create(file=("f.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    until(lambda: client.batches.retrieve(batch.id).status == "completed", 120)
    results = client.files.content(client.batches.retrieve(batch.id).output_file_id).text.splitlines()
    assert sorted(json.loads(line)["custom_id"] for line in results) == ["0", "1", "2", "3"]
    gained = [num_served(server) - number for server, number in zip(servers, before, strict=True)]
    assert gained[index] >= 4
    assert gained[1 - index] == 0
    other = client_of(url, 2 if index == 0 else 1)
    with pytest.raises(openai.NotFoundError):
        other.batches.retrieve(batch.id)


def test_a_replica_that_is_down_is_left_out(tmp_path, replicas):
    _, _, second = replicas
    with proxy(tmp_path, free_port(), second.port) as url:  # nobody listens at the first
        for _ in range(4):
            assert client_of(url).completions.create(model=MODEL, prompt="x", max_tokens=2).choices
