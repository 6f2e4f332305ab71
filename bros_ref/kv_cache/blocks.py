"""The data types of KV accounting: blocks, the sequences that own them, the pool, the host store, pending copies.

    one block of B = 8 slots, owned from both ends            slot = block * B + (offset if RT else B - 1 - offset)

        slot      0    1    2    3    4    5    6    7
                 [R0] [R1] [R2] [  ] [  ] [B2] [B1] [B0]      rt_fill = 3, be_fill = 3
                  RT ----------->        <----------- BE

No tensors and no policy here: integers and lists only. The fill of a block is never stored: it follows from its
owner's length (`KVSequence.fill`), so the two cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ON_HOST = -1  # in a block table: this block's tokens live in the host store only


class CacheIntegrityError(AssertionError):
    """The accounts do not add up. The message carries all the numbers."""


@dataclass(slots=True)
class BlockView:
    """One block at one moment. RT tokens fill slots from the left; BE tokens from the right, of which the newest
    `overwritten` are no longer there (they live on the host).

    `rt_index`, `be_index`: which logical block of its owner this is, so that a figure can name token positions; two
    views of the same slots are equal whether or not their maker filled them in.
    """

    rt_owner: str | None = None
    rt_fill: int = 0
    be_owner: str | None = None
    be_fill: int = 0
    overwritten: int = 0
    rt_index: int = field(default=0, compare=False)
    be_index: int = field(default=0, compare=False)

    @property
    def state(self) -> str:
        """"empty" | "rt_only" | "be_only" | "shared"."""
        if self.rt_owner is not None and self.be_owner is not None:
            return "shared"
        if self.rt_owner is not None:
            return "rt_only"
        return "empty" if self.be_owner is None else "be_only"


@dataclass(eq=False, slots=True)
class KVSequence:
    """One request's KV: which block holds which part of it, and which tokens live on the host only.

    Token t lies in logical block `t // B` at offset `t % B`. `offloaded[i]` is how many of the *newest* tokens of
    logical block i live on the host only; what survives on the device is always a prefix of the block's tokens
    (paper, 3).
    """

    request_id: str
    is_rt: bool
    block_size: int
    block_ids: list[int] = field(default_factory=list)  # the block table; ON_HOST where no device block is held
    epochs: list[int] = field(default_factory=list)  # the epoch of each block when it was taken
    num_slots: int = 0  # tokens stored, or reserved by the current step
    headroom: int = 0  # tokens that can be appended without looking at any block
    step: int = -1  # the step it was last given slots in: a sequence of the current step is no victim
    offloaded: dict[int, int] = field(default_factory=dict)  # logical block -> newest tokens that are on the host only
    host_blocks: dict[int, int] = field(default_factory=dict)  # logical block -> block of the host store

    def fill(self, index: int) -> int:
        """Tokens in logical block `index`, wherever they are."""
        return max(0, min(self.block_size, self.num_slots - index * self.block_size))

    def live(self, index: int) -> int:
        """Tokens of logical block `index` that are on the device."""
        return self.fill(index) - self.offloaded.get(index, 0)

    def slot(self, index: int, offset: int) -> int:
        """Physical slot of a token, RT counting from the left end of its block and BE from the right."""
        return self.block_ids[index] * self.block_size + (offset if self.is_rt else self.block_size - 1 - offset)

    def slots(self, index: int, start: int, stop: int) -> range:
        """`slot` of the offsets [start, stop) of a logical block."""
        first = self.slot(index, start)
        return range(first, first + stop - start) if self.is_rt else range(first, first - stop + start, -1)


@dataclass(eq=False, slots=True)
class KVBlock:
    """B slots with at most one RT and one BE owner. `epoch` is bumped on detach, so a stale entry is detected."""

    block_id: int
    rt: KVSequence | None = None
    rt_index: int = 0
    be: KVSequence | None = None
    be_index: int = 0
    epoch: int = 0

    @property
    def rt_fill(self) -> int:
        return 0 if self.rt is None else self.rt.fill(self.rt_index)

    @property
    def be_live(self) -> int:
        return 0 if self.be is None else self.be.live(self.be_index)

    @property
    def state(self) -> str:
        """EMPTY, RT_ONLY (never offered to BE), BE_ONLY (preemptible while its owner sits out) or SHARED."""
        if self.rt is not None:
            return "RT_ONLY" if self.be is None else "SHARED"
        return "EMPTY" if self.be is None else "BE_ONLY"


class BlockPool:
    """All blocks, and which of them are empty. The last one released is given out first: it may still be in a cache."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [KVBlock(i) for i in range(num_blocks)]
        self.free_ids = list(range(num_blocks - 1, -1, -1))

    def attach(self, sequence: KVSequence, block: KVBlock) -> None:
        """Makes `block` the next one of the sequence's table."""
        self._own(sequence, len(sequence.block_ids), block)
        sequence.block_ids.append(block.block_id)
        sequence.epochs.append(block.epoch)

    def replace(self, sequence: KVSequence, index: int, block: KVBlock) -> None:
        """Makes `block` the home of the sequence's logical block `index`, which must have none."""
        assert sequence.block_ids[index] == ON_HOST
        self._own(sequence, index, block)
        sequence.block_ids[index] = block.block_id
        sequence.epochs[index] = block.epoch

    def detach(self, sequence: KVSequence, index: int) -> None:
        """Removes the sequence as an owner of its logical block `index`; a block without owners becomes empty."""
        block = self.blocks[sequence.block_ids[index]]
        if sequence.is_rt:
            block.rt = None
        else:
            block.be = None
        block.epoch += 1
        other = block.be if sequence.is_rt else block.rt
        if other is None:
            self.free_ids.append(block.block_id)
        else:
            other.epochs[block.be_index if sequence.is_rt else block.rt_index] = block.epoch
        sequence.block_ids[index] = ON_HOST

    def take_free(self) -> KVBlock:
        return self.blocks[self.free_ids.pop()]

    @staticmethod
    def _own(sequence: KVSequence, index: int, block: KVBlock) -> None:
        if sequence.is_rt:
            assert block.rt is None
            block.rt, block.rt_index = sequence, index
        else:
            assert block.be is None
            block.be, block.be_index = sequence, index


