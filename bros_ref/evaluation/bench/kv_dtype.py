"""What an FP8 KV cache costs in accuracy: the perplexity of a text, window by window, with either cache.

The text is the reference of the Python language that ships with Python (`pydoc_data.topics`). The windows are spread
over it and are the same for every cache, so their losses are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bros_ref.config import cdiv
from bros_ref.engine.build import LiveSettings, LoadedModel, make_runner
from bros_ref.engine.model_runner import ModelRunner, StepWork
from bros_ref.evaluation.statistics import interval, paired_difference
from bros_ref.kv_cache.blocks import CopyPlan

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Accuracy:
    """One kind of cache. `excess_percent` is how much higher its perplexity is than with the model's own dtype, with
    the half width of its 95 % interval over windows; None for that dtype itself."""

    kv_dtype: str
    bytes_per_token: int
    perplexity: float
    excess_percent: tuple[float, float | None] | None


def python_reference() -> str:
    """English text, about 450 kB."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def perplexities(loaded: LoadedModel, windows: int, window_tokens: int, kv_dtypes: Sequence[str] = ("auto", "fp8"),
                 on_window: Callable[[], None] = lambda: None) -> list[Accuracy]:
    """The perplexity with each kind of cache, the first of which is what the others are compared with.

    Raises:
        ValueError: the text has fewer tokens than the windows ask for, or a window exceeds the model's context.
    """
    token_ids = loaded.tokenizer.encode(python_reference())
    if windows * window_tokens > len(token_ids) or window_tokens > loaded.config.max_context_tokens:
        raise ValueError(f"{windows} windows of {window_tokens} tokens: the text has {len(token_ids):,} tokens, "
                         f"and the model's context {loaded.config.max_context_tokens:,}")
    stride = len(token_ids) // windows
    rows: list[Accuracy] = []
    base: list[float] = []
    for name in kv_dtypes:
        runner = make_runner(loaded, LiveSettings(kv_blocks=cdiv(window_tokens, BLOCK_SIZE), block_size=BLOCK_SIZE,
                                                  kv_dtype=name))
        losses = []
        for index in range(windows):
            losses.append(window_loss(runner, token_ids[index * stride:index * stride + window_tokens]))
            on_window()
        base = base or losses
        more = None if losses is base else paired_difference(losses, base)
        rows.append(Accuracy(name, runner.kv.slot_bytes, math.exp(interval(losses).mean), more and (
            100 * math.expm1(more.mean), more.half and 100 * math.exp(more.mean) * more.half)))
    return rows


def window_loss(runner: ModelRunner, token_ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of each token after the first, in nats, computed in one forward pass. Every token
    attends to K and V as the cache stores them."""
    count = len(token_ids)
    blocks = list(range(cdiv(count, runner.kv.config.block_size)))
    logits = runner.compute(StepWork(list(token_ids), [blocks], [False], [count], [count], list(range(count - 1)), [],
                                     CopyPlan()))
    targets = torch.tensor(token_ids[1:], device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits, targets).item())
