"""The answers of the two completion endpoints, whole and in chunks, as OpenAI's clients expect them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bros_ref.model.tokenizer import Tokenizer
from bros_ref.request import TokenLogprob
from bros_ref.server.calls import Plan


@dataclass(slots=True)
class Choice:
    """One finished choice."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int = 0


def usage(plan: Plan, choices: Sequence[Choice]) -> dict[str, int]:
    """Token counts of the whole call."""
    generated = sum(choice.num_tokens for choice in choices)
    return {"prompt_tokens": plan.num_prompt_tokens, "completion_tokens": generated,
            "total_tokens": plan.num_prompt_tokens + generated}


class ChatShape:
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer) -> None:
        self.plan, self.tokenizer = plan, tokenizer

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer of a call that does not stream."""
        entries = [{"index": index, "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.logprobs), "finish_reason": choice.finish_reason}
                   for index, choice in enumerate(choices)]
        return self._envelope("chat.completion", entries) | {"usage": usage(self.plan, choices)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice: who speaks."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None, [])

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """A chunk with new text."""
        return self._chunk(index, {"content": text}, None, logprobs)

    def closing(self, index: int, reason: str | None) -> dict[str, Any]:
        """The last chunk of a choice: why it ended."""
        return self._chunk(index, {}, reason, [])

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk after all choices that `stream_options.include_usage` asks for."""
        return self._envelope("chat.completion.chunk", []) | {"usage": usage(self.plan, choices)}

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None,
               logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk", [{
            "index": index, "delta": delta, "logprobs": self._logprobs(logprobs), "finish_reason": reason}])

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.plan.call_id, "object": kind, "created": self.plan.created, "model": self.plan.model,
                "service_tier": self.plan.service_tier, "system_fingerprint": None, "choices": choices}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        return {"refusal": None, "content": [
            self._token(entry.token_id, entry.logprob) | {
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top]}
            for entry in logprobs]}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token_id])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionShape:
    """`text_completion`, whole and in chunks."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer) -> None:
        self.plan, self.tokenizer = plan, tokenizer
        self._offsets: dict[int, int] = {}  # of each choice, the characters shown so far

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer of a call that does not stream."""
        entries = [self._choice(index, choice.text, choice.finish_reason, choice.logprobs)
                   for index, choice in enumerate(choices)]
        return self._envelope(entries) | {"usage": usage(self.plan, choices)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """This endpoint has no first chunk."""
        return None

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """A chunk with new text."""
        return self._envelope([self._choice(index, text, None, logprobs)])

    def closing(self, index: int, reason: str | None) -> dict[str, Any]:
        """The last chunk of a choice: why it ended."""
        return self._envelope([self._choice(index, "", reason, [])])

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk after all choices that `stream_options.include_usage` asks for."""
        return self._envelope([]) | {"usage": usage(self.plan, choices)}

    def _choice(self, index: int, text: str, reason: str | None, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, logprobs), "finish_reason": reason}

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.plan.call_id, "object": "text_completion", "created": self.plan.created,
                "model": self.plan.model, "service_tier": self.plan.service_tier, "system_fingerprint": None,
                "choices": choices}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        tokens = [self.tokenizer.decode([entry.token_id]) for entry in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token)
        return {"tokens": tokens, "token_logprobs": [entry.logprob for entry in logprobs], "text_offset": offsets,
                "top_logprobs": [{self.tokenizer.decode([token_id]): logprob for token_id, logprob in entry.top}
                                 for entry in logprobs]}
