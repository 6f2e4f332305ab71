"""One random life of an engine: any policy on any pool, and everything that may happen to it at once.

Requests come, are aborted in any state, and have stop strings; the runner fails or is interrupted before its copies or
after its computation, or fails single requests; deciding is interrupted in the middle; callbacks add, abort, raise and
are interrupted. Tokens are exact checksums (`ChecksumModel`), so one lost, stale or foreign K/V changes one. Everything
follows from the seed.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence

from harness import accepted_budget, alone, check_accounts, checksum_engine, make_request, random_requests

from bros_ref.engine import LLMEngine, RequestRefused, Runner, StepFailed
from bros_ref.engine.detokenizer import TextStream
from bros_ref.engine.llm_engine import RequestsFailed
from bros_ref.kv_cache.blocks import BlockView
from bros_ref.model.tokenizer import ByteTokenizer
from bros_ref.request import Request, RequestStatus, SamplingParams
from bros_ref.scheduler import PLUS, POLICIES
from bros_ref.scheduler.output import SchedulerOutput
from bros_ref.trace.metrics import summarise

MAX_STEPS = 20_000
MAX_REQUESTS = 40
STOPS = ("a", "ab", "\ufffd", "é", "0\ufffd")


class Life:
    """An engine with its requests and its luck.

    Attributes:
        pieces: request id -> text that its callback was given.
    """

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.trouble = rng.choice([0.0, 0.02, 0.1])  # how often each thing that can go wrong does
        block_size, num_blocks = rng.choice([1, 2, 3, 4, 8, 16]), rng.choice([2, 3, 5, 8, 13, 20])
        self.policy = rng.choice([*POLICIES, *(f"bros+{option}" for option in PLUS)])
        seats, budget = rng.choice([1, 2, 6, 16]), rng.choice([1, 2, 8, 32, 64])
        plain = checksum_engine(
            self.policy, num_blocks, block_size, rng.choice([None, 0, 1, 2, num_blocks]),
            chunked_prefill=rng.random() < 0.5, max_num_seqs=seats,
            max_num_batched_tokens=accepted_budget(self.policy, seats, budget),
            be_max_wait_steps=rng.choice([1, 4, 128]), base_batch_cap=rng.choice([1, 2, 128]),
            min_chunk_tokens=rng.choice([1, 4, 16]), be_aging_tokens_per_step=rng.choice([0, 1, 3]))
        self.snapshots: list[list[BlockView]] = []
        self.engine = LLMEngine(plain.scheduler, TroubledRunner(self, plain.runner), plain.clock, ByteTokenizer(),
                                plain.trace)
        self._interrupt_some_allocations()
        longest = num_blocks * block_size
        self.pending = random_requests(rng, 12, longest, block_size, rng.choice([0.0, 0.3, 1.5]))
        for request in self.pending:
            if rng.random() < 0.3:
                request.sampling = SamplingParams(request.sampling.max_tokens, stop=(rng.choice(STOPS),))
        self.requests: list[Request] = []
        self.pieces: dict[str, list[str]] = {}

    def live(self) -> None:
        """To the end, with the accounts checked after every step."""
        engine, rng = self.engine, self.rng
        for _ in range(MAX_STEPS):
            while self.pending and self.pending[0].arrival_s <= engine.clock.now_s():
                self.add(self.pending.pop(0))
            if engine.scheduler.requests and rng.random() < self.trouble:
                assert engine.abort(rng.choice(sorted(engine.scheduler.requests)))
                engine.scheduler.kv.check_integrity()
            if engine.has_unfinished:
                self._step()
            elif self.pending:
                engine.clock.sleep_until(self.pending[0].arrival_s)
            else:
                return self.check_the_end()
        raise AssertionError(f"not done after {MAX_STEPS} steps: {sorted(engine.scheduler.requests)}")

    def add(self, request: Request) -> None:
        """Adds a request, which may be one that is to be refused."""
        if len(self.requests) >= MAX_REQUESTS:
            return
        try:
            self.engine.add_request(request, self._on_text if self.rng.random() < 0.8 else None)
        except RequestRefused:
            assert request.max_total_tokens > self.engine.scheduler.kv.config.num_slots
            return
        self.requests.append(request)

    def unlucky(self) -> bool:
        return self.rng.random() < self.trouble

    def _step(self) -> None:
        before = set(self.engine.scheduler.requests)
        try:
            ended = {request.request_id for request in self.engine.step()}
            assert before - self.engine.aborted - set(self.engine.scheduler.requests) <= ended
        except (StepFailed, KeyboardInterrupt):  # whoever ended by it is checked at the end
            pass
        check_accounts(self.engine)

    def _on_text(self, request: Request, piece: str) -> None:
        self.pieces.setdefault(request.request_id, []).append(piece)
        if not self.unlucky():
            return
        what = self.rng.randrange(4)
        if what == 0:
            prompt = [self.rng.randrange(997) for _ in range(self.rng.randint(1, 6))]
            name = f"added{len(self.requests)}"
            self.add(make_request(name, self.rng.random() < 0.5, prompt, 5, self.engine.clock.now_s()))
        elif what == 1:
            self.engine.abort(self.rng.choice(self.requests).request_id)
        elif what == 2:
            raise ValueError("a user's mistake")
        else:
            raise KeyboardInterrupt

    def _interrupt_some_allocations(self) -> None:
        kv = self.engine.scheduler.kv
        allocate = kv.allocate_slots

        def troubled(request: Request, num_new_tokens: int, lookahead_tokens: int = 0) -> list[int] | None:
            before, after = self.rng.random() < self.trouble / 8, self.rng.random() < self.trouble / 8
            if before:
                raise KeyboardInterrupt
            table = allocate(request, num_new_tokens, lookahead_tokens)
            if after:
                raise KeyboardInterrupt
            return table

        kv.allocate_slots = troubled  # type: ignore[method-assign]

    # -- what must be so at the end ---------------------------------------------------------------------------

    def check_the_end(self) -> None:
        """Tokens and text are those of each request alone; every end is in the trace, once; nothing is left."""
        engine, trace = self.engine, self.engine.trace
        assert trace is not None
        ends = Counter((name, why) for step in trace.steps for name, why in step.finished.items())
        ends.update((name, str(why)) for name, (_, why) in trace.ended_outside.items())
        assert ends == {(request.request_id, request.status.value): 1 for request in self.requests}
        for request in self.requests:
            self._check_request(request)
        assert list(trace.pools()) == self.snapshots
        scheduler, kv = engine.scheduler, engine.scheduler.kv
        host = getattr(kv, "host", None)
        assert (kv.num_used_blocks, kv.offloaded_tokens, scheduler.running) == (0, {}, [])
        assert host is None or host.num_unused == host.num_blocks
        assert not engine._on_text
        assert not engine._pieces
        json.dumps(summarise(trace), allow_nan=False)

    def _check_request(self, request: Request) -> None:
        expected_tokens, stream = [], TextStream(ByteTokenizer(), request.sampling.stop)
        for token_id in alone(request):
            expected_tokens.append(token_id)
            stream.push(token_id)
            if stream.stopped:
                break
        stream.close()
        shown = self.engine.streams[request.request_id].text
        if request.request_id in self.pieces:
            pieces = "".join(self.pieces[request.request_id])
            assert shown.startswith(pieces) if request.status is RequestStatus.ABORTED else shown == pieces
        if request.status in (RequestStatus.ABORTED, RequestStatus.FAILED):
            assert request.output_token_ids == expected_tokens[:len(request.output_token_ids)]
            assert stream.text.startswith(shown)
            assert (request.error is not None) == (request.status is RequestStatus.FAILED)
        else:
            assert request.output_token_ids == expected_tokens, request.request_id
            assert shown == stream.text
            assert (request.status is RequestStatus.FINISHED_STOP) == stream.stopped


class TroubledRunner:
    """Fails or is interrupted in some steps, half of them before anything was copied, half after everything was
    computed; in others single requests fail."""

    def __init__(self, life: Life, runner: Runner) -> None:
        self._life, self._runner = life, runner

    def execute(self, output: SchedulerOutput) -> Sequence[int | None]:
        life = self._life
        life.snapshots.append(life.engine.scheduler.kv.snapshot())
        fails_before, fails_after, some_fail = life.unlucky(), life.unlucky(), life.unlucky()
        if fails_before:
            raise life.rng.choice([RuntimeError("before the copies"), KeyboardInterrupt()])
        token_ids = self._runner.execute(output)
        if fails_after:
            raise life.rng.choice([RuntimeError("after the forward pass"), KeyboardInterrupt()])
        if some_fail:
            index = life.rng.randrange(len(token_ids))
            raise RequestsFailed([None if i == index else token_id for i, token_id in enumerate(token_ids)],
                                 {index: RuntimeError(f"{output.requests[index].request_id} alone")})
        return token_ids
