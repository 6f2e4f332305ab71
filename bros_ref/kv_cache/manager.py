"""The paged baseline: fixed-size blocks, one owner each, no host memory. Every policy can run on it.

It knows block tables and lengths, but no tensors, no deadlines and no order among requests. Invariant: a block is
empty or in exactly one block table, and every request's tokens lie in its own blocks.

The interface, which `bidirectional.py` extends, has four calls per step:

    begin_step(be_order)          starts an iteration with an empty batch
    allocate_slots(request, n)    -> the block table with room for n more tokens, or None: no room now, nothing changed
    free(request_id)              the request leaves; its blocks are empty at once
    take_changes()                the copies to run before the forward pass, and what changed in the tables
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from bros_ref.config import KVCacheConfig, cdiv
from bros_ref.kv_cache.blocks import ON_HOST, BlockPool, BlockView, CacheIntegrityError, KVChanges, KVSequence
from bros_ref.request import Request


class KVCacheManager:
    """Paged KV accounting as in PagedAttention (Kwon et al., SOSP 2023), without prefix sharing.

    Attributes:
        offloaded_tokens: request id -> tokens to copy back from the host before it can run, its restore debt; only
            requests that have one are listed, and the baseline has none.
    """

    def __init__(self, config: KVCacheConfig) -> None:
        self.config = config
        self.block_size = config.block_size
        self._clear()

    def _clear(self) -> None:
        """Sets up the accounts of an empty pool."""
        self.pool = BlockPool(self.config.num_blocks)
        self._sequences: dict[str, KVSequence] = {}
        self.offloaded_tokens: dict[str, int] = {}
        self._changes = KVChanges()
        self._step = 0

    # -- the four verbs ---------------------------------------------------------------------------------------

    def begin_step(self, be_order: Sequence[Request] = ()) -> None:
        """Starts an iteration. `be_order`: best-effort requests that hold KV, the one to preempt first at the end;
        the baseline never preempts and ignores it."""
        self._step += 1

    def allocate_slots(self, request: Request, num_new_tokens: int, lookahead_tokens: int = 0) -> list[int] | None:
        """Gives the request room for `num_new_tokens` more tokens, and blocks for `lookahead_tokens` beyond.

        Returns:
            The request's block table (block ids, owned by this manager: read it, do not keep it), or None if the
            pool has not enough empty blocks now; then nothing has changed.
        """
        sequence = self._sequences.get(request.request_id)
        if sequence is not None and num_new_tokens <= sequence.headroom:
            sequence.headroom -= num_new_tokens
            sequence.num_slots += num_new_tokens
            return sequence.block_ids
        if sequence is None:
            sequence = KVSequence(request.request_id, request.is_rt, self.block_size)
        wanted_slots = sequence.num_slots + num_new_tokens + lookahead_tokens
        num_missing = self.blocks_for(wanted_slots) - len(sequence.block_ids)
        if num_missing > len(self.pool.free_ids):
            return None
        self._sequences[request.request_id] = sequence
        for _ in range(num_missing):
            self._attach_free(sequence)
        sequence.num_slots += num_new_tokens
        sequence.headroom = len(sequence.block_ids) * self.block_size - sequence.num_slots
        return sequence.block_ids

    def free(self, request_id: str) -> None:
        """Gives back all blocks of a request. A request that holds none is fine."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        for index in range(len(sequence.block_ids) - 1, -1, -1):
            self.pool.detach(sequence, index)
        self._changes.block_changes.append([request_id, -1, -1])

    def reclaim(self, request: Request, num_new_tokens: int) -> bool:
        """Frees empty blocks for a best-effort request without losing computed tokens; the baseline cannot."""
        return False

    def swap_out(self, request_id: str) -> bool:
        """Moves a whole request to host memory; the baseline has no host memory."""
        return False

    def reset(self) -> None:
        """Empties the pool and the host store, even if an interrupted call left them inconsistent. The next
        `take_changes` reports every table as gone."""
        gone = {str(change[0]): None for change in self._changes.block_changes} | dict.fromkeys(self._sequences)
        self._clear()
        self._changes.block_changes += [[request_id, -1, -1] for request_id in gone]

    def take_changes(self) -> KVChanges:
        """What has changed since the last call. The caller runs the copies before the next forward pass."""
        changes, self._changes = self._changes, KVChanges()
        return changes

    # -- questions --------------------------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that `num_tokens` tokens of one request need."""
        return cdiv(num_tokens, self.block_size)

    def block_table(self, request_id: str) -> list[int]:
        """The request's block ids in logical order; empty if it holds nothing."""
        sequence = self._sequences.get(request_id)
        return [] if sequence is None else sequence.block_ids

    def num_device_blocks(self, request_id: str) -> int:
        """Blocks of the pool in which the request has tokens."""
        table = self.block_table(request_id)
        return len(table) - table.count(ON_HOST)

    def frees_blocks_for(self, victim_id: str, request_id: str) -> bool:
        """Whether removing the victim, which holds blocks, makes more room for the other request."""
        return True

    def fits_without(self, request: Request, num_new_tokens: int, victims: Sequence[Request]) -> bool:
        """Whether `request` would find room for `num_new_tokens` more tokens if all of `victims` gave up their blocks.
        """
        num_missing = self._blocks_missing(request, num_new_tokens) - len(self.pool.free_ids)
        ids = {victim.request_id for victim in victims}
        for victim_id in ids:
            if num_missing <= 0:
                break
            num_missing -= self._num_emptied(victim_id, ids)
        return num_missing <= 0

    def _blocks_missing(self, request: Request, num_new_tokens: int) -> int:
        return self.blocks_for(request.num_computed_tokens + num_new_tokens) - len(self.block_table(request.request_id))

    def _num_emptied(self, victim_id: str, leaving_ids: Set[str]) -> int:
        """Device blocks that are empty once the victim and all others that leave are gone, counted with the victim."""
        return len(self.block_table(victim_id))

    @property
    def num_free_blocks(self) -> int:
        return len(self.pool.free_ids)

    @property
    def num_used_blocks(self) -> int:
        return self.config.num_blocks - len(self.pool.free_ids)

    def snapshot(self) -> list[BlockView]:
        """The owners and fill of every block, [num_blocks]: for tests and teaching, O(pool)."""
        views = []
        for block in self.pool.blocks:
            view = BlockView()
            if block.rt is not None:
                view.rt_owner, view.rt_fill, view.rt_index = block.rt.request_id, block.rt_fill, block.rt_index
            if block.be is not None:
                view.be_owner, view.be_fill = block.be.request_id, block.be.fill(block.be_index)
                view.be_index, view.overwritten = block.be_index, view.be_fill - block.be_live
            views.append(view)
        return views

    def check_integrity(self) -> None:
        """Recounts everything from scratch.

        Raises:
            CacheIntegrityError: something does not add up; the message holds the numbers.
        """
        states = [block.state for block in self.pool.blocks]
        counts = {state: states.count(state) for state in ("EMPTY", "RT_ONLY", "BE_ONLY", "SHARED")}
        free_ids = self.pool.free_ids
        if len(set(free_ids)) != len(free_ids) or counts["EMPTY"] != len(free_ids):
            raise CacheIntegrityError(
                f"free list {len(free_ids)} ({len(set(free_ids))} distinct) but "
                + " + ".join(f"{state} {n}" for state, n in counts.items()) + f" = {len(states)} blocks")
        listed = 0
        for sequence in self._sequences.values():
            listed += self._check_sequence(sequence)
        owned = counts["RT_ONLY"] + counts["BE_ONLY"] + 2 * counts["SHARED"]
        if listed != owned:
            raise CacheIntegrityError(f"block tables list {listed} blocks, but blocks name {owned} owners")

    # -- steps that both managers share -----------------------------------------------------------------------

    def _attach_free(self, sequence: KVSequence) -> None:
        block = self.pool.take_free()
        self.pool.attach(sequence, block)
        self._changes.block_changes.append([sequence.request_id, len(sequence.block_ids) - 1, block.block_id])

    def _check_sequence(self, sequence: KVSequence) -> int:
        """Checks one block table against the blocks; returns how many device blocks it lists."""
        who = f"request {sequence.request_id!r}"
        if len(sequence.block_ids) < self.blocks_for(sequence.num_slots):
            raise CacheIntegrityError(f"{who}: {sequence.num_slots} tokens do not fit its {len(sequence.block_ids)} "
                                      f"blocks of {self.block_size}")
        if len(sequence.block_ids) != len(sequence.epochs):
            raise CacheIntegrityError(f"{who}: {len(sequence.block_ids)} table entries, but {len(sequence.epochs)} "
                                      "epochs: an entry was made or taken behind the manager's back")
        listed = 0
        for index, (block_id, epoch) in enumerate(zip(sequence.block_ids, sequence.epochs, strict=True)):
            if block_id < 0:
                continue
            listed += 1
            if block_id >= self.config.num_blocks:
                raise CacheIntegrityError(f"{who}: table entry {index} says block {block_id}, but the pool has only "
                                          f"blocks 0 to {self.config.num_blocks - 1}")
            block = self.pool.blocks[block_id]
            owner, owner_index = (block.rt, block.rt_index) if sequence.is_rt else (block.be, block.be_index)
            if owner is not sequence or owner_index != index or epoch != block.epoch:
                raise CacheIntegrityError(
                    f"{who}: table entry {index} says block {block_id} epoch {epoch}, but that block is at epoch "
                    f"{block.epoch} and names {owner.request_id if owner else None!r} entry {owner_index}")
            if block.rt_fill + block.be_live > self.block_size:
                raise CacheIntegrityError(f"block {block_id}: {block.rt_fill} RT + {block.be_live} live BE tokens "
                                          f"> {self.block_size} slots")
        return listed
