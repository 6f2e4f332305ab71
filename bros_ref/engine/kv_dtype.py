"""K and V in eight bits (FP8, e4m3): a pool of as many bytes holds twice the tokens that it holds in 16 bits.

Our decision: the paper's system does not quantise. Each layer has one scale for all its K and one for all its V, which
bring the values into the range of the format. A forward pass finds them once.
"""

from __future__ import annotations

import math

import torch

from bros_ref.config import KVCacheConfig, cdiv
from bros_ref.engine.model_runner import Model
from bros_ref.kv_cache.storage import FP8, FP8_MAX, KVStorage
from bros_ref.model.attention import AttentionMetadata
from bros_ref.model.decoder import Decoder

KV_DTYPES = ("auto", "fp8")
HEADROOM = 4  # texts may hold values so many times as large as those that were seen
SAMPLE_TOKENS = 256
BLOCK_SIZE = 16


def storage_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of K and V: that of the model for "auto".

    Raises:
        ValueError: an unknown name, or a model without floating-point K and V.
    """
    if name not in KV_DTYPES:
        raise ValueError(f"the KV cache can be {' or '.join(KV_DTYPES)}, not {name!r}")
    if name == "auto":
        return dtype
    if not dtype.is_floating_point:
        raise ValueError(f"an fp8 KV cache needs a model that computes in floating point; this one has {dtype}")
    return FP8


def fp8_scales(model: Model, seed: int = 0) -> list[tuple[float, float]]:
    """Factors for K and V of each layer, powers of two, so that multiplying by them is exact.

    They come from a forward pass over random tokens: the largest value seen is stored as at most a HEADROOM-th of the
    largest that FP8 has. A value that is larger still is stored as the largest.
    """
    assert isinstance(model, Decoder)
    config, count = model.config, min(SAMPLE_TOKENS, model.config.max_context_tokens)
    tokens = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    blocks = cdiv(count, BLOCK_SIZE)
    kv = KVStorage(config.num_layers, config.num_kv_heads, config.head_dim, KVCacheConfig(blocks, BLOCK_SIZE),
                   model.dtype, model.device)
    meta = AttentionMetadata.build([list(range(blocks))], [False], [count], [count], BLOCK_SIZE, model.device)
    none = torch.empty(0, dtype=torch.long, device=model.device)
    model.forward(tokens.to(model.device), meta.positions, kv, meta, none)
    largest: list[list[float]] = kv.data.abs().amax(dim=(2, 3, 4, 5)).float().tolist()
    return [(_scale(k), _scale(v)) for k, v in largest]


def _scale(largest: float) -> float:
    return 2.0 ** math.ceil(math.log2(HEADROOM * largest / FP8_MAX)) if 0 < largest < math.inf else 1.0
