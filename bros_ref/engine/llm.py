"""The public API: a model under a policy, in a few lines.

    llm = LLM("smollm2", policy="bros-plus")
    llm.generate("The capital of France is", slo=SLO(0.5, 0.1))[0].text        # someone waits: real-time
    llm.generate(documents, SamplingParams(max_tokens=128))                    # a batch job: best-effort

Names and defaults are those of vLLM's `LLM` where it has them. What it adds: `slo` makes a request real-time, and
`trace` and `metrics()` say what the scheduler decided and what resulted. It is not thread-safe: one engine, one
thread. Everything it does goes through `LLMEngine.add_request`, `step` and `abort`.
"""

from __future__ import annotations

import secrets
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from bros_ref.cpu.threads import compute_threads
from bros_ref.engine.build import LiveSettings, blocks_that_fit, load_model, make_engine, make_runner
from bros_ref.engine.llm_engine import StepFailed
from bros_ref.engine.profile import fit_latency_model
from bros_ref.engine.progress import long_task
from bros_ref.environment import compute_device
from bros_ref.request import SLO, Request, RequestClass, RequestStatus, SamplingParams
from bros_ref.scheduler import known_policies
from bros_ref.scheduler.latency_model import StepLatencyModel
from bros_ref.trace.metrics import summarise
from bros_ref.trace.trace import Trace

Prompt = str | Sequence[int]  # text, or token ids
Conversation = Sequence[Mapping[str, str]]  # [{"role": ..., "content": ...}, ...]


@dataclass(frozen=True)
class RequestOutput:
    """One finished request. Times in seconds.

    Attributes:
        text: without special tokens, and without a stop string and what follows it.
        finish_reason: "length", "stop" (a stop string or the end-of-text token), "aborted" or "failed".
        ttft_s: first token time - arrival; None without a token.
        tpot_s: (last token time - first token time) / (tokens - 1); None for fewer than two tokens.
        num_preemptions: how often it lost its KV and recomputed it.
        seed: what its samples were drawn with; None if it was greedy.
        error: why it failed; None if it did not.
    """

    request_id: str
    request_class: RequestClass
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    ttft_s: float | None
    tpot_s: float | None
    num_preemptions: int
    seed: int | None
    error: str | None

    @classmethod
    def of(cls, request: Request, text: str) -> RequestOutput:
        """The output of a request that has ended."""
        first_s, last_s, count = request.first_token_s, request.last_token_s, len(request.output_token_ids)
        ttft_s = None if first_s is None else first_s - request.arrival_s
        tpot_s = None if first_s is None or last_s is None or count < 2 else (last_s - first_s) / (count - 1)
        return cls(request.request_id, request.request_class, tuple(request.prompt_token_ids), text,
                   tuple(request.output_token_ids), request.status.value, ttft_s, tpot_s, request.num_preemptions,
                   request.seed, None if request.error is None else str(request.error))


