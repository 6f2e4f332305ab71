"""One step's integers on the GPU: token ids, positions, slots, tables, lengths and draws, packed into one upload.

Decode steps are grouped in buckets. The number of sequences and the width of the block tables are rounded up to powers
of two (the width to at least MIN_WIDTH). All steps of a bucket use the same buffers, so one CUDA graph serves them.
Padding rows have slot -1 and no context: their keys and values are not stored, and their results are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bros_ref.engine.model_runner import StepWork
from bros_ref.model.attention import AttentionMetadata

PADDING_SLOT = -1
MIN_WIDTH = 16  # columns of a bucket's block tables; narrower tables would only add graphs
Draw = tuple[float, float, float]  # temperature (0: greedy), top_p, and a uniform number in [0, 1)


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step's buffers.

    Attributes:
        tokens: T, the rows of the forward pass.
        num_decodes: the leading sequences, with one token (and row) each.
        num_prefills: the sequences after them, with several tokens each.
        width: columns of the block tables.
        num_logits: the number of rows whose logits are needed.
        is_bucket: whether this is a decode step, whose sizes are rounded up.
    """

    tokens: int
    num_decodes: int
    num_prefills: int
    width: int
    num_logits: int
    is_bucket: bool

    @classmethod
    def of(cls, work: StepWork) -> StepShape:
        """Raises ValueError: a sequence with one new token comes after one with several."""
        decodes = sum(length == 1 for length in work.query_lens)
        if any(length > 1 for length in work.query_lens[:decodes]):
            raise ValueError("sequences with one new token must come first")
        prefills, width = len(work.query_lens) - decodes, max(map(len, work.block_tables))
        if prefills:
            return cls(len(work.token_ids), decodes, prefills, width, len(work.logits_rows), False)
        rows = _power_of_two(decodes)
        return cls(rows, rows, 0, max(MIN_WIDTH, _power_of_two(width)), rows, True)


class PackedStep:
    """The buffers of one shape: one on the host, pinned if the device is a GPU, and an equal one on the device.

    Attributes (views of the device's buffer, int32 unless said otherwise; S sequences, decodes first):
        token_ids, positions, slots: [T].
        tables: [S, width]. context_lens, reversed: [S].
        query_starts: [num_prefills + 1], counted from the first row of the prefills.
        logits_rows: [num_logits].
        draws: [3, num_logits] float32: temperature, top_p, uniform number.
    """

    def __init__(self, shape: StepShape, block_size: int, device: torch.device) -> None:
        self.shape, self._block_size = shape, block_size
        tokens, seqs = shape.tokens, shape.num_decodes + shape.num_prefills
        sizes = {"token_ids": tokens, "positions": tokens, "slots": tokens, "tables": seqs * shape.width,
                 "context_lens": seqs, "reversed": seqs, "query_starts": shape.num_prefills + 1,
                 "logits_rows": shape.num_logits, "draws": 3 * shape.num_logits}
        ends = np.cumsum(list(sizes.values())).tolist()
        self._places = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self._host = torch.zeros(ends[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.empty(ends[-1], dtype=torch.int32, device=device)
        self._numbers = self._host.numpy()
        self._sent: torch.cuda.Event | None = None
        part = {name: self._device[place] for name, place in self._places.items()}
        self.token_ids, self.positions, self.slots = part["token_ids"], part["positions"], part["slots"]
        self.tables = part["tables"].view(seqs, shape.width)
        self.context_lens, self.reversed = part["context_lens"], part["reversed"]
        self.query_starts, self.logits_rows = part["query_starts"], part["logits_rows"]
        self.draws = part["draws"].view(torch.float32).view(3, shape.num_logits)

    def upload(self, work: StepWork, draws: Sequence[Draw] = ()) -> None:
        """Packs a step of this shape and sends it.

        Args:
            draws: one for each of `work.logits_rows`; if empty, all rows are greedy.
        """
        meta = AttentionMetadata.build(work.block_tables, work.reversed, work.query_lens, work.context_lens,
                                       self._block_size)
        if self._sent is not None:
            self._sent.synchronize()  # the upload of an interrupted step may still be reading the host buffer
        self._numbers.fill(0)
        self._put("token_ids", work.token_ids)
        self._put("positions", meta.positions.numpy())
        self._view("slots").fill(PADDING_SLOT)
        self._put("slots", meta.slot_mapping.numpy())
        tables = self._view("tables").reshape(-1, self.shape.width)
        found = meta.block_tables.numpy()
        tables[:found.shape[0], :found.shape[1]] = found
        self._put("context_lens", work.context_lens)
        self._put("reversed", work.reversed)
        prefills = work.query_lens[len(work.query_lens) - self.shape.num_prefills:] if self.shape.num_prefills else []
        self._put("query_starts", np.cumsum([0, *prefills]))
        rows = np.asarray(work.logits_rows, np.int64)
        self._put("logits_rows", rows)
        if len(draws):
            places = rows if self.shape.is_bucket else np.arange(len(rows))
            self._view("draws").view(np.float32).reshape(3, -1)[:, places] = np.asarray(draws, np.float32).T
        self._device.copy_(self._host, non_blocking=True)
        if self._device.device.type == "cuda":
            self._sent = torch.cuda.current_stream(self._device.device).record_event()

    def _view(self, name: str) -> np.ndarray:
        return self._numbers[self._places[name]]

    def _put(self, name: str, values: Sequence[int] | Sequence[bool] | np.ndarray) -> None:
        self._view(name)[:len(values)] = values

    @cached_property
    def decodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Block tables, context lengths and directions of the sequences with one new token."""
        count = self.shape.num_decodes
        return self.tables[:count], self.context_lens[:count], self.reversed[:count]

    @cached_property
    def prefills(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the sequences with several new tokens."""
        count = self.shape.num_decodes
        return self.tables[count:], self.context_lens[count:], self.reversed[count:]


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