class HostStore:
    """Accounts of the checkpoint store: one host block for each BE block with a token on the host.

    A released block is reusable only from the next step on: within a step, copies to the host run before copies
    from it, so a block that is still to be read must not be written first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_ids = list(range(num_blocks - 1, -1, -1))
        self._released: list[int] = []

    def release(self, host_block: int) -> None:
        self._released.append(host_block)

    def begin_step(self) -> None:
        if self._released:
            self.free_ids += self._released
            self._released.clear()

    @property
    def num_unused(self) -> int:
        return len(self.free_ids) + len(self._released)


@dataclass(slots=True)
class CopyPlan:
    """Slot copies that must run before the step's forward pass, in this order; pairs are (from, to).

    checkpoint: device slot -> host slot.  relocate: device slot -> device slot (all reads before all writes).
    restore: host slot -> device slot.  `checkpointed_requests`: whose tokens the checkpoints save: if the copies
    fail, the KV of these requests can no longer be trusted.
    """

    checkpoint: list[tuple[int, int]] = field(default_factory=list)
    relocate: list[tuple[int, int]] = field(default_factory=list)
    restore: list[tuple[int, int]] = field(default_factory=list)
    checkpointed_requests: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.checkpoint or self.relocate or self.restore)


@dataclass(slots=True)
class KVChanges:
    """What one step did to the accounts: the copies, and the table changes in `trace.StepRecord`'s form."""

    copies: CopyPlan = field(default_factory=CopyPlan)
    block_changes: list[list[object]] = field(default_factory=list)
    offloaded: list[list[object]] = field(default_factory=list)
