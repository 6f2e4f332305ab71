"""Hugging Face folders: config.json, and model.safetensors whole or sharded.

It knows the families this project runs and refuses, by name, every option that would change the numbers and that the
decoder does not implement: a checkpoint either gives the right logits or does not load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bros_ref.config import ModelConfig, RopeScaling
from bros_ref.model.weights.checkpoint import NameMap, WeightsError, assemble
from bros_ref.model.weights.parameters import Keep, Parameters, whole

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")

_LLAMA_NAMES = NameMap("model.layers.{}.", {
    "embed": ("model.embed_tokens",), "final_norm": ("model.norm",), "lm_head": ("lm_head",),
    "attn_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",), "k_norm": ("self_attn.k_norm",),
    "attn_out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"), "mlp_out": ("mlp.down_proj",)})

_OPT_NAMES = NameMap("model.decoder.layers.{}.", {
    "embed": ("model.decoder.embed_tokens",), "positions": ("model.decoder.embed_positions",),
    "final_norm": ("model.decoder.final_layer_norm",), "lm_head": ("lm_head",),
    "attn_norm": ("self_attn_layer_norm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.out_proj",),
    "mlp_norm": ("final_layer_norm",),
    "mlp_in": ("fc1",), "mlp_out": ("fc2",)})


def load_hf_config(folder: Path) -> ModelConfig:
    """Raises WeightsError: no config.json, an unsupported architecture or option, or a field that is missing."""
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if raw.get("quantization_config") is not None:
        raise WeightsError(f"{path}: quantised weights (quantization_config) are not supported; use the original "
                           "checkpoint or a .gguf file")
    generation = folder / "generation_config.json"
    if generation.is_file():  # chat models list their extra end-of-turn tokens only there
        raw = {**raw, "eos_token_id": read_json(generation).get("eos_token_id", raw.get("eos_token_id"))}
    try:
        if family in LLAMA_LIKE:
            return _llama_config(path, raw)
        if family == "opt":
            return _opt_config(path, raw)
    except KeyError as error:
        raise WeightsError(f"{path}: {error.args[0]} is missing") from None
    except WeightsError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a field of a wrong type, or zero heads
        raise WeightsError(f"{path}: {error}") from None
    raise WeightsError(f"{path}: model_type {family!r} is not supported; supported: {', '.join(LLAMA_LIKE)}, opt")


def load_hf_weights(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str,
                    keep: Keep = whole) -> Parameters:
    """Raises WeightsError: a file or tensor is missing, truncated or of the wrong shape."""
    return assemble(config, _OPT_NAMES if config.family == "opt" else _LLAMA_NAMES, SafetensorsFolder(folder), dtype,
                    device, keep)


class SafetensorsFolder:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists."""

    def __init__(self, folder: Path) -> None:
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        self._default = index if index.is_file() else single
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise WeightsError(f"{index}: weight_map must say in which file each tensor is; download it again")
            self._file_of = {name: folder / file for name, file in weight_map.items()}
        elif single.is_file():
            self._file_of = dict.fromkeys(self._open(single).keys(), single)
        else:
            raise WeightsError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there; "
                               "other weight formats (.bin, .pth) are not read")
        self._opened: tuple[Path, Any] | None = None

    def describe(self, name: str) -> str:
        return f"{self._file_of.get(name, self._default)}: tensor {name}"

    def read(self, name: str) -> Tensor:
        """The tensor as stored. Raises WeightsError."""
        path = self._file_of.get(name)
        if path is None:
            raise WeightsError(f"{self.describe(name)} is missing")
        if self._opened is None or self._opened[0] != path:
            self._opened = path, self._open(path)
        try:
            tensor: Tensor = self._opened[1].get_tensor(name)
        except SafetensorError as error:
            raise WeightsError(f"{self.describe(name)} cannot be read: {error}") from None
        return tensor

    @staticmethod
    def _open(path: Path) -> Any:
        if not path.is_file():
            raise WeightsError(f"{path} is missing, though the index lists it; download the checkpoint again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is truncated or no safetensors file ({error}); download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Raises WeightsError: no such file, or it holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise WeightsError(f"{path} is missing or cannot be read") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a JSON object, found a {type(content).__name__}")
    return content


def _refuse_unless(path: Path, raw: dict[str, Any], supported: dict[str, Any]) -> None:
    for option, value in supported.items():
        if raw.get(option, value) != value:
            raise WeightsError(f"{path}: {option} = {raw[option]!r} is not supported, only {value!r}")


def _llama_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    _refuse_unless(path, raw, {"hidden_act": "silu", "partial_rotary_factor": 1.0})
    family = raw["model_type"]
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    biased = bool(raw.get("attention_bias", False))
    kv_heads = raw.get("num_key_value_heads") or raw["num_attention_heads"]
    return ModelConfig(
        family=family, vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"], num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"], num_kv_heads=kv_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        max_context_tokens=_max_context(raw), norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0, rope_scaling=_rope_scaling(path, rope),
        attention_qkv_bias=biased or family == "qwen2", attention_out_bias=biased,
        mlp_bias=bool(raw.get("mlp_bias", False)), qk_norm=family == "qwen3",
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_token_id=raw.get("bos_token_id"), eos_token_ids=_eos_ids(raw))


def _opt_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    # OPT-350m normalises after the block and projects its embeddings: another network, which would load and babble.
    _refuse_unless(path, raw, {"do_layer_norm_before": True, "word_embed_proj_dim": raw["hidden_size"],
                               "activation_function": "relu", "_remove_final_layer_norm": False,
                               "layer_norm_elementwise_affine": True})
    biased = bool(raw.get("enable_bias", True))
    return ModelConfig(
        family="opt", vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["ffn_dim"],
        num_layers=raw["num_hidden_layers"], num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_attention_heads"], head_dim=raw["hidden_size"] // raw["num_attention_heads"],
        max_context_tokens=raw["max_position_embeddings"], norm="layer", mlp="relu", positions="learned",
        learned_position_offset=2, attention_qkv_bias=biased, attention_out_bias=biased, mlp_bias=biased,
        tied_embeddings=bool(raw.get("tie_word_embeddings", True)), bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_eos_ids(raw))


def _max_context(raw: dict[str, Any]) -> int:
    """Positions the model serves exactly. Within a sliding window, windowed and full attention are the same, so a
    windowed model is served up to its window instead of being approximated beyond it."""
    context: int = raw["max_position_embeddings"]
    window: int | None = raw.get("sliding_window")
    return context if window is None or not raw.get("use_sliding_window", True) else min(context, window)


def _rope_scaling(path: Path, rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise WeightsError(f"{path}: rope_scaling of type {kind!r} is not supported, only 'llama3'")
    return RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                       rope["original_max_position_embeddings"])


def _eos_ids(raw: dict[str, Any]) -> tuple[int, ...]:
    eos = raw.get("eos_token_id")
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
