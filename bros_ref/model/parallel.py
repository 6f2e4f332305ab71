"""Tensor parallelism: which part of each weight a rank holds, and the two all-reduces per layer that combine the parts.

    rank r of N     q, k, v, gate, up: rows      attention output, MLP output: columns      head: vocabulary rows
    activations     the same on all ranks, after one all_reduce behind attention and one behind the MLP

Column-parallel products need no exchange: a rank computes its own heads and its own part of the MLP's inner
activations. Row-parallel products give each rank a summand of the result. The KV heads are split over the ranks, so
block tables, slots and directions are the same on all of them, and the scheduler does not know how many ranks there
are. Embeddings are replicated. The scheme is Megatron-LM's (Shoeybi et al., arXiv 1909.08053); the paper runs
TP 2, 4 and 8.

It knows shapes and sums. Processes, and what happens when one of them dies, are the task of `engine/ranks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bros_ref.config import ModelConfig, cdiv
from bros_ref.model.weights.parameters import fused_rows, parameter_shapes

ROW_PARALLEL = ("attn_out", "mlp_out")


class ExchangeFailed(RuntimeError):
    """An exchange with the other ranks was not completed: one of them died, or did not come in time."""


@dataclass
class TensorParallel:
    """One rank's part of a model.

    Attributes:
        rank, size: this rank and how many there are.
        config: the whole model's.
        progress: one counter per rank in shared memory, of the exchanges a rank has entered; None if not monitored.
        group: the processes to exchange with; None: torch.distributed's default group.
        num_exchanges, exchanged_bytes: all_reduces and gathers so far, and the bytes of this rank's operands in them.

    Raises:
        ValueError: the model does not divide over so many ranks; the message says what would.
    """

    rank: int
    size: int
    config: ModelConfig
    progress: MutableSequence[int] | None = None
    group: dist.ProcessGroup | None = None
    num_exchanges: int = field(default=0, init=False)
    exchanged_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        c, size = self.config, self.size
        if size < 1 or not 0 <= self.rank < size:
            raise ValueError(f"rank {self.rank} of {size} ranks does not exist")
        if c.num_heads % size or c.intermediate_size % size or (c.num_kv_heads % size and size % c.num_kv_heads):
            fitting = [n for n in range(1, c.num_heads + 1) if not (c.num_heads % n or c.intermediate_size % n)
                       and not (c.num_kv_heads % n and n % c.num_kv_heads)]
            raise ValueError(f"a model with {c.num_heads} query heads, {c.num_kv_heads} KV heads and an MLP of "
                             f"{c.intermediate_size} does not divide over {size} ranks; tp can be one of {fitting}")

    @property
    def local_config(self) -> ModelConfig:
        """The model as one rank sees it. With fewer KV heads than ranks, several ranks hold the same KV head."""
        c = self.config
        return replace(c, num_heads=c.num_heads // self.size, num_kv_heads=max(1, c.num_kv_heads // self.size),
                       intermediate_size=c.intermediate_size // self.size)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of this rank's parameters."""
        shapes = parameter_shapes(self.local_config)
        if "lm_head.weight" in shapes:
            first, last = self.vocabulary
            shapes["lm_head.weight"] = (last - first, self.config.hidden_size)
        return shapes

    @property
    def vocabulary(self) -> tuple[int, int]:
        """[first, last) of the token ids whose logits this rank computes; the last rank may have fewer, or none."""
        share, size = cdiv(self.config.vocab_size, self.size), self.config.vocab_size
        return min(size, self.rank * share), min(size, (self.rank + 1) * share)

    # -- weights ----------------------------------------------------------------------------------------------

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a whole parameter, a copy unless it is replicated.

        The bias behind a row-parallel product is kept by rank 0 alone and zero elsewhere: it must be added once.
        """
        stem, kind = name.split(".")[-2:]
        if stem == "lm_head":
            first, last = self.vocabulary
            return tensor[first:last].clone()
        if stem in ("qkv", "mlp_in"):
            parts = torch.split(tensor, list(fused_rows(self.config, name)))
            return torch.cat([self._rows(part, is_kv=stem == "qkv" and place > 0) for place, part in enumerate(parts)])
        if stem in ROW_PARALLEL:
            if kind == "bias":
                return tensor if self.rank == 0 else torch.zeros_like(tensor)
            share = tensor.shape[1] // self.size
            return tensor[:, self.rank * share:(self.rank + 1) * share].clone()
        return tensor

    def _rows(self, part: Tensor, is_kv: bool) -> Tensor:
        """Rank's rows of one unfused part; ranks share KV heads where those are fewer than ranks."""
        pieces = min(self.size, self.config.num_kv_heads) if is_kv else self.size
        share, piece = len(part) // pieces, self.rank * pieces // self.size
        return part[piece * share:(piece + 1) * share]

    def head(self, embed: Tensor) -> Tensor:
        """The rows of tied embeddings, [V, E], that are this rank's head; a view."""
        first, last = self.vocabulary
        return embed[first:last]

    # -- exchanges --------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place."""
        if self.size > 1:
            with self._exchange(x):
                dist.all_reduce(x, group=self.group)
        return x

    def gather_logits(self, logits: Tensor) -> Tensor:
        """[n, this rank's tokens] of each rank -> [n, V] on rank 0; the other ranks get their own part back."""
        if self.size == 1:
            return logits
        share = cdiv(self.config.vocab_size, self.size)
        padded = F.pad(logits, (0, share - logits.shape[1])).contiguous()  # a gather takes equal parts
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        with self._exchange(padded):
            dist.gather(padded, parts, group=self.group)
        return logits if parts is None else torch.cat(parts, dim=1)[:, :self.config.vocab_size]

    @contextmanager
    def _exchange(self, x: Tensor) -> Iterator[None]:
        self.num_exchanges += 1
        self.exchanged_bytes += x.nbytes
        if self.progress is not None:
            self.progress[self.rank] += 1
        try:
            yield
        except RuntimeError as error:  # torch.distributed raises nothing more special for gloo
            raise ExchangeFailed(str(error).splitlines()[0]) from error


def expected_bytes(config: ModelConfig, num_tokens: int, num_logits_rows: int, size: int, itemsize: int) -> int:
    """Operand bytes of one rank's exchanges in one forward pass: two all_reduces per layer of [num_tokens, E], and one
    gather of [num_logits_rows, V / size] in float32. A ring all_reduce moves 2 (size - 1) / size times its operand."""
    reduced = 2 * config.num_layers * num_tokens * config.hidden_size * itemsize
    return reduced + num_logits_rows * cdiv(config.vocab_size, size) * 4
