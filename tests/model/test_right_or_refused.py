"""A checkpoint either gives transformers' logits or does not load, and the error names what was not understood."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bros_ref.config import ModelConfig
from bros_ref.model.rotary import rope_tables
from bros_ref.model.weights.load import WeightsError, load_model_config, load_weights

from .checkpoints import CHECKPOINTS, F32, gguf_name, make_hf, our_logits, save, write_gguf

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


# --- GGUF

def gguf_of(tmp_path: Path, name: str = "llama-gqa-tied", arch: str = "llama", **options: Any) -> str:
    return write_gguf(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", make_hf(name), arch, F32, **options)


@pytest.mark.parametrize("name", [
    "blk.0.ffn_up.bias", "blk.1.ffn_gate.bias", "blk.0.attn_q.scale", "blk.1.attn_q.bias", "blk.0.attn_norm.bias",
    "output_norm.bias", "blk.3.attn_q.weight", "blk.0.attn_q_norm.weight", "blk.0.ffn_gate_inp.weight",
    "rope_factors_long.weight", "output.bias", "blk.0.attn_qkv.weight", "blk.0.post_attention_norm.weight",
    "token_types.weight", "blk.0.attn_sinks.weight"])
def test_a_gguf_tensor_that_nobody_reads_is_refused(tmp_path: Path, name: str) -> None:
    file = gguf_of(tmp_path, extra={name: np.ones(48, np.float32)})
    with pytest.raises(WeightsError, match=f"tensor {name} has no place in this model"):
        load_weights(file)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "float64"])
def test_gguf_types_that_are_no_weights_are_refused(tmp_path: Path, dtype: str) -> None:
    file = gguf_of(tmp_path, omit="output_norm.weight", extra={"output_norm.weight": np.ones(48, dtype)})
    with pytest.raises(WeightsError, match=r"tensor output_norm\.weight: quantisation [FI]\d+ is not supported"):
        load_weights(file)


def test_gguf_biases_are_used(tmp_path: Path) -> None:
    """Query and key biases stand in the order of their rows."""
    token_ids = torch.arange(30)
    file = gguf_of(tmp_path, "llama-biased-wide-heads")
    with torch.inference_mode():
        theirs = make_hf("llama-biased-wide-heads")(token_ids[None]).logits[0]
    torch.testing.assert_close(our_logits(file, token_ids), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("metadata", "scaling"), [
    ({"scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"scaling__type": "linear", "scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"scaling__type": "none", "scaling__factor": 4.0}, None), ({"scaling__factor": 0.0}, None),
    ({"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 64},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    ({"scaling__type": "yarn", "scaling__factor": 4.0}, {"rope_type": "yarn", "factor": 4.0})])
def test_gguf_rotary_keys_scale_as_in_transformers(tmp_path: Path, change: Callable[..., str],
                                                   metadata: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    folder = change(rope_scaling=scaling)
    file = gguf_of(tmp_path, **{f"llama__rope__{key}": value for key, value in metadata.items()})
    assert load_model_config(file).rope_scaling == load_model_config(folder).rope_scaling
    token_ids = torch.arange(60)
    torch.testing.assert_close(our_logits(file, token_ids), our_logits(folder, token_ids), rtol=0, atol=1e-5)


def test_rope_freqs_are_llama_3s_scaling(tmp_path: Path) -> None:
    """What the converter writes for Llama 3.1 and later: by how much each frequency is divided."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = make_hf("llama-mha-untied-rope3")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    divisors = (1.0 / model.config.rope_theta ** (torch.arange(0, 8, 2) / 8) / scaled).numpy().astype(np.float32)
    assert 1 < divisors.max() <= 8
    file = gguf_of(tmp_path, "llama-mha-untied-rope3", extra={"rope_freqs.weight": divisors})
    token_ids = torch.arange(90)
    with torch.inference_mode():
        theirs = model(token_ids[None]).logits[0]
    torch.testing.assert_close(our_logits(file, token_ids), theirs, rtol=0, atol=1e-4)
    for extra, metadata in (({"rope_freqs.weight": divisors[:-1]}, {}), ({"rope_freqs.weight": -divisors}, {}),
                            ({"rope_freqs.weight": divisors}, {"llama__rope__scaling__factor": 2.0})):
        with pytest.raises(WeightsError, match=r"divisors must be|scaled by rope_freqs"):
            load_model_config(gguf_of(tmp_path, "llama-mha-untied-rope3", extra=extra, **metadata))


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_partial_rotary_equals_transformers(tmp_path: Path, arch: str) -> None:
    """Phi-3 is Llama with fused matrices and, optionally, heads that turn in part."""
    import transformers

    torch.manual_seed(5)
    config = transformers.Phi3Config(**CHECKPOINTS["llama-gqa-tied"][1] | {"pad_token_id": 0, "rope_theta": 1e4},
                                     partial_rotary_factor=0.5, attn_implementation="eager")
    phi = transformers.Phi3ForCausalLM(config).eval()
    state = {name: torch.randn_like(tensor) * 0.15 + (tensor.dim() == 1) for name, tensor in phi.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    phi.load_state_dict(state)
    writer = gguf.GGUFWriter(tmp_path / "phi.gguf", arch)
    for key, value in {"context_length": 256, "embedding_length": 48, "block_count": 3, "feed_forward_length": 80,
                       "attention.head_count": 6, "attention.head_count_kv": 2, "rope.dimension_count": 4,
                       "attention.key_length": 8, "attention.value_length": 8}.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, tensor in state.items():
        for part, values in llama_parts(name, tensor).items():
            if part.endswith(("q_proj.weight", "k_proj.weight")) and arch == "llama":  # pairs side by side
                values = values.view(-1, 8, 48)[:, [0, 2, 1, 3, 4, 5, 6, 7]].reshape(values.shape)
            if part != "lm_head.weight":
                writer.add_tensor(gguf_name(part), values.contiguous().numpy())
            if part.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and arch == "qwen2":
                writer.add_tensor(gguf_name(part.replace("weight", "bias")), np.zeros(len(values), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    token_ids = torch.arange(40)
    with torch.inference_mode():
        theirs = phi(token_ids[None]).logits[0]
    torch.testing.assert_close(our_logits(str(tmp_path / "phi.gguf"), token_ids), theirs, rtol=0, atol=1e-4)


def llama_parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A Phi-3 tensor under Llama's names."""
    if "qkv_proj" in name:
        parts = zip("qkv", tensor.split([48, 16, 16]), strict=True)
        return {name.replace("qkv_proj", f"{letter}_proj"): part for letter, part in parts}
    if "gate_up_proj" in name:
        return {name.replace("gate_up", which): part
                for which, part in zip(("gate", "up"), tensor.chunk(2), strict=True)}
    return {name: tensor}


@pytest.mark.parametrize(("metadata", "message"), [
    ({"split__count": 2, "split__no": "x"}, "is part x of 2"),
    ({"split__count": 2, "split__no": 0}, r"is part 1 of 2 of a split model; join the parts with `llama-gguf-split"),
    ({"llama__rope__scaling__type": "longrope"}, "another way than linear or yarn"),
    ({"llama__rope__scaling__attn_factor": 1.5}, r"llama\.rope\.scaling\.attn_factor = 1\.5"),
    ({"llama__rope__scaling__yarn_log_multiplier": 0.1}, r"rope\.scaling\.yarn_log_multiplier = 0\.1"),
    ({"llama__rope__dimension_sections": [2, 2]}, r"rope\.dimension_sections"),
    ({"llama__rope__dimension_count": 16}, "rotary_dim must be even and at most head_dim 8, got 16"),
    ({"llama__rope__dimension_count": 3}, "rotary_dim must be even"),
    ({"llama__attention__sliding_window": 16}, r"attention\.sliding_window = 16"),
    ({"llama__attention__scale": 0.5}, r"attention\.scale = 0\.5"),
    ({"llama__attention__value_length": 4}, r"attention\.value_length is not the key length 8"),
    ({"llama__attention__causal": False, "llama__attention__clamp_kqv": 8.0}, "clamp_kqv"),
    ({"llama__attention__layer_norm_epsilon": 1e-5}, "layer_norm_epsilon"),
    ({"llama__logit_scale": 0.06}, "logit_scale"), ({"llama__embedding_scale": 12.0}, "embedding_scale"),
    ({"llama__residual_scale": 0.2}, "residual_scale"), ({"llama__final_logit_softcapping": 30.0}, "softcapping"),
    ({"llama__expert_count": 8}, "mixture-of-experts models are not supported"),
    ({"llama__use_parallel_residual": True}, "use_parallel_residual")])
def test_gguf_keys_that_are_not_understood_are_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_model_config(gguf_of(tmp_path, **metadata))


def test_gguf_keys_at_rest_are_no_obstacle(tmp_path: Path) -> None:
    metadata = {"expert_count": 0, "attention__causal": True, "vocab_size": 97, "rope__scaling__finetuned": True,
                "attention__value_length": 8, "rope__dimension_count": 8}
    file = gguf_of(tmp_path, split__count=1, general__file_type=7,
                   **{f"llama__{key}": value for key, value in metadata.items()})
    assert load_model_config(file) == load_model_config(gguf_of(tmp_path))


def test_divisors_fit_the_dimensions_that_turn() -> None:
    from bros_ref.config import RopeScaling

    shape = {"family": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1,
             "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "max_context_tokens": 16}
    config = ModelConfig(**shape, rotary_dim=4, rope_scaling=RopeScaling("divisors", divisors=(1.0, 2.0)))
    cos, _ = rope_tables(config, torch.float32, "cpu")
    assert cos.shape == (16, 1, 2)
    torch.testing.assert_close(cos[10, 0], torch.tensor([10.0, 10.0 / 100 / 2]).cos())
    for bad in (3, 6):
        with pytest.raises(ValueError, match=r"rotary_dim must be|divisors must be 3 numbers"):
            ModelConfig(**shape, rotary_dim=bad, rope_scaling=RopeScaling("divisors", divisors=(1.0, math.e)))
