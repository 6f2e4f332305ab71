"""The bidirectional KV cache (paper, section 3): an RT and a BE request share a block from its two ends.

RT tokens fill a block from the left, BE tokens from the right. When an RT request needs room, in this order:

    1. empty blocks;
    2. *sharing*: the free middle slots of a pending BE's block, which costs nothing;
    3. *preemption*: slots that hold BE tokens. Only the slots about to be overwritten are copied to the host, just
       before the overwrite (lazy checkpointing), newest token first, so a BE keeps a prefix of every block.

Before that BE runs again, only what it lost is copied back: in place if the RT has left, else by *relocation* to an
empty block, with surviving tokens copied on the device and the rest from the host (relocation is our decision).

`unit` selects the ablations: "slot" is the paper's; "block" and "request" preempt whole blocks or whole requests, as
ordinary swapping does. This file handles no tensors and no deadlines; the caller says who is preempted first.
Invariants, all recounted by `check_integrity`: rt_fill + live BE tokens <= B in each block; every BE token is on the
device or in the host store; a released block is in no table. Each operation is O(blocks it touches).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from itertools import islice
from typing import Literal, NamedTuple

from bros_ref.config import KVCacheConfig
from bros_ref.kv_cache.blocks import ON_HOST, CacheIntegrityError, HostStore, KVBlock, KVSequence
from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.request import Request

PreemptionUnit = Literal["slot", "block", "request"]
MAX_SHARING_PROBES = 16  # pending BE requests looked at for a free middle; keeps an allocation O(blocks it touches)


class PreemptionRow(NamedTuple):
    """One row of the preemption table: a BE block that shares slots or has offloaded tokens."""

    be_request: str
    logical_block: int
    block_id: int  # ON_HOST if nothing of it is left on the device
    rt_request: str | None
    offloaded_tokens: int


class BidirectionalKVCacheManager(KVCacheManager):
    """Up to two owners per block, preemption by slots, lazy checkpoints, partial restores."""

    def __init__(self, config: KVCacheConfig, unit: PreemptionUnit = "slot") -> None:
        super().__init__(config)
        self.unit = unit

    def _clear(self) -> None:
        super()._clear()
        self.host = HostStore(self.config.host_blocks)
        self._be_order: Sequence[Request] = ()

    def begin_step(self, be_order: Sequence[Request] = ()) -> None:
        super().begin_step()
        if not self._changes.copies:  # else the last step ran nobody, and its copies are still to be made
            self.host.begin_step()
        self._be_order = be_order

    # -- allocation -------------------------------------------------------------------------------------------

    def allocate_slots(self, request: Request, num_new_tokens: int, lookahead_tokens: int = 0) -> list[int] | None:
        """Room for more tokens, as in the base class; the request's offloaded tokens are restored too.

        An RT may take slots of BE requests that have not been scheduled in this step, in the order given to
        `begin_step`, last one first. A BE is given empty blocks only. `lookahead_tokens` is not supported here.
        """
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            sequence = KVSequence(request.request_id, request.is_rt, self.block_size)
        elif num_new_tokens <= sequence.headroom:
            sequence.headroom -= num_new_tokens
            sequence.num_slots += num_new_tokens
            sequence.step = self._step
            return sequence.block_ids
        grow = self._grow_rt if request.is_rt else self._grow_be
        if not grow(sequence, num_new_tokens):
            return None
        self._sequences[request.request_id] = sequence
        sequence.step = self._step
        tail = self.pool.blocks[sequence.block_ids[-1]]
        alone = tail.be is None if sequence.is_rt else tail.rt is None
        sequence.headroom = len(sequence.block_ids) * self.block_size - sequence.num_slots if alone else 0
        return sequence.block_ids

    def _grow_rt(self, sequence: KVSequence, num_new_tokens: int) -> bool:
        """Empty blocks first, then free middles, then slots of BE tokens. False: not possible, nothing changed."""
        size, wanted_slots = self.block_size, sequence.num_slots + num_new_tokens
        swapped = [index for index, block_id in enumerate(sequence.block_ids) if block_id == ON_HOST]
        num_new = self.blocks_for(wanted_slots) - len(sequence.block_ids)

        # 1. In the tail block the RT front may meet BE tokens; a BE that runs in this step keeps its slots.
        host_needed, tail = 0, None
        if sequence.block_ids and sequence.block_ids[-1] != ON_HOST:
            tail = self.pool.blocks[sequence.block_ids[-1]]
            tail_fill = min(size, wanted_slots - tail.rt_index * size)
            if tail.be is not None and tail_fill + tail.be_live > size:
                if tail.be.step == self._step:
                    return False
                host_needed = tail.be_index not in tail.be.host_blocks

        # 2. Find all blocks before changing anything.
        num_preempted = len(swapped) + num_new - len(self.pool.free_ids)
        last_fill = wanted_slots - (self.blocks_for(wanted_slots) - 1) * size
        taken = self._find_preemptible(num_preempted, last_fill)
        if taken is None:
            return False
        losing = taken
        if self.unit == "slot" and taken and taken[-1][0].live(taken[-1][1]) + last_fill <= size:
            losing = taken[:-1]  # the partly filled block fits between its best-effort owner's tokens: nothing is saved
        if not self._host_has_room(losing, host_needed):
            return False

        # 3. Coarse units free the blocks first; the slot unit moves in beside their owners.
        if self.unit == "slot":
            joined = [self.pool.blocks[victim.block_ids[index]] for victim, index in taken]
        else:
            joined = []
            for victim, index in taken:
                self._evict(victim, index)
        free = [self.pool.take_free() for _ in range(len(swapped) + num_new - len(joined))]
        touched = free + joined  # the shared block comes last: it is to hold the partly filled tail
        for block, index in zip(touched, swapped, strict=False):
            self.pool.replace(sequence, index, block)
            self._log_block(sequence, index)
        for block in touched[len(swapped):]:
            self.pool.attach(sequence, block)
            self._log_block(sequence, len(sequence.block_ids) - 1)

        # 4. Now the front advances: save what it is about to overwrite, then bring back what this RT had lost.
        restored = list(sequence.offloaded)
        for index in restored:
            self._restore(sequence, index)
        sequence.num_slots = wanted_slots
        for block in touched if tail is None else [tail, *touched]:
            self._make_way(block)
        return True

    def _grow_be(self, sequence: KVSequence, num_new_tokens: int) -> bool:
        """Restore in place or relocate, then grow; empty blocks only. False: not enough, nothing changed."""
        moves, num_new = self._be_needs(sequence, num_new_tokens)
        if len(moves) + num_new > len(self.pool.free_ids):
            return False
        for index in moves:
            self._relocate(sequence, index)
        for index in list(sequence.offloaded):
            self._restore(sequence, index)
        for _ in range(num_new):
            self._attach_free(sequence)
        sequence.num_slots += num_new_tokens
        return True

    def _be_needs(self, sequence: KVSequence, num_new_tokens: int) -> tuple[list[int], int]:
        """Logical blocks that must move to an empty block before this BE runs, and how many more blocks it needs."""
        blocks, table = self.pool.blocks, sequence.block_ids
        moves = [i for i in sequence.offloaded if table[i] == ON_HOST or blocks[table[i]].rt is not None]
        tail = len(table) - 1
        if tail >= 0 and tail not in moves:
            block, fill = blocks[table[tail]], sequence.fill(tail)
            if block.rt is not None and block.rt_fill + fill + num_new_tokens > self.block_size:
                moves.append(tail)
        return moves, self.blocks_for(sequence.num_slots + num_new_tokens) - len(table)

    # -- giving room back -------------------------------------------------------------------------------------

    def reclaim(self, request: Request, num_new_tokens: int) -> bool:
        """Last resort for a BE that needs empty blocks: swap out blocks of the BE requests ordered after it.

        Returns:
            Whether `allocate_slots` will now succeed; if not, nothing has changed.
        """
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            sequence = KVSequence(request.request_id, request.is_rt, self.block_size)
        moves, num_new = self._be_needs(sequence, num_new_tokens)
        taken = self._take(self._preemptible(stop_at=request), len(moves) + num_new - len(self.pool.free_ids))
        if taken is None or not self._host_has_room(taken):
            return False
        for victim, index in taken:
            self._evict(victim, index)
        return True

    def swap_out(self, request_id: str) -> bool:
        """Moves all tokens of a request that is not in the current batch to the host.

        Returns:
            False if the host store has no room for them; then nothing has changed.
        """
        sequence = self._sequences[request_id]
        held = [(sequence, index) for index, block_id in enumerate(sequence.block_ids) if block_id != ON_HOST]
        if not self._host_has_room(held):
            return False
        for _, index in reversed(held):
            self._evict(sequence, index)
        return True

    def free(self, request_id: str) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        for index in range(len(sequence.block_ids) - 1, -1, -1):
            if sequence.block_ids[index] != ON_HOST:
                self.pool.detach(sequence, index)
        for host_block in sequence.host_blocks.values():
            self.host.release(host_block)
        self.offloaded_tokens.pop(request_id, None)
        self._changes.block_changes.append([request_id, -1, -1])

    # -- choosing what to preempt -----------------------------------------------------------------------------

    def _preemptible(self, stop_at: Request | None = None) -> Iterator[tuple[KVSequence, int]]:
        """BE blocks that may be taken: the last BE of the order first, its newest block first, so that damage is
        concentrated on few requests (our decision). Blocks that already host an RT are not offered."""
        for request in reversed(self._be_order):
            if request is stop_at:
                return
            victim = self._sequences.get(request.request_id)
            if victim is None or victim.step == self._step:
                continue
            for index in range(len(victim.block_ids) - 1, -1, -1):
                block_id = victim.block_ids[index]
                if block_id != ON_HOST and self.pool.blocks[block_id].rt is None:
                    yield victim, index

    def _find_preemptible(self, count: int, last_fill: int) -> list[tuple[KVSequence, int]] | None:
        """`count` BE blocks for an RT whose last block will hold `last_fill` tokens; None if there are fewer."""
        if count <= 0:
            return []
        shared = self._find_free_middle(last_fill) if self.unit == "slot" else None
        if shared is None:
            return self._take(self._preemptible(), count)
        taken = self._take((other for other in self._preemptible() if other != shared), count - 1)
        return None if taken is None else [*taken, shared]

    def _find_free_middle(self, num_tokens: int) -> tuple[KVSequence, int] | None:
        """A pending BE's tail block whose free slots hold `num_tokens` RT tokens without loss."""
        for request in islice(reversed(self._be_order), MAX_SHARING_PROBES):
            victim = self._sequences.get(request.request_id)
            if victim is None or victim.step == self._step:
                continue
            tail = len(victim.block_ids) - 1
            block_id = victim.block_ids[tail]
            if (block_id != ON_HOST and self.pool.blocks[block_id].rt is None
                    and victim.live(tail) + num_tokens <= self.block_size):
                return victim, tail
        return None

    def _take(self, offered: Iterator[tuple[KVSequence, int]], count: int) -> list[tuple[KVSequence, int]] | None:
        """The first `count` blocks offered; with unit "request", the rest of the last victim too."""
        if count <= 0:
            return []
        taken = list(islice(offered, count))
        if len(taken) < count:
            return None
        if self.unit == "request":
            for victim, index in offered:
                if victim is not taken[-1][0]:
                    break
                taken.append((victim, index))
        return taken

    def _host_has_room(self, taken: list[tuple[KVSequence, int]], extra: int = 0) -> bool:
        needed = extra + sum(index not in victim.host_blocks for victim, index in taken)
        return needed <= len(self.host.free_ids)

    # -- moving tokens ----------------------------------------------------------------------------------------

    def _make_way(self, block: KVBlock) -> None:
        """Checkpoints the BE tokens that the RT front of this block has just claimed."""
        victim = block.be
        if victim is None:
            return
        victim.headroom = 0  # its free run now ends at a moving RT front
        excess = block.rt_fill + block.be_live - self.block_size
        if excess > 0:
            self._checkpoint(victim, block.be_index, excess)
            if block.be_live == 0:
                self._detach(victim, block.be_index)

    def _evict(self, sequence: KVSequence, index: int) -> None:
        """Moves a whole logical block to the host and leaves its device block."""
        self._checkpoint(sequence, index, sequence.live(index))
        self._detach(sequence, index)

    def _checkpoint(self, sequence: KVSequence, index: int, count: int) -> None:
        """Orders the copy of the newest `count` live tokens of a logical block to the host."""
        host_block = sequence.host_blocks.get(index)
        if host_block is None:
            host_block = sequence.host_blocks[index] = self.host.free_ids.pop()
        live, copies = sequence.live(index), self._changes.copies
        first = host_block * self.block_size
        copies.checkpoint += zip(sequence.slots(index, live - count, live), range(first + live - count, first + live),
                                 strict=True)
        copies.checkpointed_requests.add(sequence.request_id)
        sequence.offloaded[index] = sequence.offloaded.get(index, 0) + count
        self.offloaded_tokens[sequence.request_id] = self.offloaded_tokens.get(sequence.request_id, 0) + count
        sequence.headroom = 0
        self._log_lost(sequence, index)

    def _relocate(self, sequence: KVSequence, index: int) -> None:
        """Gives a logical block an empty block of its own and orders the copy of its survivors."""
        sources = range(0)
        if sequence.block_ids[index] != ON_HOST:
            sources = sequence.slots(index, 0, sequence.live(index))
            self.pool.detach(sequence, index)
        self.pool.replace(sequence, index, self.pool.take_free())
        self._log_block(sequence, index)
        self._changes.copies.relocate += zip(sources, sequence.slots(index, 0, len(sources)), strict=True)

    def _restore(self, sequence: KVSequence, index: int) -> None:
        """Orders the copy of a logical block's lost tokens back to the device; its host block is done with."""
        offloaded, fill = sequence.offloaded.pop(index), sequence.fill(index)
        host_block = sequence.host_blocks.pop(index)
        first = host_block * self.block_size
        self._changes.copies.restore += zip(range(first + fill - offloaded, first + fill),
                                            sequence.slots(index, fill - offloaded, fill), strict=True)
        self.offloaded_tokens[sequence.request_id] -= offloaded
        if not self.offloaded_tokens[sequence.request_id]:
            del self.offloaded_tokens[sequence.request_id]
        self.host.release(host_block)
        self._log_lost(sequence, index)

    def _detach(self, sequence: KVSequence, index: int) -> None:
        self.pool.detach(sequence, index)
        self._log_block(sequence, index)

    def _log_block(self, sequence: KVSequence, index: int) -> None:
        self._changes.block_changes.append([sequence.request_id, index, sequence.block_ids[index]])

    def _log_lost(self, sequence: KVSequence, index: int) -> None:
        self._changes.offloaded.append([sequence.request_id, index, sequence.offloaded.get(index, 0)])

    # -- questions --------------------------------------------------------------------------------------------

    def frees_blocks_for(self, victim_id: str, request_id: str) -> bool:
        """A victim that only shares blocks empties none, but it still helps a request that it shares a block with."""
        blocks = (self.pool.blocks[block_id] for block_id in self.block_table(victim_id) if block_id != ON_HOST)
        return any(block.rt is None or block.rt.request_id in (victim_id, request_id) for block in blocks)

    def _blocks_missing(self, request: Request, num_new_tokens: int) -> int:
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return self.blocks_for(num_new_tokens)
        if request.is_rt:
            num_new = self.blocks_for(sequence.num_slots + num_new_tokens) - len(sequence.block_ids)
            return sequence.block_ids.count(ON_HOST) + num_new
        moves, num_new = self._be_needs(sequence, num_new_tokens)
        return len(moves) + num_new

    def _num_emptied(self, victim_id: str, leaving_ids: Set[str]) -> int:
        blocks = (self.pool.blocks[block_id] for block_id in self.block_table(victim_id) if block_id != ON_HOST)
        return sum(block.rt is None or (block.rt.request_id == victim_id and (
            block.be is None or block.be.request_id in leaving_ids)) for block in blocks)

    def preemption_table(self) -> list[PreemptionRow]:
        """Every BE block that shares a device block or has offloaded tokens (paper: the preemption table). It is
        derived from the sequences and blocks on each call, so it cannot go stale."""
        rows = []
        for sequence in self._sequences.values():
            if sequence.is_rt:
                continue
            for index, block_id in enumerate(sequence.block_ids):
                rt = self.pool.blocks[block_id].rt if block_id != ON_HOST else None
                offloaded = sequence.offloaded.get(index, 0)
                if rt is not None or offloaded:
                    rt_id = None if rt is None else rt.request_id
                    rows.append(PreemptionRow(sequence.request_id, index, block_id, rt_id, offloaded))
        return rows

    def check_integrity(self) -> None:
        super().check_integrity()
        in_use: list[int] = []
        for sequence in self._sequences.values():
            in_use += sequence.host_blocks.values()
            self._check_lost(sequence)
        if len(set(in_use)) != len(in_use) or len(in_use) + self.host.num_unused != self.host.num_blocks:
            raise CacheIntegrityError(f"host store: {len(in_use)} blocks in use ({len(set(in_use))} distinct) + "
                                      f"{self.host.num_unused} unused != {self.host.num_blocks}")

    def _check_lost(self, sequence: KVSequence) -> None:
        who, num_offloaded = f"request {sequence.request_id!r}", self.offloaded_tokens.get(sequence.request_id, 0)
        if num_offloaded != sum(sequence.offloaded.values()) or set(sequence.offloaded) != set(sequence.host_blocks):
            raise CacheIntegrityError(f"{who}: {num_offloaded} lost tokens, by block {sequence.offloaded}, "
                                      f"host blocks {sequence.host_blocks}")
        for index, block_id in enumerate(sequence.block_ids):
            offloaded, fill = sequence.offloaded.get(index, 0), sequence.fill(index)
            if not (offloaded == fill if block_id == ON_HOST else 0 <= offloaded < fill):
                raise CacheIntegrityError(f"{who}: logical block {index} has {fill} tokens, {offloaded} of them on the "
                                          f"host only, and device block {block_id}")
