"""A server in this process: a real socket on 127.0.0.1, a free port, the ChecksumModel behind it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bros_ref.engine.build import LiveSettings, load_model, make_engine, make_runner
from bros_ref.server.run import DrainingServer, open_socket
from bros_ref.server.settings import ServerSettings
from bros_ref.server.state import ServerState

MODEL = "checksum"
LIVE = LiveSettings(kv_blocks=64, block_size=16, max_num_seqs=8, max_num_batched_tokens=256)


@dataclasses.dataclass
class Running:
    """A server that answers at `url`, and its parts."""

    url: str
    state: ServerState
    engine: object

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


def make_state(data_dir: Path, policy: str = "bros-plus", live: LiveSettings = LIVE, model: str = MODEL, runner=None,
               **settings: object) -> tuple[ServerState, object]:
    loaded = load_model(model, "cpu")
    real = make_runner(loaded, live)
    engine = make_engine(policy, loaded, real, live)
    if runner is not None:
        engine.runner = runner(real)
    chosen = ServerSettings(**{"model_id": model, "data_dir": data_dir, "drain_s": 5.0, **settings})
    return ServerState(engine, loaded, chosen), engine


@contextlib.contextmanager
def running(data_dir: Path, **options: object) -> Iterator[Running]:
    state, engine = make_state(data_dir, **options)
    listener = open_socket("127.0.0.1", 0)
    server = DrainingServer(state)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", state, engine)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition, timeout_s: float = 60.0) -> None:
    """Waits for a condition; fails the test if it does not come."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)
