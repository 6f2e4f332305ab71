"""What a GGUF file's keys and tensor names mean: its ModelConfig and its parameters.

It knows the llama, qwen2 and qwen3 layouts as llama.cpp reads them. The invariant: what is loaded equals what the
checkpoint's Hugging Face form would hold, up to quantisation. A key of the architecture that is not read here and
not at a neutral value, or a tensor without a place in the model, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bros_ref.config import ModelConfig, RopeScaling
from bros_ref.model.weights.checkpoint import NameMap, WeightsError, assemble
from bros_ref.model.weights.gguf_file import GGUFFile, open_gguf
from bros_ref.model.weights.hf_config import yarn_length
from bros_ref.model.weights.parameters import Keep, Parameters, whole

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# The keys that this module reads, and two that change nothing: the vocabulary is as long as its embeddings, and
# `finetuned` says how the weights were trained.
_KEYS = frozenset({
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "vocab_size"})
_ROPE_DIVISORS = "rope_freqs.weight"
_END_TOKENS = ("eos", "eot", "eom")  # of the text, of a turn, of a message: generation stops at each

_NAMES = NameMap("blk.{}.", {
    "embed": ("token_embd",), "final_norm": ("output_norm",), "lm_head": ("output",),
    "attn_norm": ("attn_norm",), "qkv": ("attn_q", "attn_k", "attn_v"),
    "q_norm": ("attn_q_norm",), "k_norm": ("attn_k_norm",), "attn_out": ("attn_output",),
    "mlp_norm": ("ffn_norm",), "mlp_in": ("ffn_gate", "ffn_up"), "mlp_out": ("ffn_down",)})


def load_gguf_config(path: Path) -> ModelConfig:
    """Raises WeightsError: unsupported architecture or option, a missing metadata key, or one part of several."""
    file = open_gguf(path)
    meta = file.metadata
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise WeightsError(f"{path}: architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if meta.get("split.count", 1) not in (0, 1):
        number = meta.get("split.no", 0)
        part = number + 1 if isinstance(number, int) else number
        raise WeightsError(f"{path} is part {part} of {meta['split.count']} of a split model; join the parts with "
                           "`llama-gguf-split --merge`")
    for key, value in meta.items():
        name = key.removeprefix(f"{arch}.")
        if name != key and name not in _KEYS and value not in (0, False, "") and (name, value) != (
                "attention.causal", True):
            what = "mixture-of-experts models are" if "expert" in name else "what it stands for is"
            raise WeightsError(f"{path}: {key} = {value!r}: {what} not supported")

    def get(key: str) -> Any:
        if f"{arch}.{key}" not in meta:
            raise WeightsError(f"{path}: metadata key {arch}.{key} is missing")
        return meta[f"{arch}.{key}"]

    try:
        heads, hidden = get("attention.head_count"), get("embedding_length")
        head_dim = meta.get(f"{arch}.attention.key_length", hidden // heads)
        if meta.get(f"{arch}.attention.value_length", head_dim) != head_dim:
            raise WeightsError(f"{path}: {arch}.attention.value_length is not the key length {head_dim}, which is not "
                               "supported")
        rotary_dim = meta.get(f"{arch}.rope.dimension_count", head_dim)
        return ModelConfig(
            family=arch, vocab_size=file.tensors["token_embd.weight"][0][0], hidden_size=hidden,
            intermediate_size=get("feed_forward_length"), num_layers=get("block_count"), num_heads=heads,
            num_kv_heads=meta.get(f"{arch}.attention.head_count_kv", heads), head_dim=head_dim,
            max_context_tokens=get("context_length"), norm_eps=get("attention.layer_norm_rms_epsilon"),
            rope_theta=meta.get(f"{arch}.rope.freq_base", 10_000.0), rope_scaling=_rope_scaling(file, arch),
            rotary_dim=None if rotary_dim == head_dim else rotary_dim,
            attention_qkv_bias=arch == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
            attention_out_bias="blk.0.attn_output.bias" in file.tensors,
            mlp_bias="blk.0.ffn_gate.bias" in file.tensors, qk_norm=arch == "qwen3",
            tied_embeddings="output.weight" not in file.tensors, bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=end_token_ids(meta))
    except KeyError as error:
        raise WeightsError(f"{path}: tensor {error.args[0]} is missing") from None
    except WeightsError:
        raise
    except (TypeError, ValueError, IndexError, ArithmeticError) as error:  # a value of a wrong type, or zero heads
        raise WeightsError(f"{path}: its metadata is damaged or describes no model that can be run: {error}") from None


def end_token_ids(meta: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens at which generation stops, without repeats."""
    found = (meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in _END_TOKENS)
    return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))


def _rope_scaling(file: GGUFFile, arch: str) -> RopeScaling | None:
    def get(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{arch}.rope.{key}", default)

    factor = get("scaling.factor") or get("scale_linear") or 1.0
    kind = get("scaling.type", "linear")  # llama.cpp's default: a factor alone is a linear one
    if arch == "llama" and _ROPE_DIVISORS in file.tensors:
        if kind != "none" and factor != 1:
            raise WeightsError(f"{file.path}: rotary positions scaled by {_ROPE_DIVISORS} and by {arch}.rope.scaling "
                               "at once are not supported")
        return RopeScaling("divisors", divisors=tuple(file.read(_ROPE_DIVISORS).flatten().tolist()))
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "yarn":
        original = get("scaling.original_context_length") or file.metadata[f"{arch}.context_length"]
        return RopeScaling("yarn", factor, original, attention_factor=yarn_length(factor))
    raise WeightsError(f"{file.path}: rotary positions scaled in another way than linear or yarn "
                       f"({arch}.rope.scaling.type {kind!r}) are not supported; use the model's Hugging Face folder")


def load_gguf_weights(path: Path, config: ModelConfig, dtype: torch.dtype,
                      device: torch.device | str, keep: Keep = whole) -> Parameters:
    """Raises WeightsError: a tensor is missing, truncated, of the wrong shape or of an unsupported quantisation."""
    file = open_gguf(path)
    source = LlamaRowOrder(file, config) if config.family == "llama" else file
    known = [_ROPE_DIVISORS] if config.family == "llama" else []  # the config holds them
    return assemble(config, _NAMES, source, dtype, device, known, keep)


class LlamaRowOrder:
    """A llama file with q and k rows put back in halves.

    GGUF stores the rotary pairs of each head side by side (0, R/2, 1, R/2 + 1, ...); the decoder, like Hugging Face
    checkpoints, turns dimension d against d + R/2. Rows beyond the R that turn stay where they are.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.names, self.describe = file.names, file.describe
        self._file, self._heads = file, {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
        self._head_dim, self._turning = config.head_dim, config.rotary_dim or config.head_dim

    def read(self, name: str) -> Tensor:
        """The tensor, its q and k rows in the order that Hugging Face uses."""
        tensor = self._file.read(name)
        heads = self._heads.get(name.split(".")[-2])
        if heads is None or tensor.shape[0] != heads * self._head_dim:  # a wrong shape is reported by the caller
            return tensor
        turning, still = tensor.view(heads, self._head_dim, *tensor.shape[1:]).tensor_split([self._turning], dim=1)
        halves = torch.cat([turning[:, 0::2], turning[:, 1::2]], dim=1)
        return torch.cat([halves, still], dim=1).view(tensor.shape)
