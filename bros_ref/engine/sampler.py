"""From logits to token ids. A draw depends on the request's seed and position alone, never on the rest of the
batch, so the same request gives the same text under every policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bros_ref.request import Request, TokenLogprob

GREEDY_BELOW = 1e-4  # a temperature at which only ties could be drawn, and at which logits / temperature may overflow


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """logits [num_rows, vocab], one row per request -> token ids. Greedy where the temperature is (next to) 0.

    Appends to `request.logprobs` where `sampling.logprobs` asks for it.
    """
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    for row, request in enumerate(requests):
        changed = _penalise(logits[row], request) if _has_penalty(request) else None
        if request.sampling.temperature >= GREEDY_BELOW:
            token_ids[row] = _draw(logits[row] if changed is None else changed, request)
        elif changed is not None:
            token_ids[row] = int(changed.argmax())
        if request.sampling.logprobs is not None:
            request.logprobs.append(_logprob(logits[row], token_ids[row], request.sampling.logprobs))
    return token_ids


def _has_penalty(request: Request) -> bool:
    params = request.sampling
    return bool((params.presence_penalty or params.frequency_penalty) and request.output_token_ids)


def _penalise(logits: torch.Tensor, request: Request) -> torch.Tensor:
    """logits [vocab] -> a copy with what OpenAI's two penalties take off the tokens generated so far."""
    seen = torch.tensor(request.output_token_ids, dtype=torch.long, device=logits.device)
    counts = torch.bincount(seen, minlength=logits.shape[-1]).float()
    params = request.sampling
    return logits.float() - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def _logprob(logits: torch.Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Of one row, [vocab]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    top = logprobs.topk(min(num_top, logprobs.shape[-1]))
    return TokenLogprob(token_id, float(logprobs[token_id]),
                        tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


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
