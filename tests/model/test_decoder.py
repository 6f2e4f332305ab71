"""Every family's logits against transformers, however the tokens are cut into steps and laid out in blocks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bros_ref.gpu.attention import KernelAttention
from bros_ref.model.attention import AttentionMetadata
from bros_ref.model.decoder import Decoder
from bros_ref.model.rotary import rope_tables
from bros_ref.model.weights.load import load_model_config, load_weights
from bros_ref.model.weights.parameters import RANDOM_FAMILIES, parameter_shapes, random_parameters

from .checkpoints import CHECKPOINTS, Sequences, make_hf, save

TOKENS = 45  # of each sequence
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def case(request: pytest.FixtureRequest,
         tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Decoder, Tensor, Tensor]:
    """Our config and decoder, token ids [2, TOKENS], and transformers' logits for them [2, TOKENS, V]."""
    hf = make_hf(request.param)
    path = save(hf, tmp_path_factory.mktemp(request.param))
    config = load_model_config(path)
    token_ids = torch.randint(0, 97, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = hf(token_ids).logits.float()
    assert expected.std() > 0.1, "logits so small that any bug would pass"
    return config, Decoder(config, load_weights(path)), token_ids, expected


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """Block size, scattered tables that do not overlap, directions."""
    block_size = draw(st.sampled_from([1, 4, 16, 64]))
    blocks = -(-TOKENS // block_size)
    order = draw(st.permutations(range(2 * blocks + 1)))
    return {"block_size": block_size, "tables": [order[:blocks], order[blocks:2 * blocks]],
            "reversed_": [draw(st.booleans()), draw(st.booleans())]}


@settings(max_examples=12)
@given(layout=layouts(), cuts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6))
def test_logits_equal_transformers(case: Any, layout: dict[str, Any], cuts: list[tuple[int, int]]) -> None:
    """Whole prefill, uneven chunks, decode steps, and one sequence ahead of the other: all in one batch."""
    config, decoder, token_ids, expected = case
    run = Sequences(config, decoder, token_ids.tolist(), **layout)
    got: list[list[Tensor]] = [[], []]
    for cut in [*cuts, (1, TOKENS), (1, 1), (TOKENS, TOKENS)]:
        counts = [min(cut[i], TOKENS - run.computed[i]) for i in range(2)]
        if not any(counts):
            continue
        active = [i for i in range(2) if counts[i]]
        for i, logits in zip(active, run.step(counts), strict=True):
            got[i].append(logits)
    for i in range(2):
        torch.testing.assert_close(torch.cat(got[i]), expected[i], **TOLERANCE)


def test_two_sequences_decode_in_shared_blocks(case: Any) -> None:
    """A real-time and a best-effort sequence fill the same blocks from both ends; neither sees the other."""
    config, decoder, token_ids, expected = case
    run = Sequences(config, decoder, token_ids.tolist(), [[2], [2]], [False, True], block_size=2 * TOKENS)
    got: list[list[Tensor]] = [[], []]
    for counts in [(5, 30), (1, 1), (TOKENS - 6, TOKENS - 31)]:
        for i, logits in enumerate(run.step(counts)):
            got[i].append(logits)
    for i in range(2):
        torch.testing.assert_close(torch.cat(got[i]), expected[i], **TOLERANCE)


def test_only_the_rows_asked_for_come_back(case: Any) -> None:
    config, decoder, token_ids, expected = case
    run = Sequences(config, decoder, token_ids.tolist(), [[0], [1]], [False, True], block_size=64)
    run.step([TOKENS, 0])
    meta = AttentionMetadata.build([[0]], [False], [TOKENS], [TOKENS], 64)
    rows = torch.tensor([TOKENS - 1, 3])
    logits = decoder.forward(token_ids[0], meta.positions, run.kv, meta, rows)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected[0, rows], **TOLERANCE)


def test_attention_without_windows_serves_a_windowed_model_up_to_its_window() -> None:
    """The CUDA kernels: the engine refuses a longer request, and the kernels a longer context."""
    config = replace(RANDOM_FAMILIES["mistral"], layer_windows=(None, 9, 16))
    kernels = KernelAttention(device=None)  # type: ignore[arg-type]  # it refuses before it needs one
    assert Decoder(config, random_parameters(config), attention=kernels).config.max_context_tokens == 9
    assert Decoder(config, random_parameters(config)).config.max_context_tokens == 1024
    meta = AttentionMetadata.build([[0]], [False], [1], [10], 16).within(9)
    with pytest.raises(ValueError, match="no sliding windows: a context of 10 tokens exceeds the window of 9"):
        kernels(torch.zeros(1, 6, 16), torch.zeros(1, 16, 2, 16), torch.zeros(1, 16, 2, 16), meta)
    assert AttentionMetadata.build([[0]], [False], [1], [9], 16).within(9).window is None


YARNS: list[dict[str, Any]] = [
    {}, {"attention_factor": 1.3}, {"mscale": 1.2, "mscale_all_dim": 0.7}, {"mscale": 1.2}, {"truncate": False},
    {"beta_fast": 8, "beta_slow": 2}, {"beta_fast": 2.0, "beta_slow": 2.0}, {"factor": 1.0},
    {"original_max_position_embeddings": None}]


@pytest.mark.parametrize("options", [
    {"rope_type": "linear", "factor": 3.0}, {"type": "linear", "factor": 2}, {"rope_type": "default", "factor": 8.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    *({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | yarn for yarn in YARNS)])
def test_rotary_tables_equal_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    options = {key: value for key, value in options.items() if value is not None}
    config = LlamaConfig(**CHECKPOINTS["llama-gqa-tied"][1] | {"head_dim": 32, "rope_scaling": options})
    config.save_pretrained(tmp_path)
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(256)[None])
    for ours, table in zip(rope_tables(load_model_config(str(tmp_path)), torch.float32, "cpu"), theirs, strict=True):
        torch.testing.assert_close(ours[:, 0], table[0, :, :16], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-mha-untied-rope3"])
def test_shards_load_like_one_file(name: str, tmp_path: Path) -> None:
    hf = make_hf(name)
    whole = load_weights(save(hf, tmp_path / "whole"))
    sharded = save(hf, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(Path(sharded).glob("*.safetensors"))) > 1
    loaded = load_weights(sharded)
    assert list(loaded) == list(whole)
    assert all(torch.equal(loaded[key], whole[key]) for key in whole)


@pytest.mark.parametrize("family", list(RANDOM_FAMILIES))
def test_random_weights_are_seeded_and_complete(family: str) -> None:
    config = RANDOM_FAMILIES[family]
    one, same, other = (random_parameters(config, seed) for seed in (3, 3, 4))
    assert {name: tuple(tensor.shape) for name, tensor in one.items()} == parameter_shapes(config)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_weights_are_held_once() -> None:
    config = RANDOM_FAMILIES["llama"]
    weights = random_parameters(config)
    decoder = Decoder(config, weights)
    assert decoder._lm_head.data_ptr() == weights["embed.weight"].data_ptr()
    assert decoder._layers[1].qkv.data_ptr() == weights["layers.1.qkv.weight"].data_ptr()


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_the_config_are_refused(change: str) -> None:
    config = RANDOM_FAMILIES["qwen3"]
    weights = random_parameters(config)
    tensor = weights.pop("layers.2.k_norm.weight")
    if change == "shape":
        weights["layers.2.k_norm.weight"] = tensor[1:]
    with pytest.raises(ValueError, match=r"layers\.2\.k_norm\.weight must have shape \(16,\), found"):
        Decoder(config, weights)
