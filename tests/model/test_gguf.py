"""A GGUF file either gives transformers' logits or does not load, and the error names what was not understood."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from bros_ref.config import ModelConfig, RopeScaling
from bros_ref.model.rotary import rope_tables
from bros_ref.model.weights.load import WeightsError, load_model_config, load_weights

from .checkpoints import CHECKPOINTS, F32, gguf_name, make_hf, our_logits, save, write_gguf


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
def test_gguf_rotary_keys_scale_as_in_transformers(tmp_path: Path, metadata: dict[str, Any],
                                                   scaling: dict[str, Any] | None) -> None:
    folder = save(make_hf("llama-gqa-tied"), tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw | {"rope_scaling": scaling}))
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
    shape = {"family": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1,
             "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "max_context_tokens": 16}
    config = ModelConfig(**shape, rotary_dim=4, rope_scaling=RopeScaling("divisors", divisors=(1.0, 2.0)))
    cos, _ = rope_tables(config, torch.float32, "cpu")
    assert cos.shape == (16, 1, 2)
    torch.testing.assert_close(cos[10, 0], torch.tensor([10.0, 10.0 / 100 / 2]).cos())
    for bad in (3, 6):
        with pytest.raises(ValueError, match=r"rotary_dim must be|divisors must be 3 numbers"):
            ModelConfig(**shape, rotary_dim=bad, rope_scaling=RopeScaling("divisors", divisors=(1.0, math.e)))
