"""A checkpoint either gives transformers' logits or does not load, and the error names what was not understood."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bros_ref.model.weights.load import WeightsError, load_model_config, load_weights

from .checkpoints import CHECKPOINTS, make_hf, our_logits, save

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = Path(save(make_hf(name), tmp_path_factory.mktemp(name)))
        return made[name]
    return folder


@pytest.fixture
def change(folders: Callable[[str], Path], tmp_path: Path) -> Callable[..., str]:
    """A copy of a folder with changed config keys (... removes one) and changed or further tensors."""
    def copy(name: str = "llama-gqa-tied", tensors: dict[str, Tensor] | None = None, **config: Any) -> str:
        raw = json.loads((folders(name) / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps({key: v for key, v in raw.items() if v is not ...}))
        save_file(load_file(folders(name) / "model.safetensors") | (tensors or {}), tmp_path / "model.safetensors")
        return str(tmp_path)
    return copy


def assert_equals_transformers(path: str, length: int = 45) -> None:
    import transformers

    token_ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")(token_ids[None])
    torch.testing.assert_close(our_logits(path, token_ids), theirs.logits[0], rtol=0, atol=1e-4)


# --- tensors of a folder

@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int16,
                                   torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("scaled", [True, False])
def test_quantised_tensors_are_refused(change: Callable[..., str], dtype: torch.dtype, scaled: bool) -> None:
    quantised = {Q_PROJ: torch.ones(48, 48).to(dtype)}
    if scaled:
        quantised[Q_PROJ.replace("weight", "weight_scale")] = torch.ones(1)
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.q_proj\.weight.*quantised"):
        load_weights(change(tensors=quantised))


def test_float64_weights_load(change: Callable[..., str], folders: Callable[[str], Path]) -> None:
    whole = load_file(folders("qwen2") / "model.safetensors")
    assert_equals_transformers(change("qwen2", {name: tensor.double() for name, tensor in whole.items()}))


@pytest.mark.parametrize("name", [
    Q_PROJ + "_scale", "model.layers.0.mlp.down_proj.bias", "model.layers.3.mlp.down_proj.weight", "score.weight",
    "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.lora_A.weight", "model.norm.bias",
    "vision_tower.embed.weight"])
def test_a_tensor_that_nobody_reads_is_refused(change: Callable[..., str], name: str) -> None:
    with pytest.raises(WeightsError, match=f"tensor {name} has no place in this model, nor have 0 others"):
        load_weights(change(tensors={name: torch.ones(48)}))


def test_derived_tables_and_a_head_that_is_the_embedding_are_no_strangers(
        change: Callable[..., str], folders: Callable[[str], Path]) -> None:
    embedding = load_file(folders("llama-gqa-tied") / "model.safetensors")["model.embed_tokens.weight"]
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": embedding.clone()}
    assert_equals_transformers(change(tensors=harmless))
    with pytest.raises(WeightsError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, though config\.json"):
        load_weights(change(tensors={"lm_head.weight": embedding + 1}))


def test_a_whole_file_is_read_before_an_index_as_in_transformers(tmp_path: Path,
                                                                 folders: Callable[[str], Path]) -> None:
    save(make_hf("llama-linear"), tmp_path, max_shard_size="60KB")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folders("llama-mha-untied-rope3") / file).read_bytes())
    assert_equals_transformers(str(tmp_path))
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    assert_equals_transformers(str(tmp_path))


def test_a_tensor_that_only_a_shard_knows_is_refused(tmp_path: Path) -> None:
    save(make_hf("llama-linear"), tmp_path, max_shard_size="60KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    save_file(load_file(shard) | {"model.norm.bias": torch.ones(48)}, shard)
    with pytest.raises(WeightsError, match=rf"{shard.name}: tensor model\.norm\.bias has no place"):
        load_weights(str(tmp_path))


@pytest.mark.parametrize("file", ["../outside.safetensors", "sub/../../outside.safetensors", "{}/outside.safetensors"])
def test_an_index_may_not_lead_out_of_its_folder(folders: Callable[[str], Path], tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.safetensors").write_bytes((folders("llama-gqa-tied") / "model.safetensors").read_bytes())
    (folder / "config.json").write_bytes((folders("llama-gqa-tied") / "config.json").read_bytes())
    names = load_file(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(names, file.format(tmp_path))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"index\.json: .*outside\.safetensors' is outside the folder"):
        load_weights(str(folder))


def test_an_adapter_is_not_its_base_model(change: Callable[..., str]) -> None:
    folder = change()
    (Path(folder) / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"holds an adapter \(adapter_config\.json\)"):
        load_weights(folder)


# --- keys of config.json

@pytest.mark.parametrize(("key", "value"), [
    ("quantization_config", {"quant_method": "gptq"}), ("quantization_config", {"quant_method": "fp8"}),
    ("compression_config", {"format": "float-quantized"}), ("quantization", {"bits": 4}),
    ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0), ("embedding_multiplier", 12.0),
    ("residual_multiplier", 0.22), ("attention_multiplier", 0.0078125), ("logits_scaling", 8.0), ("logit_scale", 0.06),
    ("query_pre_attn_scalar", 256), ("num_experts", 8), ("num_local_experts", 8), ("moe_intermediate_size", 64),
    ("qk_norm", True), ("use_qk_norm", True), ("clip_qkv", 8.0), ("alibi", True), ("use_parallel_residual", True),
    ("rotary_pct", 0.25), ("rope_interleaved", True), ("no_rope_layers", [1, 0, 1]), ("attention_chunk_size", 16),
    ("scale_emb", 12), ("scale_depth", 1.4), ("kv_lora_rank", 8), ("attention_sink", True), ("layer_types", ["x"] * 3),
    ("norm_type", "layernorm"), ("attn_temperature_tuning", True), ("cross_attention_layers", [1]),
    ("hidden_act", "gelu"), ("partial_rotary_factor", 0.5), ("mup_base_width", 2), ("swiglu_limit", 7.0),
    ("dim_model_base", 256), ("emb_multiplier", 2.0), ("base_freq", 5e5), ("transformers_weights", "x.safetensors")])
def test_a_key_that_would_change_the_logits_is_refused_by_name(change: Callable[..., str], key: str,
                                                               value: Any) -> None:
    with pytest.raises(WeightsError, match=rf"config\.json: .*{key}"):
        load_model_config(change(**{key: value}))


def test_keys_at_rest_and_keys_that_compute_nothing_are_no_obstacle(change: Callable[..., str]) -> None:
    assert_equals_transformers(change(
        compression_config=None, num_experts=0, qk_norm=False, embedding_multiplier=1.0, logit_scale=1, alibi=None,
        attention_dropout=0.5, pretraining_tp=2, sliding_window=4, use_sliding_window=True, unsloth_version="2025.1",
        partial_rotary_factor=1.0, max_window_layers=1, layer_norm_eps=1e-5, transformers_js_config={"a": 1}))


@pytest.mark.parametrize("name", ["qwen2", "mistral-windowed"])
def test_biases_that_a_family_does_not_have_are_not_looked_for(change: Callable[..., str], name: str) -> None:
    assert_equals_transformers(change(name, attention_bias=True, mlp_bias=True, use_sliding_window=False))


@pytest.mark.parametrize("name", ["qwen2-windowed", "qwen3"])
@pytest.mark.parametrize("windows", [
    {"use_sliding_window": False, "layer_types": ...}, {"sliding_window": None, "layer_types": ...},
    {"use_sliding_window": True, "max_window_layers": 2, "layer_types": ...},
    {"use_sliding_window": True, "sliding_window": 5,
     "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    {"use_sliding_window": True, "max_window_layers": ..., "layer_types": ...}])
def test_windows_are_where_transformers_has_them(change: Callable[..., str], name: str,
                                                 windows: dict[str, Any]) -> None:
    assert_equals_transformers(change(name, **{"sliding_window": 7} | windows))


@pytest.mark.parametrize(("name", "config"), [
    ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}),
    ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3}),
    ("mistral-windowed", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    ("mistral-windowed", {"layer_types": ["chunked_attention"] * 3})])
def test_layer_types_that_mean_nothing_are_refused(change: Callable[..., str], name: str,
                                                   config: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=r"layer_types = .* is not supported with 3 layers of"):
        load_model_config(change(name, **config))


@pytest.mark.parametrize("window", [0, -1, 2.5, True, "wide"])
def test_a_window_is_a_positive_whole_number(change: Callable[..., str], window: Any) -> None:
    with pytest.raises(WeightsError, match=r"layer_windows must be a positive whole number"):
        load_model_config(change("mistral-windowed", sliding_window=window))


def test_a_windowed_model_of_far_too_many_layers_is_refused_at_once(change: Callable[..., str]) -> None:
    with pytest.raises(WeightsError, match="num_layers must be at most"):
        load_model_config(change("mistral-windowed", num_hidden_layers=10**12))


FIELDS = {"vocab_size": "vocab_size", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
          "max_context_tokens": "max_position_embeddings", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
          "tied_embeddings": "tie_word_embeddings", "bos_token_id": "bos_token_id"}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings")


@pytest.mark.parametrize("name", ["llama-mha-untied-rope3", "mistral-windowed", "qwen2-windowed", "qwen3"])
def test_a_missing_key_means_what_transformers_fills_in(change: Callable[..., str], name: str) -> None:
    import transformers

    for key in {*CHECKPOINTS[name][1], *FIELDS.values(), "eos_token_id", "sliding_window"}:
        folder = change(name, **{"num_attention_heads": 32, "num_key_value_heads": 4, "layer_types": ...} | {key: ...})
        if key in REQUIRED:
            with pytest.raises(WeightsError, match=f"{key} is missing"):
                load_model_config(folder)
            continue
        ours, theirs = load_model_config(folder), transformers.AutoConfig.from_pretrained(folder)
        for field, attribute in FIELDS.items():
            expected = getattr(theirs, attribute, None)
            if attribute == "head_dim" and expected is None:
                expected = theirs.hidden_size // theirs.num_attention_heads
            assert getattr(ours, field) == expected, (key, field)
        assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
        if name == "mistral-windowed":
            assert set(ours.layer_windows) == {theirs.sliding_window}


@pytest.mark.parametrize("opening", ['{"a":', "["])
def test_json_nested_too_deeply_is_one_error(tmp_path: Path, opening: str) -> None:
    (tmp_path / "config.json").write_text(opening * 200_000)
    with pytest.raises(WeightsError, match=r"config\.json is not valid JSON"):
        load_model_config(str(tmp_path))


OTHER_VALUES: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "swish", None], "num_key_value_heads": [None, 1, 3, 6, 0, ...],
    "head_dim": [None, 8, 12, 0, ...], "sliding_window": [None, 1, 4, 44, 45, 46, ...],
    "rms_norm_eps": [1e-3, 0, None, ...], "rope_theta": [500.0, 1e6, "x", ...], "attention_bias": [True, False, ...],
    "mlp_bias": [True, False], "tie_word_embeddings": [True, False, ...],
    "use_sliding_window": [True, False, ...], "max_window_layers": [0, 1, 2, 3, 28, ...], "layer_types": [
        ..., None, ["full_attention"] * 3, ["sliding_attention", "full_attention", "sliding_attention"]],
    "num_hidden_layers": [1, 2, 3, 4], "vocab_size": [96, 97, 98], "intermediate_size": [40, 80],
    "partial_rotary_factor": [0.5, 1.0], "max_position_embeddings": [64, 512], "pretraining_tp": [2],
    "model_type": ["llama", "mistral", "qwen2", "qwen3"], "enable_bias": [False], "do_layer_norm_before": [False],
    "rope_scaling": [None, ..., {"rope_type": "default"}, {"type": "linear", "factor": 2.0}, {"factor": 2.0},
                     {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0},
                     {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 4}]}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([*CHECKPOINTS]), data=st.data())
def test_whatever_the_config_says_the_logits_are_transformers_or_none(change: Callable[..., str], name: str,
                                                                      data: st.DataObject) -> None:
    import transformers

    keys = data.draw(st.lists(st.sampled_from([*OTHER_VALUES]), min_size=1, max_size=3, unique=True))
    folder = change(name, **{key: data.draw(st.sampled_from(OTHER_VALUES[key])) for key in keys})
    token_ids = torch.arange(45)
    try:
        ours = our_logits(folder, token_ids)
    except WeightsError:
        return
    try:
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True)
        with torch.inference_mode():
            logits = theirs(token_ids[None]).logits[0]
    except Exception:  # whatever it raises: there is nothing to compare with
        return
    assert not report["missing_keys"]
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-3)
