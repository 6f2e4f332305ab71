"""One forward pass of a loaded model, to be timed, after its attention has been checked.

There are no requests or schedules here, only one sequence, some tokens of which are new. Invariant: a pass with wrong
attention is never returned, so its time cannot be reported.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bros_ref.config import KVCacheConfig, cdiv
from bros_ref.engine.build import LoadedModel
from bros_ref.kv_cache.storage import KVStorage
from bros_ref.model.attention import AttentionMetadata, dense_attention
from bros_ref.model.backends import attention_backend

# Maximum absolute error of attention over standard normal numbers.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def checked_pass(loaded: LoadedModel, new: int, context: int, block_size: int = 16) -> Callable[[], Tensor]:
    """A pass over the last `new` tokens of a sequence of `context`, in a pool that is just large enough. The
    cache holds standard normal numbers, because the time does not depend on its values.

    Returns:
        A function that computes the pass on the model's device, without waiting for it, and returns [1, V] logits.

    Raises:
        ValueError: 1 <= new <= context does not hold, or the context exceeds the model's.
        ArithmeticError: the backend's attention differs from `dense_attention` by more than rounding.
    """
    config, device = loaded.config, loaded.device
    if not 1 <= new <= context <= config.max_context_tokens:
        raise ValueError(f"need 1 <= new <= context <= {config.max_context_tokens}, got {new} new of {context}")
    blocks = cdiv(context, block_size)
    kv = KVStorage(config.num_layers, config.num_kv_heads, config.head_dim, KVCacheConfig(blocks, block_size),
                   loaded.dtype, device)
    kv.data.normal_()
    meta = AttentionMetadata.build([list(range(blocks))], [False], [new], [context], block_size, device)
    q = torch.randn(new, config.num_heads, config.head_dim, device=device).to(loaded.dtype)
    got = attention_backend(loaded.backend, device)(q, kv.k(0), kv.v(0), meta)
    wanted = dense_attention(q, kv.k(0), kv.v(0), meta, dtype=torch.float32)
    error = (got - wanted).abs().max().item()
    if not error <= TOLERANCE[loaded.dtype]:  # NaN too
        raise ArithmeticError(f"{new} new of {context}: the attention of backend {loaded.backend} is off by "
                              f"{error:.2g}, {TOLERANCE[loaded.dtype]} is allowed: a wrong pass is not timed")
    token_ids = torch.full((new,), 100, device=device)
    last_row = torch.tensor([new - 1], device=device)
    return lambda: loaded.model.forward(token_ids, meta.positions, kv, meta, last_row)
