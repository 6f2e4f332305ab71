"""From logits to token ids. A draw depends on the request's seed and position alone, never on who else is in the
batch, so the same request gives the same text under every policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bros_ref.request import Request

GREEDY_BELOW = 1e-4  # a temperature at which only ties could be drawn, and at which logits / temperature may overflow


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """logits [num_rows, vocab], one row a request -> token ids. Greedy where the temperature is (next to) 0."""
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    for row, request in enumerate(requests):
        if request.sampling.temperature >= GREEDY_BELOW:
            token_ids[row] = _draw(logits[row], request)
    return token_ids


def _draw(logits: torch.Tensor, request: Request) -> int:
    params = request.sampling
    assert request.seed is not None, "the engine draws a seed for a request that brings none"
    probabilities = torch.softmax(logits.float() / params.temperature, dim=-1)
    if params.top_p < 1:
        probabilities, order = probabilities.sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[1:][before[1:] >= params.top_p] = 0  # keeps the smallest set that reaches top_p, never none
    generator = torch.Generator().manual_seed((request.seed * 1_000_003 + request.num_tokens) % (1 << 63))
    choice = int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
    return int(order[choice]) if params.top_p < 1 else choice
