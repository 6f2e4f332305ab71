"""The bodies of requests: which of OpenAI's fields this server supports, and which it refuses by name.

A field that would change the answer and is not supported is refused, never ignored. Fields without a meaning here
(`user`, `metadata`, `store`) are accepted. A field that is supported in one value only (its default) says so in its
type. Numbers are strict: no strings, no booleans, no NaN.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_STOP_STRINGS = 4
MAX_TEXT = 1_000_000  # characters of one text: more than any context
Text = Annotated[str, Field(max_length=MAX_TEXT)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
ServiceTier = Literal["auto", "default", "priority", "fast", "flex"]


class Body(BaseModel):
    """What all bodies share: unknown fields are refused, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class SLOBody(Body):
    """A request's own latency targets, in seconds (our extension)."""

    ttft_s: float = Field(gt=0, le=86_400)
    tpot_s: float = Field(gt=0, le=86_400)


class StreamOptions(Body):
    """`include_usage`: a last chunk carries the token counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingBody(Body):
    """How tokens are drawn, who is served first, how the answer comes back. A field that is None has its default."""

    model: str = Field(max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=16)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    service_tier: ServiceTier | None = None
    slo: SLOBody | None = None
    ignore_eos: bool = False  # as vLLM has it: goes on to max_tokens; for benchmarks
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(Body):
    """A part of a message; other kinds than text are refused. The lists come with an answer that is sent back."""

    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None  # an answer of ours that comes back as history

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(Body):
    """The only output format there is."""

    type: Literal["text"]


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None


class CompletionBody(SamplingBody):
    """`POST /v1/completions`. A list of prompts is answered with the choices of each, in order."""

    prompt: Text | TokenIds | Annotated[list[Text], Field(min_length=1)] | Annotated[list[TokenIds], Field(
        min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]
        return prompt
