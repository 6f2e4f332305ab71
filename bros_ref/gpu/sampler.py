"""Samples the next tokens of a whole batch on the GPU; one copy takes them to the host.

A draw depends only on the request's seed and position, as in `engine/sampler.py`. Here it inverts the cumulative
distribution at one uniform number, so the same seed gives a different (equally likely) text than it does there.
Requests with penalties or log-probabilities are left to that file.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from bros_ref.engine.sampler import GREEDY_BELOW
from bros_ref.gpu.step import Draw
from bros_ref.request import Request

NOT_FINITE = -1


def draw_of(request: Request) -> Draw:
    """Temperature, top_p and the uniform number for a request's next token."""
    params = request.sampling
    if params.temperature < GREEDY_BELOW:
        return 0.0, 1.0, 0.0
    assert request.seed is not None, "the engine draws a seed for a request that brings none"
    return params.temperature, params.top_p, random.Random(request.seed * 1_000_003 + request.num_tokens).random()


def needs_history(request: Request) -> bool:
    """Whether its next token needs more than its logits and a draw."""
    params = request.sampling
    return params.logprobs is not None or bool(params.presence_penalty or params.frequency_penalty)


def sample_rows(logits: Tensor, draws: Tensor, drawn: Sequence[Draw]) -> Tensor:
    """One token for each row, [num_rows] int64, NOT_FINITE where a logit is NaN or infinite; on the logits' device.

    Args:
        logits: [num_rows, V], any float dtype.
        draws: [3, num_rows] float32, as in `PackedStep`; rows whose temperature is 0 are greedy.
        drawn: the same values on the host, of the rows in use; tells which steps of the computation can be skipped.
    """
    finite = logits.sum(dim=-1, dtype=torch.float32).isfinite()  # one NaN or infinity spoils the sum
    tokens = logits.argmax(dim=-1)
    if any(temperature for temperature, _, _ in drawn):
        temperature, top_p, uniform = draws[:, :, None]
        is_drawn = temperature > 0
        chances = torch.softmax(logits.float() / torch.where(is_drawn, temperature, 1), dim=-1)
        if any(one < 1 for _, one, _ in drawn):
            falling, order = chances.sort(dim=-1, descending=True)
            beyond = (falling.cumsum(dim=-1) - falling >= top_p) & (top_p < 1)
            beyond[:, 0] = False  # keeps the smallest set that reaches top_p, never none
            chances = chances.masked_fill(torch.zeros_like(beyond).scatter_(1, order, beyond), 0)
        sums = chances.cumsum(dim=-1)
        total = sums[:, -1:].contiguous()
        choice = torch.searchsorted(sums, uniform * total, right=True)
        last = torch.searchsorted(sums, total)  # the last token with a chance, in case rounding passes it
        tokens = torch.where(is_drawn[:, 0], torch.minimum(choice, last)[:, 0], tokens)
    return torch.where(finite, tokens, NOT_FINITE)
