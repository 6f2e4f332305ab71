"""vLLM's block pool, as our scheduler sees it while it plans one step.

It answers "would this fit?" from vLLM's own block tables and changes none of them. vLLM allocates blocks when it
carries out the plan. If prefix caching shares blocks, the answers are conservative: a shared block counts as new for a
request that is admitted, and as not freed when one of its owners leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bros_ref.config import KVCacheConfig
from bros_ref.kv_cache.blocks import KVChanges
from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.request import Request


class VLLMBlocks(KVCacheManager):
    """A `KVCacheManager` for a plan. There is no host memory, so preemption is by recomputation.

    Args:
        manager: vLLM's `KVCacheManager` with one group of blocks; each block has one owner or is a shared prefix.
        block_size: slots per block.
    """

    def __init__(self, manager: Any, block_size: int) -> None:
        self._manager = manager
        super().__init__(KVCacheConfig(manager.block_pool.num_gpu_blocks - 1, block_size))  # vLLM keeps one as null

    def _clear(self) -> None:
        self.offloaded_tokens = {}
        self._free: int = self._manager.block_pool.get_num_free_blocks()
        self._granted: dict[str, int] = {}  # request id -> blocks that the plan adds
        self._gone: set[str] = set()  # ids of requests that the plan preempts

    def begin_step(self, be_order: Sequence[Request] = ()) -> None:
        self._clear()

    def allocate_slots(self, request: Request, num_new_tokens: int, lookahead_tokens: int = 0) -> list[int] | None:
        num_missing = self._blocks_missing(request, num_new_tokens + lookahead_tokens)
        if num_missing > self._free:
            return None
        if num_missing > 0:
            self._free -= num_missing
            self._granted[request.request_id] = self._granted.get(request.request_id, 0) + num_missing
        return []  # the real table is vLLM's

    def free(self, request_id: str) -> None:
        self._free += self._num_emptied(request_id, frozenset())
        self._granted.pop(request_id, None)
        self._gone.add(request_id)

    def take_changes(self) -> KVChanges:
        return KVChanges()

    def num_device_blocks(self, request_id: str) -> int:
        return len(self._held(request_id)) + self._granted.get(request_id, 0)

    def fits_without(self, request: Request, num_new_tokens: int, victims: Sequence[Request]) -> bool:
        emptied = sum(self._num_emptied(victim_id, frozenset()) for victim_id in {v.request_id for v in victims})
        return self._blocks_missing(request, num_new_tokens) <= self._free + emptied

    def _blocks_missing(self, request: Request, num_new_tokens: int) -> int:
        return (self.blocks_for(request.num_computed_tokens + num_new_tokens)
                - self.num_device_blocks(request.request_id))

    def _num_emptied(self, victim_id: str, leaving_ids: object) -> int:
        return int(sum(block.ref_cnt == 1 for block in self._held(victim_id))) + self._granted.get(victim_id, 0)

    def _held(self, request_id: str) -> Sequence[Any]:
        blocks: Sequence[Any] = self._manager.get_blocks(request_id).blocks[0]
        return () if request_id in self._gone else blocks

    @property
    def num_free_blocks(self) -> int:
        return self._free

    @property
    def num_used_blocks(self) -> int:
        return self.config.num_blocks - self._free
