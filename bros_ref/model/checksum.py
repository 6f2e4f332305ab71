"""A model whose next token is an exact integer checksum of every K and V it can see.

Its output has no meaning, but one lost, stale, reordered or foreign slot changes the token. So the engine's central
promise, the same tokens under every policy and memory pressure, is tested with `==` and without floating point. It
writes to and reads from the real `KVStorage` (one layer, one head, one int64 per slot), so the copies between device
and host are the real ones too.
"""

from __future__ import annotations

import torch

from bros_ref.config import ModelConfig
from bros_ref.kv_cache.storage import KVStorage
from bros_ref.model.attention import AttentionMetadata

VOCAB_SIZE = 997
MODULUS = (1 << 61) - 1  # prime: no information is lost to factors of two

CHECKSUM_CONFIG = ModelConfig(
    family="checksum", vocab_size=VOCAB_SIZE, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=1,
    num_kv_heads=1, head_dim=1, max_context_tokens=1 << 20,
)


def mix(*values: int) -> int:
    """A fixed hash of integers (Python's own is not promised to stay the same)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ value) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % MODULUS
    return state


def next_token(token_ids: list[int]) -> int:
    """The token that follows `token_ids`, computed without any cache: the reference."""
    seen = 0
    for position, token_id in enumerate(token_ids):
        seen = _advance(seen, position, *_key_value(token_id, position, seen))
    return seen % VOCAB_SIZE


def _key_value(token_id: int, position: int, seen: int) -> tuple[int, int]:
    """K and V of a token depend on the whole prefix, as in a real model above its first layer."""
    return mix(token_id, position, seen), mix(seen, token_id, position)


def _advance(seen: int, position: int, key: int, value: int) -> int:
    return (seen + mix(position, key, value)) % MODULUS


class ChecksumModel:
    """Drop-in for `Decoder` in a runner."""

    config = CHECKSUM_CONFIG

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, kv: KVStorage, meta: AttentionMetadata,
                logits_rows: torch.Tensor) -> torch.Tensor:
        """As `Decoder.forward`: token_ids [num_tokens] -> one-hot logits [num_rows, vocab], float32.

        K and V of the new tokens are written at `meta.slot_mapping`; everything before them is read from the cache.
        """
        sums: list[int] = []
        row = 0
        for index, (new, context) in enumerate(zip(meta.query_lens, meta.context_lens, strict=True)):
            table, reversed_ = meta.block_tables[index], bool(meta.reversed[index])
            old = context - new
            keys, values = kv.gather_dense(0, table, old, reversed_)  # [old, 1, 1]
            seen = 0
            stored = zip(keys.flatten().tolist(), values.flatten().tolist(), strict=True)
            for position, (key, value) in enumerate(stored):
                seen = _advance(seen, position, key, value)
            for offset in range(new):
                key, value = _key_value(int(token_ids[row]), old + offset, seen)
                kv.write(0, torch.tensor([[[key]]]), torch.tensor([[[value]]]), meta.slot_mapping[row:row + 1])
                seen = _advance(seen, old + offset, key, value)
                sums.append(seen)
                row += 1
        chosen = torch.tensor([sums[i] % VOCAB_SIZE for i in logits_rows.tolist()], dtype=torch.long)
        return torch.nn.functional.one_hot(chosen, VOCAB_SIZE).float()
