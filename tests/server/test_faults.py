"""What goes wrong: clients that leave or do not read, steps that fail, full queues, full disks, wrong keys."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time

import httpx
import openai
import pytest
from server.support import LIVE, MODEL, Running, running, until

from bros_ref.engine.build import LiveSettings

KEYS = ("key-of-the-first-user", "key-of-the-second-one")


def openai_client(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=30)


class Slow:
    """A runner that takes its time, and counts its steps."""

    def __init__(self, runner, step_s=0.02):
        self.runner, self.step_s, self.steps, self.fail_next = runner, step_s, 0, False
        self.kv = runner.kv

    def execute(self, output):
        time.sleep(self.step_s)
        self.steps += 1
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("a kernel failed")
        return self.runner.execute(output)


@pytest.fixture
def slow(tmp_path):
    with running(tmp_path, runner=Slow) as server:
        yield server


def is_clean(server: Running) -> bool:
    kv = server.engine.scheduler.kv
    return not server.engine.scheduler.requests and kv.num_free_blocks == kv.config.num_blocks


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tier", ["default", "flex"])
def test_a_client_that_leaves_is_aborted_within_a_step(slow, stream, tier):
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 900, "stream": stream, "service_tier": tier})
    connection = socket.create_connection(("127.0.0.1", slow.port))
    connection.sendall((f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                        f"content-length: {len(body)}\r\n\r\n{body}").encode())
    until(lambda: slow.engine.runner.steps >= 3)
    connection.close()
    steps = slow.engine.runner.steps
    until(lambda: is_clean(slow))
    assert slow.engine.runner.steps <= steps + 3  # the step under way, and what passes until the close is noticed
    slow.engine.scheduler.kv.check_integrity()


def test_an_idle_engine_does_not_spin(server):
    [thread] = [thread for thread in threading.enumerate() if thread.name == "engine" and thread.native_id
                and thread is server.state.loop._thread]
    until(lambda: not server.engine.has_unfinished)

    def cpu_ticks():
        with open(f"/proc/self/task/{thread.native_id}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    before = cpu_ticks()
    time.sleep(0.5)
    assert cpu_ticks() - before <= 2  # hundredths of a second


def test_a_failed_step_is_an_error_of_its_requests_and_of_nobody_else(slow):
    with openai_client(slow) as client:
        stream = client.completions.create(model=MODEL, prompt="x", max_tokens=300, temperature=0, stream=True)
        next(iter(stream))
        slow.engine.runner.fail_next = True
        with pytest.raises(openai.APIError, match="RuntimeError"):
            list(stream)
        slow.engine.runner.fail_next = True
        with pytest.raises(openai.InternalServerError, match="RuntimeError"):
            client.completions.create(model=MODEL, prompt="x", max_tokens=3)
        assert client.completions.create(model=MODEL, prompt="x", max_tokens=3).choices[0].finish_reason == "length"
    until(lambda: is_clean(slow))


def test_an_engine_that_lost_a_rank_says_so_and_fails_no_batch(tmp_path):
    from server.test_durability import batch_lines

    from bros_ref.engine.ranks import RankFailed

    class Lost(Slow):
        def execute(self, output):
            raise RankFailed("rank 1 died")

    with running(tmp_path, runner=Lost) as server, openai_client(server) as client:
        file = client.files.create(file=("a.jsonl", batch_lines(30)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="rank 1 died"):
            client.completions.create(model=MODEL, prompt="x", max_tokens=3)
        time.sleep(0.7)  # longer than a line waits before it is tried again
        assert client.batches.retrieve(batch.id).request_counts.failed == 0
    with running(tmp_path) as server, openai_client(server) as client:
        until(lambda: client.batches.retrieve(batch.id).status == "completed")
        assert client.batches.retrieve(batch.id).request_counts.completed == 30


def test_a_fault_of_the_scheduler_ends_the_requests_and_not_the_server(slow, monkeypatch):
    with openai_client(slow) as client:
        real = slow.engine.scheduler.schedule

        def broken(now_s):
            monkeypatch.setattr(slow.engine.scheduler, "schedule", real)
            raise KeyError("a policy's bug")

        monkeypatch.setattr(slow.engine.scheduler, "schedule", broken)
        with pytest.raises(openai.InternalServerError, match="KeyError"):
            client.completions.create(model=MODEL, prompt="x", max_tokens=3)
        client.completions.create(model=MODEL, prompt="x", max_tokens=3)


def test_full_queues_say_when_to_come_back(tmp_path):
    with running(tmp_path, runner=lambda runner: Slow(runner, 0.2), max_queued_rt=2, max_queued_be=3,
                 live=LiveSettings(64, 16, 1, 256)) as server:
        def post(tier):
            body = {"model": MODEL, "prompt": "x", "max_tokens": 50, "stream": True, "service_tier": tier}
            request = http.build_request("POST", f"{server.url}/v1/completions", json=body)
            return http.send(request, stream=True)

        with httpx.Client(timeout=30) as http:
            for tier, status, places in (("default", 503, 2), ("flex", 429, 3)):
                answers = [post(tier) for _ in range(places + 2)]
                refused = [answer for answer in answers if answer.status_code != 200]
                assert refused, tier
                assert {answer.status_code for answer in refused} == {status}
                assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
                refused[0].read()
                assert refused[0].json()["error"]["code"] in ("rt_full", "be_full")
                for answer in answers:
                    answer.close()
                until(lambda: is_clean(server))


def test_a_target_out_of_reach_is_refused_at_once(tmp_path):
    from bros_ref.scheduler.latency_model import StepLatencyModel

    with running(tmp_path, reject_late=True) as server, openai_client(server) as client:
        server.engine.scheduler.latency = StepLatencyModel((0.1, 0.01, 0, 0))
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=MODEL, prompt="x" * 100, max_tokens=2,
                                      extra_body={"slo": {"ttft_s": 0.5, "tpot_s": 1.0}})
        assert caught.value.status_code == 503
        assert caught.value.code == "slo_out_of_reach"
        client.completions.create(model=MODEL, prompt="x" * 100, max_tokens=2,
                                  extra_body={"slo": {"ttft_s": 5, "tpot_s": 1.0}})


def test_a_client_that_does_not_read_is_aborted(tmp_path):
    """The system buffers take a lot before a reader is slow, so the limit is set to what one step brings."""
    with running(tmp_path, max_buffered_pieces=20, live=LIVE) as server:
        body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 900, "n": 1, "stream": True, "logprobs": 5,
                           "temperature": 0})
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        stalled = server.state.service.loop
        real = stalled._push

        def one_at_a_time(news):
            for _ in range(40):  # as if the client had read none of forty pieces
                real(news)

        stalled._push = one_at_a_time
        connection.sendall((f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                            f"content-length: {len(body)}\r\n\r\n{body}").encode())
        connection.settimeout(20)
        received = b""
        while b"slow_client" not in received:
            data = connection.recv(65536)
            assert data
            received += data
        connection.close()
        until(lambda: is_clean(server))


def test_keys(tmp_path):
    with running(tmp_path, api_keys=KEYS) as server:
        with openai_client(server, "a wrong key") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions",
                "body": {"model": MODEL, "prompt": "x", "max_tokens": 2}}
        with openai_client(server, KEYS[0]) as owner, openai_client(server, KEYS[1]) as other:
            file = owner.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
            batch = owner.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            assert list(other.files.list()) == list(other.batches.list()) == []
            for forbidden in (lambda: other.files.retrieve(file.id), lambda: other.files.content(file.id),
                              lambda: other.files.delete(file.id), lambda: other.batches.retrieve(batch.id),
                              lambda: other.batches.cancel(batch.id)):
                with pytest.raises(openai.NotFoundError):
                    forbidden()
            with pytest.raises(openai.BadRequestError):
                other.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            until(lambda: owner.batches.retrieve(batch.id).status == "completed")


def test_a_full_disk_loses_no_line(tmp_path):
    """SQLite's own limit on pages makes it full; when there is room again the batch goes on."""
    from server.test_durability import batch_lines, check_files

    with running(tmp_path) as server, openai_client(server) as client:
        file = client.files.create(file=("a.jsonl", batch_lines(60, frozenset({5}))), purpose="batch")
        real, failures = server.state.batches.finish, []

        def fill_the_disk_once(results):
            if len(failures) < 3:
                with server.state.store._lock:
                    database = server.state.store._connection
                    pages, = database.execute("PRAGMA page_count").fetchone()
                    database.execute(f"PRAGMA max_page_count = {pages}")
                    try:
                        database.execute("CREATE TABLE big AS SELECT zeroblob(1000000) AS x")
                    except sqlite3.OperationalError as error:
                        failures.append(str(error))
                        raise
                    finally:
                        database.execute("PRAGMA max_page_count = 1000000")
            real(results)

        server.state.batches.finish = fill_the_disk_once
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        until(lambda: client.batches.retrieve(batch.id).status == "completed")
        assert len(failures) == 3
        assert "full" in failures[0]
        check_files(client, client.batches.retrieve(batch.id), 60, frozenset({5}))


