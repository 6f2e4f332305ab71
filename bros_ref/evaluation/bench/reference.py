"""Our very tensors in the form that other software reads: transformers' own Llama, and a Hugging Face folder.

What the engine is compared with, in tests and in benchmarks. transformers is a development requirement only; nothing
else in the package imports it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bros_ref.config import ModelConfig
from bros_ref.model.weights.parameters import Parameters


def transformers_llama(config: ModelConfig, weights: Parameters) -> Any:
    """A LlamaForCausalLM that shares the tensors of `weights` (float32, CPU, tied embeddings).

    Raises:
        ImportError: transformers is not installed (`pip install -e .[dev]`).
        ValueError: the model is not a Llama with tied embeddings and unscaled rotary positions.
    """
    import transformers

    library = cast(Any, transformers)  # mostly untyped

    _check_family(config)
    with torch.device("meta"):
        twin = library.LlamaForCausalLM(library.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_context_tokens, tie_word_embeddings=True))
    twin.load_state_dict(_checkpoint(config, weights), strict=True, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config)  # its table is computed, not loaded
    return twin.eval()


def write_llama_folder(config: ModelConfig, weights: Parameters, folder: Path) -> None:
    """Writes config.json and model.safetensors in fp32, in an existing folder; no tokenizer.

    Raises:
        ValueError: the model is not a Llama with tied embeddings and unscaled rotary positions.
    """
    from safetensors.torch import save_file

    _check_family(config)
    tensors = {name: tensor.clone() for name, tensor in _checkpoint(config, weights).items()}
    del tensors["lm_head.weight"]  # tied
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu", "rope_theta": config.rope_theta, "tie_word_embeddings": True, "torch_dtype": "float32",
        "max_position_embeddings": config.max_context_tokens, "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids)}))


def _check_family(config: ModelConfig) -> None:
    if config.family != "llama" or not config.tied_embeddings or config.rope_scaling is not None:
        raise ValueError("the reference is a Llama with tied embeddings and unscaled rotary positions; this "
                         f"{config.family} is another model")


def _checkpoint(config: ModelConfig, weights: Parameters) -> dict[str, Tensor]:
    """The tensors by Hugging Face's names: views of ours."""
    state = {"model.embed_tokens.weight": weights["embed.weight"], "model.norm.weight": weights["final_norm.weight"],
             "lm_head.weight": weights["embed.weight"]}
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    split = [q_rows, kv_rows, kv_rows]
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        q, k, v = weights[ours + "qkv.weight"].split_with_sizes(split)
        gate, up = weights[ours + "mlp_in.weight"].chunk(2)
        state |= {theirs + name: tensor for name, tensor in {
            "self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k, "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": weights[ours + "attn_out.weight"], "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up, "mlp.down_proj.weight": weights[ours + "mlp_out.weight"],
            "input_layernorm.weight": weights[ours + "attn_norm.weight"],
            "post_attention_layernorm.weight": weights[ours + "mlp_norm.weight"]}.items()}
    return state
