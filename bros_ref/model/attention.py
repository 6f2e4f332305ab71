"""Attention over a paged KV cache: the metadata of a step, a fast torch version, and a slow reference.

It knows block tables and directions, but nothing about layers, weights or requests. `paged_attention` and
`dense_attention` are the contract of every kernel: the same arguments, the same result up to rounding. Invariant:
a slot that does not hold one of the sequence's own visible tokens is never read, so what another owner or a freed
token left there (NaN included) cannot reach the result.

Letters for dimensions, used in shapes throughout bros_ref.model:

    T  tokens of this step, all sequences one after another      S  sequences of this step
    C  context: tokens a sequence sees, this step's included     H  query heads      K  KV heads      G = H / K
    D  head dimension      E  hidden size      B  slots of a block      V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bros_ref.kv_cache.storage import gather_dense

# Decode sequences are attended in groups padded to the longest, so lengths within a group stay close. On a CPU a group
# is also small enough that its gathered K and V stay in the cache until they are used (measured: 512 to 2048 tokens
# are alike, 20,000 take 1.5 times as long).
MAX_PADDING = 1.25
CPU_GROUP_TOKENS = 1280


class AttentionFn(Protocol):
    """q [T, H, D], k_cache and v_cache [num_blocks, B, K, D] -> [T, H, D]. The caches have q's dtype, or are FP8, which
    is used without its scales. An implementation without sliding windows (`meta.window`) has an attribute
    `sliding_windows` that is False."""

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata) -> Tensor: ...


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with one new token each, attended together. Short ones are padded with their own newest slot."""

    rows: slice | Tensor  # rows of q: a slice where they follow one another, which saves two copies; else [n] int64
    slots: Tensor  # [n, longest C] int64
    mask: Tensor | None  # [n, 1, 1, longest C] bool, True = visible; None when nothing is padded


@dataclass(frozen=True)
class PrefillSequence:
    """One sequence with several new tokens."""

    start: int  # its rows of q are start .. stop - 1
    stop: int
    slots: Tensor  # [C] int64, in logical order, from the earliest position that a row sees
    mask: Tensor | None  # [stop - start, C] bool; None when the whole context is new and visible (plain causal)


