"""Small random checkpoints written by transformers or as GGUF, and one way to run ours over a list of steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from bros_ref.config import KVCacheConfig, ModelConfig
from bros_ref.kv_cache.storage import KVStorage
from bros_ref.model.attention import AttentionMetadata
from bros_ref.model.decoder import Decoder
from bros_ref.model.weights.load import load_model_config, load_weights

_LLAMA = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
          "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}
_LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}

# name -> (transformers' class prefix, its config): together they cover every branch of the decoder.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa-tied": ("Llama", {**_LLAMA, "tie_word_embeddings": True, "rope_theta": 1e5}),
    "llama-mha-untied-rope3": ("Llama", {**_LLAMA, "num_key_value_heads": 6, "rope_scaling": _LLAMA3_ROPE}),
    "llama-biased-wide-heads": ("Llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama-linear": ("Llama", {**_LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("Llama", {**_LLAMA, "head_dim": 16, "rope_theta": 1e5, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "mistral-windowed": ("Mistral", {**_LLAMA, "sliding_window": 16}),
    "qwen2": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2-windowed": ("Qwen2", {**_LLAMA, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 16}),
    "opt": ("OPT", {"vocab_size": 97, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 80,
                    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128, "dropout": 0.0}),
}


GGUF_PARTS = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
              "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
              "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def make_hf(name: str) -> Any:
    """A transformers model in eval mode whose every tensor is random, biases and norms included."""
    import transformers  # takes seconds: only where it is needed

    family, options = CHECKPOINTS[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, f"{family}Config")(**options, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15)
                            + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def save(model: Any, folder: Path, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


def gguf_name(name: str) -> str:
    """transformers' name of a llama-like tensor -> GGUF's."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}
    if name in top:
        return top[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{GGUF_PARTS['.'.join(part)]}.{kind}"


def write_gguf(path: Path, model: Any, arch: str, quantisation: gguf.GGMLQuantizationType,
               omit: str = "", extra: dict[str, np.ndarray] | None = None, **metadata: Any) -> str:
    """Writes a transformers model the way llama.cpp's converter does, rotary row order included. `extra` are further
    tensors, `metadata` further keys with __ for dots."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if (tied and name == "lm_head.weight") or gguf_name(name) == omit:
            continue
        values = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if arch == "llama" and part in name:
                values = np.ascontiguousarray(values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2)
                                              ).reshape(values.shape)
        if values.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(gguf_name(name), values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


class Sequences:
    """Token sequences run through a Decoder in steps; every slot they do not own holds NaN."""

    def __init__(self, config: ModelConfig, decoder: Decoder, token_ids: Sequence[Sequence[int]],
                 tables: Sequence[Sequence[int]], reversed_: Sequence[bool], block_size: int) -> None:
        self.decoder, self.token_ids, self.tables, self.reversed_ = decoder, token_ids, tables, reversed_
        self.block_size, self.computed = block_size, [0] * len(token_ids)
        num_blocks = 1 + max(max(table) for table in tables)
        self.kv = KVStorage(config.num_layers, config.num_kv_heads, config.head_dim,
                            KVCacheConfig(num_blocks, block_size))
        self.kv.data.fill_(torch.nan)

    def step(self, tokens: Sequence[int]) -> list[Tensor]:
        """Computes the next `tokens[i]` tokens of sequence i, for all i in one batch (0: sits this step out).
        Returns the logits of every computed token, [tokens[i], V] each."""
        active = [i for i, count in enumerate(tokens) if count]
        counts = [tokens[i] for i in active]
        meta = AttentionMetadata.build([self.tables[i] for i in active], [self.reversed_[i] for i in active], counts,
                                       [self.computed[i] + tokens[i] for i in active], self.block_size)
        ids = [token for i in active for token in self.token_ids[i][self.computed[i]:self.computed[i] + tokens[i]]]
        logits = self.decoder.forward(torch.tensor(ids), meta.positions, self.kv, meta, torch.arange(len(ids)))
        for i in active:
            self.computed[i] += tokens[i]
        return list(logits.split(counts))


def our_logits(path: str, token_ids: Tensor) -> Tensor:
    """[T, V]: the logits of one sequence, computed by what is loaded from `path`."""
    config = load_model_config(path)
    run = Sequences(config, Decoder(config, load_weights(path)), [token_ids.tolist()], [[0]], [False], len(token_ids))
    return run.step([len(token_ids)])[0]
