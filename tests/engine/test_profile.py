"""The offline profile: which batches are timed, and what is kept of their times."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.config import KVCacheConfig
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.engine.profile import ROUNDS, profile, speed_key
from bros_ref.model.checksum import ChecksumModel
from bros_ref.scheduler.latency_model import StepFeatures

BLOCK = 4


def runner(num_blocks):
    return ModelRunner(ChecksumModel(), KVCacheConfig(num_blocks, BLOCK), dtype=torch.int64)


def features(batch):
    sums = StepFeatures()
    for new, context in batch:
        sums.add(new, context)
    return sums


batches = st.lists(st.lists(st.tuples(st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1]), st.integers(0, 9)),
                            min_size=1, max_size=4), max_size=5)


@given(batches, st.integers(1, 6), st.integers(1, 4))
def test_the_batches_that_fit_are_timed_in_their_order_and_no_others(candidates, num_blocks, max_num_seqs):
    fitting = [batch for batch in candidates if len(batch) <= max_num_seqs
               and sum(-(-(new + context) // BLOCK) for new, context in batch) <= num_blocks]
    samples = profile(runner(num_blocks), max_num_seqs, candidates=candidates)
    assert [sums for sums, _ in samples] == [features(batch) for batch in fitting]
    assert all(seconds > 0 for _, seconds in samples)


def test_the_fastest_round_is_kept_and_the_warm_up_is_not(monkeypatch):
    made, calls = runner(8), itertools.count()
    durations_s = [100.0, 100.0, 3.0, 7.0, 1.0, 9.0, 2.0, 8.0]  # warm-up of both, then ROUNDS rounds of both
    now_s = [0.0]

    def execute(output):
        now_s[0] += durations_s[next(calls)]

    monkeypatch.setattr(made, "execute", execute)
    monkeypatch.setattr("bros_ref.engine.profile.time.perf_counter", lambda: now_s[0])
    samples = profile(made, 4, candidates=[[(2, 0)], [(1, 3)]])
    assert ROUNDS == 3
    assert [seconds for _, seconds in samples] == [1.0, 7.0]


def test_progress_ends_at_one():
    seen = []
    profile(runner(8), 4, seen.append, candidates=[[(2, 0)], [(1, 3)]])
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_the_cache_key_names_all_that_changes_speed_and_not_the_size_of_an_ample_pool(monkeypatch):
    def key(num_blocks=20_000, max_num_seqs=8, name="m", backend="torch", cpu="a", threads=1):
        monkeypatch.setattr("bros_ref.engine.profile.cpu_model", lambda: cpu)
        monkeypatch.setattr("bros_ref.engine.profile.torch.get_num_threads", lambda: threads)
        made = runner(num_blocks)
        made.backend = backend
        return speed_key(made, max_num_seqs, name)

    assert key(num_blocks=20_001) == key()
    assert len({key(), key(num_blocks=3), key(max_num_seqs=1), key(name="n"), key(backend="cpu-emulated"), key(cpu="b"),
                key(threads=2)}) == 7
