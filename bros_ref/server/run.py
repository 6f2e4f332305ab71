"""Serves an application on a socket until a signal, then stops in order: no new requests, real-time ones finish,
best-effort ones end at once (lines of batches go on at the next start), everything within a bound."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from bros_ref.server.app import create_app
from bros_ref.server.settings import MAX_HEADER_BYTES
from bros_ref.server.state import ServerState


class DrainingServer(uvicorn.Server):
    """uvicorn, which ends best-effort work before it waits for open connections."""

    def __init__(self, state: ServerState, on_ready: Callable[[], None] | None = None) -> None:
        settings = state.settings
        super().__init__(uvicorn.Config(
            create_app(state), log_level="warning", access_log=False, server_header=False,
            h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
            timeout_graceful_shutdown=max(1, int(settings.drain_s))))
        self._state, self._on_ready = state, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_ready is not None:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._state.drain()
        await super().shutdown(sockets)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 takes a free one.

    Raises:
        ValueError: the address cannot be used; the message says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}; "
                         "choose another --host or --port") from None
    return listener
