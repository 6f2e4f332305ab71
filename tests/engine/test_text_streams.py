"""Text as it is handed out: stop strings, damaged characters, callbacks that raise, abort or are interrupted."""

import random
import signal
import threading
from collections import Counter, deque
from types import SimpleNamespace

import pytest
from harness import alone, byte_engine, check_accounts, checksum_engine, make_request, random_requests, run
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.engine.detokenizer import IncrementalDecoder, TextStream
from bros_ref.model.tokenizer import ByteTokenizer
from bros_ref.request import SLO, Request, RequestClass, RequestStatus, SamplingParams
from bros_ref.scheduler import POLICIES


@settings(max_examples=200)
@given(text=st.text(alphabet="abé€ ", max_size=40), stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_streamed_text_ends_exactly_before_the_first_stop_string(text, stop):
    tokenizer = ByteTokenizer()
    stream, pieces = TextStream(tokenizer, tuple(stop)), []
    for token_id in text.encode():
        if stream.stopped:
            break
        pieces.append(stream.push(token_id))
    pieces.append(stream.close())
    found = [text.find(s) for s in stop if s in text]
    # the first to be complete wins; among those, the earliest beginning
    ends = [text.find(s) + len(s) for s in stop if s in text]
    expected = text if not found else text[:min(text.find(s) for s in stop
                                                if s in text[:min(ends)])]
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == bool(found)


class CountingTokenizer(ByteTokenizer):
    """Counts what it is asked to decode."""

    num_decoded = 0

    def decode(self, token_ids):
        self.num_decoded += len(token_ids)
        return super().decode(token_ids)


CHUNKS = [bytes([0xFF]), "\ufffd".encode(), bytes([0xF0, 0x9F]), bytes([0x98]), bytes([0x98, 0x80, 0xF0, 0x9F]), b"a",
          "é".encode(), "🎉".encode(), bytes([0xE2, 0x82]), bytes([0xF0])]


class ChunkTokenizer:
    """Tokens of several bytes, which may begin and end in the middle of a character; 99 is a token without text."""

    def decode(self, token_ids):
        return b"".join(CHUNKS[i] for i in token_ids if i != 99).decode("utf-8", errors="replace")


@settings(max_examples=400)
@given(start=st.lists(st.integers(0, len(CHUNKS) - 1), max_size=20), times=st.integers(1, 15),
       unit=st.lists(st.integers(0, len(CHUNKS) - 1) | st.just(99), min_size=1, max_size=4))
def test_text_in_pieces_is_the_text_at_once_however_often_a_damaged_character_comes_again(start, unit, times):
    tokenizer, token_ids = ChunkTokenizer(), start + unit * times
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(token_ids)


@pytest.mark.parametrize("run", [[0xFF], list("\ufffd".encode()), [0x98, 0x80, 0xF0, 0x9F], [257]])
def test_a_run_that_is_no_text_is_shown_as_it_comes_with_the_same_work_for_each_token(run):
    tokenizer = CountingTokenizer()
    stream, token_ids = TextStream(tokenizer), [0xE2, *run * 400]
    for count, token_id in enumerate(token_ids, start=1):
        stream.push(token_id)
        assert count < 4 or len(ByteTokenizer().decode(token_ids[:count])) - len(stream.text) <= 3
    assert tokenizer.num_decoded <= 40 * len(token_ids)
    stream.close()
    assert stream.text == ByteTokenizer().decode(token_ids)


def test_a_callback_that_raises_fails_its_own_request_only():
    engine = byte_engine()
    bad, good = make_request("bad", False, [1, 2], 400 // 10), make_request("good", False, [3, 4], 30)

    def raise_at_once(request, piece):
        raise KeyError("a user's mistake")

    seen = []
    engine.add_request(bad, raise_at_once)
    engine.add_request(good, lambda request, piece: seen.append(piece))
    run(engine, [])
    assert bad.status is RequestStatus.FAILED
    assert isinstance(engine.callback_errors["bad"], KeyError)
    assert good.output_token_ids == alone(good)
    assert "".join(seen) == engine.streams["good"].text


def test_an_interrupt_in_a_callback_is_passed_on_and_loses_no_step():
    engine = byte_engine()
    requests = [make_request(f"r{i}", i > 0, [i + 1, 2], 40) for i in range(3)]
    interrupts = iter([KeyboardInterrupt])

    def interrupt_once(request, piece):
        for interrupt in interrupts:
            raise interrupt

    for request in requests:
        engine.add_request(request, interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        run(engine, [])
    check_accounts(engine)
    run(engine, [])
    emitted = Counter(name for step in engine.trace.steps for name in step.emitted)
    assert [request.output_token_ids for request in requests] == [alone(request) for request in requests]
    assert emitted == {request.request_id: 40 for request in requests}


def test_a_callback_may_abort_itself_and_others():
    engine = byte_engine()
    requests = [make_request(f"r{i}", False, [i + 1, 2], 40) for i in range(3)]

    def abort_all_but_last(request, piece):
        engine.abort("r0")
        engine.abort("r1")

    for request in requests:
        engine.add_request(request, abort_all_but_last)
    run(engine, [])
    assert [r.status for r in requests[:2]] == [RequestStatus.ABORTED] * 2
    assert requests[2].output_token_ids == alone(requests[2])


def speaking_engine(answers, **limits):
    """An engine whose model says, for each request id, the given text byte by byte."""
    engine = byte_engine(**limits)
    said = {name: iter(text.encode()) for name, text in answers.items()}
    engine.runner = SimpleNamespace(execute=lambda output: [next(said[r.request_id]) for r in output.requests])
    return engine


def speak(engine, name, num_bytes, stop=(), on_text=None, is_rt=False):
    """Adds a request and returns it and the pieces of text that it gets."""
    pieces = []
    request = Request(name, RequestClass.REAL_TIME if is_rt else RequestClass.BEST_EFFORT, [1],
                      SamplingParams(max_tokens=num_bytes, stop=stop), slo=SLO(9.0, 9.0) if is_rt else None)

    def callback(request, piece):
        pieces.append(piece)
        if on_text is not None:
            on_text(request, piece)

    engine.add_request(request, callback)
    return request, pieces


@pytest.mark.parametrize(("text", "stop", "shown", "reason"), [
    ("abc", ("cX",), "abc", "length"),  # what was held back as a possible stop string is handed out
    ("abé", (), "ab\ufffd", "length"),  # and so is half a character: the limit cuts é in two
    ("abcX", ("cX",), "ab", "stop"),  # the stop string ends on the last allowed token
    ("abcXd", ("cX",), "ab", "stop"),
    ("ab\ufffd", ("\ufffd",), "ab", "stop"),
])
def test_the_last_allowed_token_loses_no_text_and_may_complete_a_stop_string(text, stop, shown, reason):
    limit = len(text.encode()) - (text == "abé")
    engine = speaking_engine({"r": text})
    request, pieces = speak(engine, "r", limit, stop)
    run(engine, [])
    assert ("".join(pieces), request.status.value) == (shown, reason)
    assert engine.streams["r"].text == shown
    assert engine.trace.steps[-1].finished == {"r": reason}
    assert not engine.scheduler.running


def test_no_text_reaches_a_request_that_another_ones_callback_aborted_in_the_same_step():
    engine = speaking_engine({"a": "xxxx", "b": "yyyy"})
    _, a = speak(engine, "a", 4, on_text=lambda *_: engine.abort("b") if len(a) == 2 else None)
    aborted, b = speak(engine, "b", 4)
    run(engine, [])
    assert (a, b) == (["x"] * 4, ["y"])
    assert aborted.status is RequestStatus.ABORTED
    assert engine.trace.ended_outside.keys() == {"b"}
    assert [step.finished for step in engine.trace.steps if step.finished] == [{"a": "length"}]


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_callback_that_raises_and_one_that_is_interrupted_in_one_step_cost_no_end_and_no_text(first):
    engine = speaking_engine({"a": "abcdef", "b": "ghijkl", "c": "ecfjkm"})

    def misbehave(error):
        def on_text(request, piece):
            if piece in "ag":
                raise error
        return on_text

    order = [("a", KeyError("a user's mistake")), ("b", KeyboardInterrupt())]
    texts = {name: speak(engine, name, 6, on_text=misbehave(error))[1]
             for name, error in (order if first == "a" else order[::-1])}
    texts["c"] = speak(engine, "c", 6)[1]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.trace.steps[-1].finished == {"a": "failed"}
    run(engine, [])
    assert {name: "".join(pieces) for name, pieces in texts.items()} == {"a": "a", "b": "ghijkl", "c": "ecfjkm"}
    assert (engine._on_text, list(engine._pieces)) == ({}, [])


@pytest.mark.parametrize("is_last", [False, True])
def test_text_that_an_interrupt_between_two_callbacks_held_up_is_handed_out_by_the_next_step(is_last):
    engine = speaking_engine({"a": "abc", "b": "def"})
    texts = [speak(engine, name, 1 if is_last else 3)[1] for name in "ab"]
    pieces = engine._pieces

    class Interrupted(deque):
        def popleft(self):
            engine._pieces = deque(self)
            raise KeyboardInterrupt

    engine._pieces = Interrupted(pieces)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert texts == [[], []]
    assert engine.has_unfinished
    run(engine, [])
    assert ["".join(pieces) for pieces in texts] == ["a" if is_last else "abc", "d" if is_last else "def"]


@pytest.mark.parametrize("where", ["observe", "push", "append"])
def test_control_c_in_the_middle_of_bookkeeping_takes_effect_after_it(where):
    engine = speaking_engine({"a": "abc", "b": "def"})
    requests, texts = zip(*(speak(engine, name, 3) for name in "ab"), strict=True)
    owner = {"observe": engine.scheduler.latency, "push": engine.streams["a"], "append": engine.trace}[where]
    method = getattr(owner, where)

    def interrupted(*args):
        setattr(owner, where, method)
        signal.raise_signal(signal.SIGINT)
        return method(*args)

    engine.step()
    setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    check_accounts(engine)
    assert [len(request.output_token_ids) for request in requests] == [2, 2]
    run(engine, [])
    assert ["".join(pieces) for pieces in texts] == ["abc", "def"]
    assert [step.emitted for step in engine.trace.steps] == [["a", "b"]] * 3
    assert engine.trace.steps[-1].finished == {"a": "length", "b": "length"}


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN, signal.SIG_DFL])
def test_the_usual_handler_of_interrupts_is_back_after_a_step(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        engine = checksum_engine("bros")
        run(engine, [make_request("r", False, [1], 3)])
        assert signal.getsignal(signal.SIGINT) is handler
        worker = threading.Thread(target=run, args=(engine, [make_request("s", False, [1], 3)]))
        worker.start()
        worker.join()
        assert not engine.has_unfinished
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_an_interrupt_anywhere_in_deciding_is_undone(policy, seed):
    """It strikes before or after some call of the KV manager, so decisions are half booked."""
    rng = random.Random(seed)
    engine = checksum_engine(policy, rng.randint(5, 14), 4, rng.choice([None, 0, 2]), max_num_batched_tokens=16)
    requests = random_requests(rng, 10, 20, 4, 0.2)
    kv, luck = engine.scheduler.kv, rng.randint(1, 60)
    calls = iter(range(10_000))

    def interrupting(method):
        def call(*args, **kwargs):
            number = next(calls)
            if number == luck:
                raise KeyboardInterrupt
            result = method(*args, **kwargs)
            if number == luck + 1:
                raise KeyboardInterrupt
            return result
        return call

    for name in ("allocate_slots", "begin_step", "swap_out", "reclaim"):
        setattr(kv, name, interrupting(getattr(kv, name)))
    pending, interrupts = list(requests), 0
    while pending or engine.has_unfinished:
        while pending and pending[0].arrival_s <= engine.clock.now_s():
            engine.add_request(pending.pop(0))
        try:
            engine.step() if engine.has_unfinished else engine.clock.sleep_until(pending[0].arrival_s)
        except KeyboardInterrupt:
            interrupts += 1
        check_accounts(engine)
    assert interrupts <= 2
    for request in requests:
        assert request.status is RequestStatus.FINISHED_LENGTH or policy == "scorpio", "it rejects what it cannot serve"
        assert request.output_token_ids == alone(request)[:len(request.output_token_ids)]
    assert list(engine.trace.phases()) == [request.request_id for request in requests]
