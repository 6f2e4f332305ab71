"""A server in a process of its own, over the ChecksumModel, to be killed. The fork server has imported everything
once, so that a start takes a fraction of a second."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

START_TIMEOUT_S = 60
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["bros_ref.server.run", "bros_ref.engine.build"])


def serve(data_dir: Path, ready: Connection, settings: dict[str, object]) -> None:
    """The body of the process: a server until a signal comes; its port goes through the pipe."""
    import torch
    from server.support import make_state

    from bros_ref.server.run import DrainingServer, open_socket

    torch.set_num_threads(1)
    state, _ = make_state(data_dir, **settings)
    listener = open_socket("127.0.0.1", 0)
    DrainingServer(state, lambda: ready.send(listener.getsockname()[1])).run([listener])


class KillableServer:
    """Starts at once; `url` is known when it answers."""

    def __init__(self, data_dir: Path, **settings: object) -> None:
        ready, theirs = _context.Pipe(duplex=False)
        self.process = _context.Process(target=serve, args=(data_dir, theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        assert ready.poll(START_TIMEOUT_S), "the server did not start"
        self.url = f"http://127.0.0.1:{ready.recv()}"

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def terminate(self, timeout_s: float = 30) -> None:
        """SIGTERM, and the wait for an orderly end."""
        self._end(signal.SIGTERM, timeout_s)

    def _end(self, what: signal.Signals, timeout_s: float = 30) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, what)
        self.process.join(timeout_s)
        assert not self.process.is_alive(), "the server did not end in time"