class LLM:
    """A model, a KV pool and an engine under one policy, on this machine.

    Args:
        model: "smollm2", a Hugging Face folder, a .gguf file, "random:<family>" or "checksum".
        policy: one of `bros_ref.scheduler.known_policies()`.
        kv_blocks: size of the KV pool in blocks of `block_size` tokens. None: what the device's memory leaves room for
            (a quarter of the free memory on a CPU, 90 % of a GPU less what is in use), which is said on standard error.
        seed: of everything random: weights of a random model, seeds of requests that bring none. None: drawn, and kept
            in `trace.seed`.
        tp: number of devices that share the model: GPUs, or processes on a CPU (`engine/ranks.py`).
        max_num_seqs: most requests in one step.
        max_num_batched_tokens: most tokens in one step.
        latency: what step times to expect. None: measured on this machine once and cached. "online": learned from the
            first steps, whose deadlines are then not kept.
        rt_slowdown: best-effort requests may make the latency of real-time ones at most this many times what it would
            be alone, if the policy is BROS; None: as much as the latency targets allow.
        device, backend: see `bros_ref.engine.build.load_model`.
        kv_dtype: "auto", the model's own dtype, or "fp8": K and V in 8 bits, with scales for each layer. A pool of as
            many bytes then holds two to four times the tokens; answers may differ a little.
        threads: what torch is set to use on a CPU, in the whole process. None: OMP_NUM_THREADS, or as many as are worth
            it beside the machine's other work now, but never more than torch is set to already.

    Attributes:
        engine: the `LLMEngine` underneath, for stepping through it by hand.

    Raises:
        ValueError: a value that is out of its range or unknown; the message says what is possible.
        WeightsError, TokenizerError (both ValueErrors): the model cannot be read.
    """

    def __init__(self, model: str = "smollm2", policy: str = "bros-plus", *, kv_blocks: int | None = None,
                 seed: int | None = None, tp: int = 1, max_num_seqs: int = 32, max_num_batched_tokens: int = 512,
                 block_size: int = 16, latency: StepLatencyModel | str | None = None, device: str = "auto",
                 backend: str = "auto", rt_slowdown: float | None = None, threads: int | None = None,
                 kv_dtype: str = "auto") -> None:
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise ValueError(f"threads must be at least 1, or None, got {threads!r}")
        if not isinstance(tp, int) or tp < 1:
            raise ValueError(f"tp must be a number of devices, at least 1, got {tp!r}")
        if policy not in known_policies():
            raise ValueError(f"unknown policy {policy!r}; known are {', '.join(known_policies())}")
        if not (latency is None or latency == "online" or isinstance(latency, StepLatencyModel)):
            raise ValueError(f'latency must be None, "online" or a StepLatencyModel, got {latency!r}')
        seed = secrets.randbits(32) if seed is None else seed
        if compute_device(device) == "cpu":
            torch.set_num_threads(compute_threads(threads or 0))
        self._loaded = load_model(model, device, seed, backend, tp)
        if kv_blocks is None:
            kv_blocks = blocks_that_fit(self._loaded, block_size, max_num_seqs, kv_dtype)
            print(f"KV pool sized to the memory of {self._loaded.device}: {kv_blocks:,} blocks of {block_size} tokens; "
                  "kv_blocks sets another size", file=sys.stderr)
        settings = LiveSettings(kv_blocks, block_size, max_num_seqs, max_num_batched_tokens, seed=seed,
                                rt_slowdown=rt_slowdown, kv_dtype=kv_dtype)
        runner = make_runner(self._loaded, settings)
        if latency is None:
            with long_task("measuring this machine's step times, once", 1.0) as advance_to:
                latency = fit_latency_model(runner, max_num_seqs, self._loaded.name, on_progress=advance_to)
        self.engine = make_engine(policy, self._loaded, runner, settings,
                                  latency if isinstance(latency, StepLatencyModel) else None)
        self._num_named = 0

    def __repr__(self) -> str:
        trace, scheduler = self.trace, self.engine.scheduler
        host = getattr(scheduler.kv, "host", None)
        checkpoints = "" if host is None else f" and {host.num_blocks:,} on the host for checkpoints"
        return (f"LLM({trace.model!r} on {trace.device}, policy {trace.policy!r}, {trace.num_blocks:,} KV blocks of "
                f"{trace.block_size} tokens{checkpoints}, at most {scheduler.config.max_num_seqs} requests in a step)")

    # -- asking -----------------------------------------------------------------------------------------------

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 params: SamplingParams | Sequence[SamplingParams] | None = None,
                 slo: SLO | Sequence[SLO | None] | None = None, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """Completes one or many prompts, as they are: `chat` applies the model's template.

        Args:
            prompts: text or token ids, one or a sequence of them.
            params: for all, or one for each; None: `SamplingParams()`.
            slo: latency targets make a request real-time, None best-effort; for all, or one for each.
            use_tqdm: show a progress bar if it takes longer than a few seconds and standard error is a terminal.

        Returns:
            One output for each prompt, in the order asked. A request that failed on its own (its error says why) has
            finish reason "failed", and a warning says so.

        Raises:
            ValueError: nothing was run: a prompt is empty, or could never finish in this pool or context, or there are
                not as many parameters as prompts.
        """
        one = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(item, Integral) for item in prompts))
        several: Sequence[Any] = [prompts] if one else prompts
        return self._run([self._token_ids(prompt) for prompt in several], params, slo, use_tqdm)

    def chat(self, messages: str | Conversation | Sequence[Conversation],
             params: SamplingParams | Sequence[SamplingParams] | None = None,
             slo: SLO | Sequence[SLO | None] | None = None, *, use_tqdm: bool = True,
             control_tokens: bool = False) -> list[RequestOutput]:
        """The assistant's next turn in one conversation or in each of several, through the model's chat template. A
        plain text is a conversation of one user's turn. Text that spells a control token stays text unless
        `control_tokens` is set. Otherwise as `generate`."""
        one = isinstance(messages, str) or (len(messages) > 0 and isinstance(messages[0], Mapping))
        several: Sequence[Any] = [messages] if one else messages
        chat = self._loaded.tokenizer.chat
        return self._run([chat(conversation, control_tokens=control_tokens) for conversation in several], params, slo,
                         use_tqdm)

    def stream(self, prompt: Prompt | Conversation, params: SamplingParams | None = None, slo: SLO | None = None,
               ) -> Iterator[str]:
        """Text of one request, piece by piece as it is generated. A conversation goes through the chat template.

        The request starts with the first piece asked for. Leaving the loop early aborts it.

        Raises:
            ValueError: as `generate`; RuntimeError, from the iterator: the request failed; the message says why.
        """
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        token_ids = self._loaded.tokenizer.chat(prompt) if is_chat else self._token_ids(prompt)  # type: ignore[arg-type]
        return self._pieces(self._request(token_ids, params or SamplingParams(), slo))

    # -- what came of it --------------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace:
        """Every step since the beginning, with its reasons."""
        assert self.engine.trace is not None
        return self.engine.trace

    def metrics(self) -> dict[str, Any]:
        """Latencies, throughput and attainment of both classes, of everything served so far; keys as `bros-ref --json`
        has them in "runs"."""
        return summarise(self.trace)

    # -- how --------------------------------------------------------------------------------------------------

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._loaded.tokenizer.encode(prompt)
        if not all(isinstance(token_id, Integral) for token_id in prompt):
            raise ValueError(f"a prompt must be text or token ids, got {prompt!r:.80}; conversations go to chat()")
        return [int(token_id) for token_id in prompt]

    def _request(self, token_ids: list[int], params: SamplingParams, slo: SLO | None) -> Request:
        request_class = RequestClass.BEST_EFFORT if slo is None else RequestClass.REAL_TIME
        self._num_named += 1
        return Request(f"{request_class.value}-{self._num_named - 1}", request_class, token_ids, params, slo=slo)

    def _run(self, prompts: list[list[int]], params: SamplingParams | Sequence[SamplingParams] | None,
             slo: SLO | Sequence[SLO | None] | None, use_tqdm: bool) -> list[RequestOutput]:
        """Adds all requests, or none; steps until all have ended."""
        params = params or SamplingParams()
        all_params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        slos = [slo] * len(prompts) if slo is None or isinstance(slo, SLO) else list(slo)
        for name, values in (("params", all_params), ("slo", slos)):
            if len(values) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts, but {len(values)} {name}; give one for all, or as many")
        requests = [self._request(*each) for each in zip(prompts, all_params, slos, strict=True)]
        waiting, outputs = {request.request_id: request for request in requests}, dict[str, RequestOutput]()
        try:
            for request in requests:
                self.engine.add_request(request)
            with long_task(f"{len(requests)} requests", len(requests), show=use_tqdm) as advance_to:
                while waiting:
                    for request_id in self._step():
                        if request_id in waiting:
                            text = self.engine.streams[request_id].text
                            outputs[request_id] = RequestOutput.of(waiting.pop(request_id), text)
                    advance_to(len(outputs))
        finally:
            for request_id in waiting:  # one was refused, or an interrupt ends the call: the engine stays usable
                self.engine.abort(request_id)
        failed = [output for output in outputs.values() if output.finish_reason == "failed"]
        if failed:
            warnings.warn(f"{len(failed)} of {len(requests)} requests failed; the first: {failed[0].error}",
                          RuntimeWarning, stacklevel=3)
        return [outputs[request.request_id] for request in requests]

    def _step(self) -> list[str]:
        """Ids of the requests that ended in one step, for any reason."""
        try:
            ended = [request.request_id for request in self.engine.step()]
        except StepFailed as failure:
            ended = failure.failed
        return [*ended, *self.engine.aborted]

    def _pieces(self, request: Request) -> Iterator[str]:
        pieces = deque[str]()
        self.engine.add_request(request, lambda _, piece: pieces.append(piece))
        try:
            while pieces or not request.status.is_end:
                if pieces:
                    yield pieces.popleft()
                else:
                    self._step()
        finally:
            self.engine.abort(request.request_id)
        if request.status is RequestStatus.FAILED:
            raise RuntimeError(f"request {request.request_id!r} failed: {request.error}")
