"""SmolLM2, which comes with this package, as a folder in Hugging Face's format, which is what vLLM reads."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from bros_ref.model.weights.load import load_model_config, load_weights
from bros_ref.model.weights.parameters import fused_rows

PARTS = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn_out": ("self_attn.o_proj",),
         "mlp_in": ("mlp.gate_proj", "mlp.up_proj"), "mlp_out": ("mlp.down_proj",), "attn_norm": ("input_layernorm",),
         "mlp_norm": ("post_attention_layernorm",)}  # our name -> theirs; ours fuses several matrices by rows


def write_smollm2(folder: Path) -> None:
    """Writes config.json and model.safetensors (float32, 540 MB) to an existing folder; the tokenizer is not needed."""
    config, weights = load_model_config("smollm2"), load_weights("smollm2")
    tensors = {"model.embed_tokens.weight": weights["embed.weight"], "model.norm.weight": weights["final_norm.weight"]}
    for name, tensor in weights.items():
        if name.startswith("layers."):
            _, layer, part, kind = name.split(".")
            for target, rows in zip(PARTS[part], tensor.split_with_sizes(fused_rows(config, name)), strict=True):
                tensors[f"model.layers.{layer}.{target}.{kind}"] = rows.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "rope_theta": config.rope_theta, "tie_word_embeddings": True, "torch_dtype": "float32",
        "max_position_embeddings": config.max_context_tokens, "bos_token_id": 1, "eos_token_id": 2}))
