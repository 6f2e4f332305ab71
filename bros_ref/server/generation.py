"""The state of one call: the engine's thread fills it, and a coroutine reads it.

A call has one generation for each of its choices; they share a channel. The engine's thread pushes only through the
event loop, so everything here runs in one thread and needs no lock. Invariant: each generation's last item is an
`Ended`, and at most `max_buffered` pieces of a call wait to be read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from bros_ref.request import Request, TokenLogprob
from bros_ref.server.errors import APIError


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added: new text (empty while a character is incomplete or a stop string may have begun), and its
    log-probabilities if requested. A token without text is passed on too: clients measure when tokens arrive."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The end: "stop" or "length", or an error in place of a reason. `num_tokens` is how many were generated."""

    finish_reason: str | None
    num_tokens: int
    error: APIError | None = None


class Generation:
    """A request and the text generated for it so far.

    Attributes:
        request: what the engine runs.
        index: which choice of its call it is.
        admitted: done once the engine has answered; its result is None or the error that refused the request.
    """

    def __init__(self, request: Request, index: int, channel: asyncio.Queue[tuple[int, Piece | Ended]],
                 max_buffered: int) -> None:
        self.request, self.index = request, index
        self.loop = asyncio.get_running_loop()
        self.admitted: asyncio.Future[APIError | None] = self.loop.create_future()
        self._channel, self._max_buffered = channel, max_buffered
        self._overflowed = False

    def push(self, item: Piece | Ended) -> bool:
        """Hands over an item. Returns False if it is not being read: the request must be aborted."""
        if isinstance(item, Piece):
            self._overflowed = self._overflowed or self._channel.qsize() >= self._max_buffered
            if self._overflowed:
                return False
        self._channel.put_nowait((self.index, item))
        return True

    def settle(self, error: APIError | None) -> None:
        """Says whether the engine has taken the request."""
        if not self.admitted.done():
            self.admitted.set_result(error)


class Call:
    """All generations of one HTTP request, or of one line of a batch."""

    def __init__(self, requests: Sequence[Request], max_buffered: int) -> None:
        self._channel: asyncio.Queue[tuple[int, Piece | Ended]] = asyncio.Queue()
        self.generations = [Generation(request, index, self._channel, max_buffered)
                            for index, request in enumerate(requests)]

    async def items(self) -> AsyncIterator[tuple[int, Piece | Ended]]:
        """(choice, piece) as they come; of every choice the last is an `Ended`."""
        running = len(self.generations)
        while running:
            index, item = await self._channel.get()
            running -= isinstance(item, Ended)
            yield index, item
