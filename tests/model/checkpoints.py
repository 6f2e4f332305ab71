"""Small random checkpoints written by transformers, and one way to run ours over a list of steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bros_ref.config import KVCacheConfig, ModelConfig
from bros_ref.kv_cache.storage import KVStorage
from bros_ref.model.attention import AttentionMetadata
from bros_ref.model.decoder import Decoder

_LLAMA = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
          "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}
_LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}

# name -> (transformers' class prefix, its config): together they cover every branch of the decoder.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa-tied": ("Llama", {**_LLAMA, "tie_word_embeddings": True, "rope_theta": 1e5}),
    "llama-mha-untied-rope3": ("Llama", {**_LLAMA, "num_key_value_heads": 6, "rope_scaling": _LLAMA3_ROPE}),
    "llama-biased-wide-heads": ("Llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "mistral-windowed": ("Mistral", {**_LLAMA, "sliding_window": 64}),
    "qwen2": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 16}),
    "opt": ("OPT", {"vocab_size": 97, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 80,
                    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128, "dropout": 0.0}),
}


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
