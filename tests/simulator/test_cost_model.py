"""The GPU cost model: the paper's pools, the measured points, limits, and errors that say by how much."""

import csv
import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.simulator.cost_model import CostModel, gpu_named, model_named, relative_error
from bros_ref.simulator.gpus import GPUS, MODELS, ModelShape

PROFILES = Path(__file__).resolve().parents[3] / "shared" / "data" / "costmodel"
NAMES = {"llama2-7b": "llama-2-7b", "llama2-13b": "llama-2-13b", "llama3-8b": "llama-3-8b"}
MEASURED = {"a100": "a100-80gb", "h100": "h100-80gb"}
PAPER = [("opt-13b", "a100-40gb", 2, 51_000), ("opt-30b", "a100-40gb", 4, 55_000),
         ("llama-3-70b", "a100-80gb", 8, 1_280_000)]


def fits(model, gpu, tp):
    try:
        return CostModel(GPUS[gpu], MODELS[model], tp)
    except ValueError:
        return None


ALL = [cost for model, gpu, tp in itertools.product(MODELS, GPUS, (1, 2, 4, 8)) if (cost := fits(model, gpu, tp))]


@pytest.mark.parametrize(("model", "gpu", "tp", "tokens"), PAPER)
def test_kv_pools_are_the_papers(model, gpu, tp, tokens):
    assert relative_error(CostModel(gpu_named(gpu), model_named(model), tp).kv_tokens, tokens) < 0.01


@pytest.mark.parametrize(("model", "parameters"), [("opt-13b", 12.85e9), ("opt-30b", 29.97e9), ("llama-2-7b", 6.74e9),
                                                   ("llama-2-13b", 13.02e9), ("llama-3-8b", 8.03e9),
                                                   ("llama-3-70b", 70.55e9), ("mistral-7b", 7.25e9)])
def test_shapes_have_their_published_parameter_counts(model, parameters):
    assert relative_error(MODELS[model].parameters, parameters) < 0.01


@given(st.sampled_from(ALL), st.integers(0, 64), st.integers(0, 200_000), st.integers(0, 2048), st.integers(0, 4096))
def test_more_work_never_takes_less_time(cost, decodes, contexts, chunk, context):
    def seconds(decodes, contexts, chunk):
        return cost.step_s(decodes + chunk, decodes, chunk * (context + chunk / 2), contexts * (decodes > 0))

    base = seconds(decodes, contexts, chunk)
    assert 0 < base <= min(seconds(decodes + 1, contexts, chunk), seconds(decodes, contexts + 1000, chunk),
                           seconds(decodes, contexts, chunk + 1))


@given(st.sampled_from([cost for cost in ALL if cost.tp > 1]))
def test_tensor_parallelism_shortens_large_batches_but_not_linearly(cost):
    alone = fits(*[name for name, shape in MODELS.items() if shape is cost.model],
                 next(name for name, gpu in GPUS.items() if gpu is cost.gpu), cost.tp // 2)
    if alone is not None and cost.gpu.link_bytes_per_s > 100e9:
        ratio = alone.step_s(2048, 0, 2048 * 1024, 0) / cost.step_s(2048, 0, 2048 * 1024, 0)
        assert 1 < ratio < 2


def test_copies_overlap_by_direction_and_cost_nothing_when_there_are_none():
    cost = CostModel(GPUS["a100-80gb"], MODELS["llama-2-13b"])
    assert cost.copy_s(0, 0, 0) == 0
    assert cost.copy_s(100, 100, 0) == cost.copy_s(100, 0, 0) > 100 * cost.restore_s_per_token
    assert cost.copy_s(0, 0, 100) < cost.copy_s(0, 100, 0), "memory is faster than PCIe"


def test_errors_say_what_would_do():
    with pytest.raises(ValueError, match="a100-40gb"):
        gpu_named("v100")
    with pytest.raises(ValueError, match="opt-13b"):
        model_named("gpt-5")
    with pytest.raises(ValueError, match=r"exceed the usable memory by [\d,]+ bytes"):
        CostModel(GPUS["l4"], MODELS["opt-13b"])
    with pytest.raises(ValueError, match="40 KV heads"):
        CostModel(GPUS["h100-80gb"], MODELS["opt-13b"], 3)


def errors(rows, predict, column):
    return np.array([relative_error(predict(row), 1e-3 * float(row[column])) for row in rows])


def layer_of(row):
    gpu, shape = GPUS[MEASURED[row["gpu"]]], MODELS[NAMES[row["model"]]]
    assert isinstance(shape, ModelShape)
    return gpu, gpu.efficiency, shape


def linear_s(row):
    gpu, e, shape = layer_of(row)
    read_s = 2 * shape.layer_parameters / (gpu.memory_bytes_per_s * e.weight_read_share)
    multiply_s = 2 * shape.layer_parameters * float(row["num_tokens"]) / (gpu.flops_per_s * e.linear_share)
    return (read_s**e.knee + multiply_s**e.knee) ** (1 / e.knee)


def decode_s(row):
    gpu, e, shape = layer_of(row)
    batch, context = float(row["batch"]), float(row["context"])
    bytes_read = batch * context * shape.kv_bytes_per_token / shape.num_layers
    return e.decode_launch_s + max(e.decode_sequence_s * batch,
                                   bytes_read / (gpu.memory_bytes_per_s * e.decode_read_share))


@pytest.mark.skipif(not PROFILES.exists(), reason="the public profiles are not at hand")
@pytest.mark.parametrize(("gpu", "linear", "decode"), [("a100", 0.045, 0.18), ("h100", 0.065, 0.18)])
def test_error_against_the_measured_points_is_as_stated(gpu, linear, decode):
    with open(PROFILES / "linear_per_layer.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"] == gpu]
    assert errors(rows, linear_s, "layer_linear_ms").mean() < linear
    with gzip.open(PROFILES / "attn_decode_per_layer.csv.gz", "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"] == gpu]
    assert errors(rows, decode_s, "layer_ms").mean() < decode