@dataclass(frozen=True)
class AttentionMetadata:
    """What one step's attention needs besides q, K and V; the same for every layer, but for the window of layers that
    have one (`within`). Make it with `build`."""

    query_lens: list[int]  # [S] new tokens of each sequence
    context_lens: list[int]  # [S] tokens visible after this step, the new ones included
    block_tables: Tensor  # [S, max blocks] int64, padded with the sequence's own first block
    reversed: Tensor  # [S] bool: this sequence fills its blocks from the right
    slot_mapping: Tensor  # [T] int64: where each new token's K and V go
    positions: Tensor  # [T] int64: logical position of each new token
    block_size: int
    window: int | None = None  # each token sees this many tokens, itself included; None: all up to itself

    @classmethod
    def build(cls, block_tables: Sequence[Sequence[int]], reversed: Sequence[bool], query_lens: Sequence[int],
              context_lens: Sequence[int], block_size: int,
              device: torch.device | str = "cpu") -> AttentionMetadata:
        """Derives positions and slots of all new tokens, without a Python loop over tokens.

        Args:
            block_tables: [S] lists of block ids in logical order; longer than needed is fine.
            reversed, query_lens, context_lens: [S]; 1 <= query_len <= context_len.

        Raises:
            ValueError: lists of different lengths, a query longer than its context, or a table too short for it.
        """
        _check_lengths(block_tables, reversed, query_lens, context_lens, block_size)
        queries, contexts = np.asarray(query_lens, np.int64), np.asarray(context_lens, np.int64)
        tables = _pad_tables(block_tables)
        sequence = np.repeat(np.arange(len(queries)), queries)  # [T]
        first_rows = np.cumsum(queries) - queries  # [S]
        positions = np.arange(queries.sum()) + (contexts - queries - first_rows)[sequence]
        flip = np.asarray(reversed, bool)
        slots = _slots(tables[sequence, positions // block_size], positions % block_size, flip[sequence], block_size)
        put = torch.device(device)
        return cls(list(query_lens), list(context_lens), torch.from_numpy(tables).to(put),
                   torch.from_numpy(flip).to(put), torch.from_numpy(slots).to(put),
                   torch.from_numpy(positions).to(put), block_size)

    def within(self, window: int | None) -> AttentionMetadata:
        """The same step with a sliding window: `self` if no context exceeds it, else a copy, made once per step."""
        if window is None or window >= max(self.context_lens):
            return self
        if window not in self._windowed:
            self._windowed[window] = replace(self, window=window)
        return self._windowed[window]

    @cached_property
    def _windowed(self) -> dict[int, AttentionMetadata]:
        return {}

    @cached_property
    def _first_visible(self) -> list[int]:
        """[S] the earliest position that a new token of each sequence sees."""
        return [0 if self.window is None else max(0, context - query + 1 - self.window)
                for query, context in zip(self.query_lens, self.context_lens, strict=True)]

    @cached_property
    def plan(self) -> tuple[list[DecodeGroup], list[PrefillSequence]]:
        """Gather indices and masks of `paged_attention`: derived on first use, shared by all layers."""
        tables, flip = self.block_tables.cpu().numpy(), self.reversed.cpu().numpy()
        starts = np.cumsum(self.query_lens) - np.asarray(self.query_lens, np.int64)
        prefills = [self._plan_prefill(i, int(starts[i]), tables, flip)
                    for i, length in enumerate(self.query_lens) if length > 1]
        decodes = [i for i, length in enumerate(self.query_lens) if length == 1]
        max_tokens = CPU_GROUP_TOKENS if self.positions.device.type == "cpu" else sum(self.context_lens)
        visible = [context - first for context, first in zip(self.context_lens, self._first_visible, strict=True)]
        groups = [self._plan_group(members, starts, tables, flip)
                  for members in group_by_length(decodes, visible, max_tokens)]
        return groups, prefills

    def _plan_prefill(self, i: int, start: int, tables: np.ndarray, flip: np.ndarray) -> PrefillSequence:
        query, context, first = self.query_lens[i], self.context_lens[i], self._first_visible[i]
        positions = np.arange(first, context)
        slots = _slots(tables[i, positions // self.block_size], positions % self.block_size, flip[i], self.block_size)
        mask = None
        if query < context or self.window is not None:  # row r is logical position context - query + r
            row_0 = context - query - first  # the column of row 0's own position
            mask = torch.ones(query, context - first, dtype=torch.bool, device=self.positions.device).tril_(row_0)
            if self.window is not None:
                mask.triu_(row_0 - self.window + 1)
        return PrefillSequence(start, start + query, torch.from_numpy(slots).to(self.positions.device), mask)

    def _plan_group(self, members: list[int], starts: np.ndarray, tables: np.ndarray,
                    flip: np.ndarray) -> DecodeGroup:
        device = self.positions.device
        ends = np.asarray([self.context_lens[i] for i in members], np.int64)[:, None]  # [n, 1]
        firsts = np.asarray([self._first_visible[i] for i in members], np.int64)[:, None]
        lengths = ends - firsts
        columns = np.arange(lengths.max())[None, :]
        positions = np.minimum(firsts + columns, ends - 1)  # padding repeats the newest token, this sequence's own
        blocks = np.take_along_axis(tables[members], positions // self.block_size, axis=1)
        slots = _slots(blocks, positions % self.block_size, flip[members][:, None], self.block_size)
        mask = None
        if lengths.min() < lengths.max():
            mask = torch.from_numpy(columns < lengths).to(device)[:, None, None, :]
        rows = starts[members]
        in_order = bool((np.diff(rows) == 1).all())
        return DecodeGroup(slice(int(rows[0]), int(rows[-1]) + 1) if in_order else torch.from_numpy(rows).to(device),
                           torch.from_numpy(slots).to(device), mask)


def group_by_length(members: list[int], context_lens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits sequences into groups, longest first: the longest of a group has at most MAX_PADDING times the tokens of
    the shortest, and a group padded holds at most `max_tokens`, unless it is one sequence."""
    groups: list[list[int]] = []
    for i in sorted(members, key=lambda i: -context_lens[i]):
        longest = context_lens[groups[-1][0]] if groups else 0
        if groups and longest <= MAX_PADDING * context_lens[i] and longest * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata) -> Tensor:
    """Causal attention of a mixed batch of decode and (chunked) prefill sequences, either direction, within
    `meta.window` if there is one. Plain torch.

    Args:
        q: [T, H, D], rotary positions already applied.
        k_cache, v_cache: [num_blocks, B, K, D]; this step's tokens are already written.

    Returns:
        [T, H, D], q's dtype.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    q = q.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)  # [T, K, G, D]
    k_slots, v_slots = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # [num_slots, K, D], views
    out = torch.empty_like(q)
    groups, prefills = meta.plan
    for group in groups:
        keys = _gather(k_slots, group.slots).to(q.dtype).transpose(1, 2)  # [n, K, C, D]
        values = _gather(v_slots, group.slots).to(q.dtype).transpose(1, 2)
        # The G heads that share a KV head stand where SDPA expects queries, so K and V are never repeated.
        out[group.rows] = F.scaled_dot_product_attention(q[group.rows], keys, values, attn_mask=group.mask)
    for sequence in prefills:
        rows = slice(sequence.start, sequence.stop)
        # KV heads stand where SDPA expects the batch; a stride of 0 lets the G heads share one copy of K and V.
        queries = q[rows].permute(1, 2, 0, 3)  # [K, G, query_len, D]
        keys, values = (_gather(slots, sequence.slots).to(q.dtype).transpose(0, 1)[:, None].expand(
            -1, queries.shape[1], -1, -1) for slots in (k_slots, v_slots))
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=sequence.mask,
                                                  is_causal=sequence.mask is None)
        out[rows] = attended.permute(2, 0, 1, 3)
    return out.view(num_tokens, num_heads, head_dim)


def dense_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata,
                    dtype: torch.dtype | None = None) -> Tensor:
    """The reference: the same contract as `paged_attention`, one sequence at a time, without optimisation.

    `dtype` is the dtype of the arithmetic (float64 for reference values); the result has q's dtype in any case.
    """
    compute = dtype or q.dtype
    group = q.shape[1] // k_cache.shape[2]
    rows: list[Tensor] = []
    start = 0
    for i, (query_len, context_len) in enumerate(zip(meta.query_lens, meta.context_lens, strict=True)):
        table, flip = meta.block_tables[i].tolist(), bool(meta.reversed[i])
        k = gather_dense(k_cache, table, context_len, flip).to(compute).repeat_interleave(group, dim=1)  # [C, H, D]
        v = gather_dense(v_cache, table, context_len, flip).to(compute).repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,chd->htc", q[start:start + query_len].to(compute), k) * q.shape[-1] ** -0.5
        row_position = torch.arange(context_len - query_len, context_len, device=q.device)[:, None]
        columns = torch.arange(context_len, device=q.device)[None, :]
        hidden = columns > row_position
        if meta.window is not None:
            hidden |= columns <= row_position - meta.window
        scores = scores.masked_fill(hidden, -torch.inf)
        rows.append(torch.einsum("htc,chd->thd", scores.softmax(dim=-1), v).to(q.dtype))
        start += query_len
    return torch.cat(rows)


def _gather(slots_of_cache: Tensor, slots: Tensor) -> Tensor:
    """[num_slots, K, D] and indices of any shape -> [*slots.shape, K, D]."""
    return slots_of_cache.index_select(0, slots.flatten()).view(*slots.shape, *slots_of_cache.shape[1:])


def _slots(blocks: np.ndarray, offsets: np.ndarray, flip: np.ndarray, block_size: int) -> np.ndarray:
    return blocks * block_size + np.where(flip, block_size - 1 - offsets, offsets)


def _pad_tables(block_tables: Sequence[Sequence[int]]) -> np.ndarray:
    lengths = np.asarray([len(table) for table in block_tables], np.int64)
    padded = np.repeat(np.asarray([table[0] for table in block_tables], np.int64)[:, None], lengths.max(), axis=1)
    flat = np.fromiter(chain.from_iterable(block_tables), np.int64, count=int(lengths.sum()))
    padded[np.arange(lengths.max()) < lengths[:, None]] = flat
    return padded


def _check_lengths(block_tables: Sequence[Sequence[int]], reversed: Sequence[bool], query_lens: Sequence[int],
                   context_lens: Sequence[int], block_size: int) -> None:
    if not len(block_tables) == len(reversed) == len(query_lens) == len(context_lens) > 0:
        raise ValueError(f"one entry a sequence, and at least one sequence: got {len(block_tables)} block tables, "
                         f"{len(reversed)} directions, {len(query_lens)} query and {len(context_lens)} context lengths")
    for i, (table, query, context) in enumerate(zip(block_tables, query_lens, context_lens, strict=True)):
        if not 1 <= query <= context:
            raise ValueError(f"sequence {i}: need 1 <= query_len <= context_len, got {query} and {context}")
        if len(table) * block_size < context:
            raise ValueError(f"sequence {i}: {len(table)} blocks of {block_size} slots cannot hold {context} tokens")