def test_expiry_and_cancellation_account_for_every_line(slow):
    from server.test_durability import batch_lines

    with openai_client(slow) as client:
        for how in ("expired", "cancelled"):
            file = client.files.create(file=("a.jsonl", batch_lines(400)), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            until(lambda batch=batch: client.batches.retrieve(batch.id).request_counts.completed > 3)
            if how == "cancelled":
                assert client.batches.cancel(batch.id).status == "cancelling"
            else:
                with slow.state.store.transaction() as database:
                    database.execute("UPDATE batches SET expires_at = 1 WHERE id = ?", (batch.id,))
            until(lambda batch=batch, how=how: client.batches.retrieve(batch.id).status == how)
            ended = client.batches.retrieve(batch.id)
            done = [json.loads(line) for line in client.files.content(ended.output_file_id).text.splitlines()]
            left = [json.loads(line) for line in client.files.content(ended.error_file_id).text.splitlines()]
            ids = [line["custom_id"] for line in done + left]
            assert sorted(ids) == sorted(f"c{i}" for i in range(400))
            assert {line["error"]["code"] for line in left} == {f"batch_{how}"}
            with pytest.raises(openai.BadRequestError):
                client.batches.cancel(batch.id)
    until(lambda: is_clean(slow))


@pytest.mark.parametrize(("changes", "code"), [
    ({"custom_id": "same"}, "duplicate_custom_id"), ({"custom_id": 3}, "invalid_custom_id"),
    ({"url": "/v1/chat/completions"}, "invalid_url"), ({"method": "GET"}, "invalid_method"),
    ({"body": []}, "invalid_body"),
])
def test_a_batch_of_wrong_lines_fails_and_names_them(server, client, changes, code):
    good = {"custom_id": "same", "method": "POST", "url": "/v1/completions", "body": {}}
    lines = [good, good | {"custom_id": "other"} | changes]
    file = client.files.create(file=("a.jsonl", "\n\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    until(lambda: client.batches.retrieve(batch.id).status == "failed")
    errors = client.batches.retrieve(batch.id).errors.data
    assert [(error.code, error.line) for error in errors] == [(code, 3)]


def test_uploads_that_are_refused(server, client, monkeypatch):
    for content, message in ((b"", "empty"), (b'{"a": 1}\n[]\n', "line 2"), (b'{}\n{"a": \xff}', "line 2"),
                             (b"{}\n" * 50_001, "50000 lines"), (b'{"a":' * 100_000, "line 1")):
        with pytest.raises(openai.BadRequestError, match=message):
            client.files.create(file=("a.jsonl", content), purpose="batch")
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune")
    monkeypatch.setattr("bros_ref.server.files.MAX_UPLOAD_BYTES", 1000)
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("a.jsonl", b'{"a": 1}\n' * 200), purpose="batch")
    assert caught.value.status_code == 413
    assert not list((server.state.settings.data_dir / "files").glob("*.part"))


def test_an_upload_may_be_larger_than_a_request(client):
    content = b'{"a": "%s"}\n' % (b"x" * 1_000_000) * 12
    assert client.files.create(file=("a.jsonl", content), purpose="batch").bytes == len(content)


def test_bodies_that_are_no_requests(server):
    url, kind = f"{server.url}/v1/completions", {"content-type": "application/json"}
    body = b'{"model": "checksum", "prompt": "x", "max_tokens": %s}'
    for content, headers in (
            (b"", kind), (b"{", kind), (b"[]", kind), (b"null", kind), (b"\xff\xfe", kind), (b'{"a":' * 50_000, kind),
            (body % b"NaN", kind), (body % b"-1", kind), (body % b"1e999", kind), (body % b'"1"', kind),
            (body % b"1", {"content-type": "text/plain"}), (b'{"model": "checksum", "prompt": "\\ud800"}', kind),
            (b'{"model": "checksum", "prompt": [-1]}', kind), (b'{"model": "checksum", "prompt": [99999]}', kind),
            (b'{"model": "checksum", "prompt": ""}', kind), (b'{"model": "checksum", "prompt": []}', kind)):
        answer = httpx.post(url, content=content, headers=headers)
        assert answer.status_code == 400, (content[:60], answer.text)
        assert answer.json()["error"]["message"]
    for answer in (httpx.post(url, content=b" " * 5_000_000, headers=kind),
                   httpx.post(url, content=(b" " * 100_000 for _ in range(50)), headers=kind)):
        assert answer.status_code == 413
        assert answer.json()["error"]["message"]
    with socket.create_connection(("127.0.0.1", server.port)) as connection:  # 300 MB are announced, none are read
        connection.sendall(b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 314572800\r\n\r\n")
        assert connection.makefile("rb").readline().split()[1] == b"413"
    assert httpx.post(url, content=b"{}", headers={**kind, "x-much": "a" * 40_000}).status_code in (400, 431)
    assert httpx.put(url).status_code == 405
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["message"]


@pytest.mark.parametrize("identifier", ["../lock", "..%2Fstore.sqlite", "%2e%2e%2flock", "file-0", "a%00b", "."])
def test_ids_are_never_paths(server, identifier):
    for path in (f"/v1/files/{identifier}", f"/v1/files/{identifier}/content", f"/v1/batches/{identifier}"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            head = connection.makefile("rb").readline()
        assert head.split()[1] in (b"404", b"400"), (path, head)


def test_prompts_are_not_logged(server, client, caplog, capfd):
    with caplog.at_level("DEBUG"):
        client.completions.create(model=MODEL, prompt="a-secret-of-mine", max_tokens=3)
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt="a-secret-of-mine", max_tokens=10**6)
    said = [record.getMessage() for record in caplog.records if record.name.startswith(("bros_ref", "uvicorn"))]
    assert not any("a-secret-of-mine" in text for text in [*said, str(caught.value), *capfd.readouterr()])


def test_the_clock_set_back_changes_nothing(server, client, monkeypatch):
    real = time.time
    monkeypatch.setattr("bros_ref.server.batches.time.time", lambda: real() - 10 * 86_400)
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions",
            "body": {"model": MODEL, "prompt": "x", "max_tokens": 2}}
    file = client.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    assert next(iter(client.batches.list(limit=1))).id == batch.id  # order of insertion, whatever the clock says
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).choices[0].finish_reason == "length"
    monkeypatch.setattr("bros_ref.server.batches.time.time", real)


def test_pages_of_lists(server, client):
    files = [client.files.create(file=(f"{i}.jsonl", b"{}"), purpose="batch").id for i in range(5)]
    seen = []
    page = client.files.list(limit=2)
    while True:
        seen += [file.id for file in page.data]
        if not page.has_next_page():
            break
        page = page.get_next_page()
    assert [file_id for file_id in seen if file_id in files] == files[::-1]  # batches of other tests make files too
    with pytest.raises(openai.BadRequestError):
        client.files.list(after="file-nowhere")
    for file_id in files:
        client.files.delete(file_id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(files[0])


def test_a_policy_that_turns_a_request_away_tells_its_client(tmp_path):
    with running(tmp_path, policy="scorpio") as server, openai_client(server) as client:
        with pytest.raises(openai.InternalServerError) as turned_away:
            client.completions.create(model=MODEL, prompt="x", max_tokens=3,
                                      extra_body={"slo": {"ttft_s": 0.001, "tpot_s": 1.0}})
        assert (turned_away.value.status_code, turned_away.value.code) == (503, "rejected")
        answer = client.completions.create(model=MODEL, prompt="x", max_tokens=3,
                                           extra_body={"slo": {"ttft_s": 60, "tpot_s": 1.0}})
        assert answer.usage.completion_tokens == 3
        assert is_clean(server)
