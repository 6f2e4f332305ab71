"""A split model is the model: every family, ranks as threads that exchange through a barrier."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

from bros_ref.model.decoder import Decoder
from bros_ref.model.parallel import TensorParallel, expected_bytes
from bros_ref.model.weights.parameters import RANDOM_FAMILIES, parameter_shapes, random_parameters

from .checkpoints import Sequences

LLAMA = RANDOM_FAMILIES["llama"]


@dataclass
class ThreadRank(TensorParallel):
    """A rank whose exchanges go through memory that all threads share."""

    meeting: "Meeting | None" = None

    def all_reduce(self, x):
        with self._exchange(x):
            parts = self.meeting.swap(self.rank, x.clone())
        return x.copy_(torch.stack(parts).sum(0))

    def gather_logits(self, logits):
        with self._exchange(logits):
            parts = self.meeting.swap(self.rank, logits)
        return torch.cat(parts, dim=1)


class Meeting:
    def __init__(self, size):
        self.slots, self.barrier = [None] * size, threading.Barrier(size, timeout=20)

    def swap(self, rank, x):
        self.slots[rank] = x
        self.barrier.wait()
        parts = list(self.slots)
        self.barrier.wait()
        return parts


def run(config, parallel, weights, tokens=(7, 3)):
    parameters = {name: parallel.shard(name, tensor) for name, tensor in weights.items()} if parallel else weights
    decoder = Decoder(config, parameters, parallel=parallel)
    ids = [[(7 * i + 3 * j) % config.vocab_size for j in range(12)] for i in range(2)]
    sequences = Sequences(decoder.config, decoder, ids, [[0, 2, 4], [1, 3, 5]], [False, True], block_size=4)
    first = sequences.step(tokens)  # a prefill of both
    return torch.cat([*first, *sequences.step((1, 1)), *sequences.step((0, 2))])


CONFIGS = {
    **{family: replace(config, num_heads=8, num_kv_heads=8 if family == "opt" else 4)
       for family, config in RANDOM_FAMILIES.items()},
    "llama-untied-biased": replace(LLAMA, num_heads=4, num_kv_heads=4, tied_embeddings=False, attention_out_bias=True,
                                   mlp_bias=True, attention_qkv_bias=True),
    "llama-fewer-kv-heads-than-ranks": replace(LLAMA, num_heads=8, num_kv_heads=2),
    "llama-one-kv-head": replace(LLAMA, num_heads=4, num_kv_heads=1),
    "llama-vocabulary-that-does-not-divide": replace(LLAMA, num_heads=4, num_kv_heads=4, vocab_size=259),
    "llama-vocabulary-smaller-than-its-shares": replace(LLAMA, num_heads=4, num_kv_heads=4, vocab_size=9),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_compute_the_logits_of_the_whole_model(name, size):
    config = CONFIGS[name]
    weights = random_parameters(config, seed=3)
    expected = run(config, None, weights)
    meeting = Meeting(size)
    ranks = [ThreadRank(rank, size, config, meeting=meeting) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(lambda rank: run(config, rank, weights), ranks))
    for logits in results:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert (logits.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_have_the_shapes_that_a_rank_expects_and_cover_every_weight(name):
    config, size = CONFIGS[name], 4
    weights = random_parameters(config)
    assert set(weights) == set(parameter_shapes(config))
    ranks = [TensorParallel(rank, size, config) for rank in range(size)]
    for weight, tensor in weights.items():
        shards = [rank.shard(weight, tensor) for rank in ranks]
        assert [tuple(shard.shape) for shard in shards] == [rank.shapes()[weight] for rank in ranks]
        kept = torch.cat([shard.flatten() for shard in shards])
        assert set(tensor.flatten().tolist()) <= set(kept.tolist())


def test_a_bias_behind_a_row_parallel_product_is_added_once():
    config = CONFIGS["llama-untied-biased"]
    bias = torch.ones(config.hidden_size)
    shards = [TensorParallel(rank, 4, config).shard("layers.0.attn_out.bias", bias) for rank in range(4)]
    assert torch.equal(torch.stack(shards).sum(0), bias)


@pytest.mark.parametrize("size", [3, 4, 12])
def test_a_model_that_does_not_divide_says_what_would(size):
    with pytest.raises(ValueError, match=r"6 query heads, 2 KV heads .* over .* ranks; tp can be one of \[1, 2, 6\]"):
        TensorParallel(0, size, LLAMA)


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_refused(rank, size):
    with pytest.raises(ValueError, match="does not exist"):
        TensorParallel(rank, size, LLAMA)


def test_exchanged_bytes_are_those_of_the_formula():
    config = CONFIGS["llama"]
    weights, meeting = random_parameters(config), Meeting(2)
    ranks = [ThreadRank(rank, 2, config, meeting=meeting) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: run(config, rank, weights), ranks))
    steps = [(10, 10), (2, 2), (2, 2)]  # (tokens, rows of logits) of the three steps of `run`
    for rank in ranks:
        assert rank.exchanged_bytes == sum(expected_bytes(config, *step, size=2, itemsize=4) for step in steps)
        assert rank.num_exchanges == len(steps) * (2 * config.num_layers + 1)
