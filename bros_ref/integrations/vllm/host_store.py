"""The accounts of the host store, in which `connector.py` keeps the KV of preempted requests. No vLLM, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bros_ref.config import cdiv


@dataclass
class Copies:
    """What to copy in one step, as pairs (block of vLLM's pool, block of the host store): first all saves, then all
    loads, then the forward pass runs."""

    saves: list[tuple[int, int]] = field(default_factory=list)
    loads: list[tuple[int, int]] = field(default_factory=list)


class HostStore:
    """A fixed number of host blocks. Each is free, or holds a block of one preempted request.

    A request's host blocks cover its tokens from the first one on. If too few blocks are free, only its first tokens
    are kept and the others recomputed: what is stored is never dropped to store something else. Within a step, all
    calls of `save` must precede those of `load`, as the copies do: the blocks of a loaded request are free for others.

    Args:
        num_blocks: size of the store, in blocks of vLLM's pool.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.clear()

    def clear(self) -> None:
        """Forgets everything that is stored."""
        self._free = list(reversed(range(self.num_blocks)))
        self._stored: dict[str, tuple[int, list[int]]] = {}  # request id -> tokens, host blocks
        self._copies = Copies()

    def save(self, request_id: str, block_ids: Sequence[int], num_tokens: int) -> None:
        """Stores the first `num_tokens` tokens of a request that is being preempted, or as many as there is room for.

        Args:
            block_ids: the request's blocks in vLLM's pool, in order. They may be overwritten from this step on.
        """
        self.free(request_id)
        count = min(cdiv(num_tokens, self.block_size), len(self._free))
        if count > 0:
            host_ids = [self._free.pop() for _ in range(count)]
            self._stored[request_id] = min(num_tokens, count * self.block_size), host_ids
            self._copies.saves += zip(block_ids, host_ids, strict=False)  # there may be empty blocks behind

    def num_tokens(self, request_id: str) -> int:
        """How many of the request's first tokens are stored."""
        return self._stored[request_id][0] if request_id in self._stored else 0

    def load(self, request_id: str, block_ids: Sequence[int], start: int, end: int) -> None:
        """Copies tokens `start` to `end` back. `block_ids`: the request's new blocks in vLLM's pool, in order."""
        _, host_ids = self._stored[request_id]
        for index in range(start // self.block_size, cdiv(end, self.block_size)):
            self._copies.loads.append((block_ids[index], host_ids[index]))

    def free(self, request_id: str) -> None:
        """Forgets a request that was resumed or has ended. One that has nothing stored is fine."""
        if request_id in self._stored:
            self._free += self._stored.pop(request_id)[1]

    def take_copies(self) -> Copies:
        """The copies of this step."""
        copies, self._copies = self._copies, Copies()
        return copies

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free)
