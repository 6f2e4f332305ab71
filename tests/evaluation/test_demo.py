"""The demo's pool: short by the factor it names, and never too small for any request."""

import math

from hypothesis import given
from hypothesis import strategies as st

from bros_ref.evaluation.demo import QUESTION_SLO, pool_blocks
from bros_ref.request import RequestClass
from bros_ref.workload import WorkloadItem

lengths = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 60)), min_size=1, max_size=20)


@given(documents=lengths, questions=lengths, seats=st.integers(1, 10), block_size=st.sampled_from([1, 15, 16, 17]))
def test_a_full_batch_of_documents_asks_for_the_factor_of_the_pool(documents, questions, seats, block_size):
    items = [WorkloadItem(0.0, RequestClass.BEST_EFFORT, *length) for length in documents]
    items += [WorkloadItem(0.0, RequestClass.REAL_TIME, *length, QUESTION_SLO) for length in questions]
    blocks = pool_blocks(items, seats, block_size, oversubscription=1.3)
    asked = sum(sorted(map(sum, documents))[-seats:])
    largest = max(map(sum, documents + questions))
    assert blocks == math.ceil(max(int(asked / 1.3), largest) / block_size)
    assert blocks * block_size >= largest
