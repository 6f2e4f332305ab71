"""From the body of a request to what the engine runs: class, targets, prompt, sampling. No HTTP and no engine here."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

from bros_ref.engine.build import LoadedModel
from bros_ref.request import SLO, Request, RequestClass, SamplingParams
from bros_ref.server.errors import APIError
from bros_ref.server.protocol import ChatBody, CompletionBody, SamplingBody
from bros_ref.server.settings import MAX_CHOICES, ServerSettings

COMPLETION_MAX_TOKENS = 16  # OpenAI's default of the older endpoint
SLO_HEADERS = {"ttft_s": "x-slo-ttft-ms", "tpot_s": "x-slo-tpot-ms"}  # llm-d's convention


@dataclass(frozen=True)
class Plan:
    """The plan of a call: its requests in the order of their choices, and the fields that the answer repeats.

    `service_tier` is what was used: "default" or "priority" for real-time, "flex" for best-effort.
    """

    call_id: str
    created: int
    model: str
    requests: tuple[Request, ...]
    service_tier: str
    num_prompt_tokens: int


class Planner:
    """Makes plans for one model.

    Args:
        pool_tokens: size of the KV pool; with the model's context it bounds an answer without a requested length.
    """

    def __init__(self, loaded: LoadedModel, settings: ServerSettings, pool_tokens: int) -> None:
        self.tokenizer = loaded.tokenizer
        self.settings = settings
        self.max_total_tokens = min(loaded.config.max_context_tokens, pool_tokens)
        self.vocab_size = loaded.config.vocab_size

    def chat(self, body: ChatBody, headers: Mapping[str, str], arrival_s: float) -> Plan:
        """Plans `/v1/chat/completions`. Raises APIError."""
        self._check_model(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
        roles = {"developer": "system"}  # OpenAI's newer name of the same thing
        messages = [{"role": roles.get(message.role, message.role), "content": message.text}
                    for message in body.messages]
        try:
            prompt = self.tokenizer.chat(messages)
        except ValueError as error:
            raise APIError(400, f"messages: {error}", "messages", "invalid_value") from error
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = body.max_completion_tokens or body.max_tokens
        return self._plan("chatcmpl", body, [prompt], max_tokens, logprobs, headers, arrival_s)

    def completion(self, body: CompletionBody, headers: Mapping[str, str], arrival_s: float) -> Plan:
        """Plans `/v1/completions`. Raises APIError."""
        self._check_model(body)
        prompts = []
        for prompt in body.prompts:
            token_ids = self.tokenizer.encode_plain(prompt) if isinstance(prompt, str) else prompt
            if not token_ids:
                raise APIError(400, "the prompt is empty; it needs at least one token", "prompt", "invalid_value")
            if max(token_ids) >= self.vocab_size:
                raise APIError(400, f"prompt: token ids lie in 0 to {self.vocab_size - 1}", "prompt", "invalid_value")
            prompts.append(token_ids)
        max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        return self._plan("cmpl", body, prompts, max_tokens, body.logprobs, headers, arrival_s)

    def _plan(self, prefix: str, body: SamplingBody, prompts: list[list[int]], max_tokens: int | None,
              logprobs: int | None, headers: Mapping[str, str], arrival_s: float) -> Plan:
        choices = body.n or 1
        if choices * len(prompts) > MAX_CHOICES:
            raise APIError(400, f"n times the number of prompts is {choices * len(prompts)}; at most {MAX_CHOICES} "
                                "choices fit one call, send several", "n", "invalid_value")
        request_class, slo, tier = self._service(body, headers)
        secret = secrets.token_hex(16)
        call_id = f"{prefix}-{secret}"
        requests: list[Request] = []
        for prompt in prompts:
            limit = self._max_new_tokens(len(prompt), max_tokens)
            for choice in range(choices):
                sampling = SamplingParams(
                    limit, 1.0 if body.temperature is None else body.temperature,
                    1.0 if body.top_p is None else body.top_p, None if body.seed is None else body.seed + choice,
                    body.stops, body.ignore_eos, body.presence_penalty or 0.0, body.frequency_penalty or 0.0, logprobs)
                name = f"{secret[:12]}-{len(requests)}"
                requests.append(Request(name, request_class, prompt, sampling, arrival_s, slo))
        return Plan(call_id, int(time.time()), body.model, tuple(requests), tier, sum(map(len, prompts)))

    def _check_model(self, body: SamplingBody) -> None:
        if body.model != self.settings.model_id:
            raise APIError(404, f"this server has no such model; it serves {self.settings.model_id!r}", "model",
                           "model_not_found")
        if body.stream_options is not None and not body.stream:
            raise APIError(400, "stream_options needs stream: true", "stream_options", "invalid_value")

    def _max_new_tokens(self, num_prompt_tokens: int, wanted: int | None) -> int:
        room = self.max_total_tokens - num_prompt_tokens
        if room < (wanted or 1):
            raise APIError(400, f"{num_prompt_tokens} prompt tokens + {wanted or 1} new tokens exceed this server's "
                                f"context of {self.max_total_tokens} tokens; shorten the prompt or max_tokens",
                           "max_tokens" if room >= 1 else None, "context_length_exceeded")
        return room if wanted is None else wanted

    def _service(self, body: SamplingBody, headers: Mapping[str, str]) -> tuple[RequestClass, SLO | None, str]:
        own = None if body.slo is None else SLO(body.slo.ttft_s, body.slo.tpot_s)
        own = own or self._slo_from(headers)
        if body.service_tier == "flex":
            if own is not None:
                raise APIError(400, "a flex request is best-effort and has no latency target; leave slo out, or "
                                    "service_tier", "slo", "invalid_value")
            return RequestClass.BEST_EFFORT, None, "flex"
        tier = "priority" if body.service_tier in ("priority", "fast") else "default"
        return RequestClass.REAL_TIME, own or self.settings.slo, tier

    def _slo_from(self, headers: Mapping[str, str]) -> SLO | None:
        """Targets from the headers; one that is missing is the server's."""
        given = {name: headers[header] for name, header in SLO_HEADERS.items() if header in headers}
        if not given:
            return None
        default = self.settings.slo
        targets = {"ttft_s": default.ttft_s, "tpot_s": default.tpot_s}
        try:
            targets |= {name: float(text) / 1e3 for name, text in given.items()}
            return SLO(**targets)
        except ValueError:
            raise APIError(400, f"{' and '.join(SLO_HEADERS.values())} are positive numbers of milliseconds",
                           SLO_HEADERS[next(iter(given))], "invalid_value") from None
