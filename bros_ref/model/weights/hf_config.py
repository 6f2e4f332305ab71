"""config.json and generation_config.json -> ModelConfig.

It follows transformers: a missing key gets the default of the family's class, and a key that the class does not read is
not read here. A key that sounds like part of the computation, that no family here reads and that is not at a neutral
value (null, false, 0, 1 or empty) is refused by name: a checkpoint either gives the right logits or does not load.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from bros_ref.config import MAX_LAYERS, ModelConfig, RopeScaling
from bros_ref.model.weights.checkpoint import WeightsError, read_json

# What transformers fills in for a key that is absent; null is a value of its own.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "opt": {"bos_token_id": 2, "eos_token_id": 2},
}
FAMILIES = tuple(_DEFAULTS)

_READ = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "partial_rotary_factor", "rope_theta", "rope_scaling",
    "rope_parameters", "rms_norm_eps", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "max_position_embeddings", "tie_word_embeddings", "ffn_dim",
    "activation_function", "word_embed_proj_dim", "do_layer_norm_before", "_remove_final_layer_norm",
    "layer_norm_elementwise_affine", "enable_bias"})
# Sounds like part of the computation, and is none: training, code paths, or nothing that these families read.
_HARMLESS = frozenset({
    "attention_dropout", "attention_probs_dropout_prob", "activation_dropout", "residual_dropout", "resid_pdrop",
    "attn_pdrop", "embd_pdrop", "layerdrop", "layer_norm_eps", "_attn_implementation", "attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset", "_flash_attn_2_enabled"})
_COMPUTES = re.compile("scal|multipl|soft|capping|clip|factor|norm|bias|window|expert|moe|rope|rotary|freq|attn|"
                       "attention|act|glu|gate|layer|head|quant|compress|mlp|emb|alibi|sink|resid|position|logit|lora|"
                       "qk|kv|weights|interleav|parallel|chunk|mup|conv|ssm|adapter|dim_|_dim")

_SCALING_KEYS = {  # kind -> the keys of rope_scaling that transformers reads
    "default": {"factor"}, "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "beta_fast",
             "beta_slow", "truncate"}}


def load_hf_config(folder: Path) -> ModelConfig:
    """Raises WeightsError: no config.json, an unsupported architecture or option, or a field that is missing."""
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise WeightsError(f"{path}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    _refuse_unknown(path, raw)
    raw = {**_DEFAULTS[family], **raw}
    generation = folder / "generation_config.json"
    if generation.is_file():  # chat models list their extra end-of-turn tokens only there
        raw = {**raw, "eos_token_id": read_json(generation).get("eos_token_id", raw.get("eos_token_id"))}
    try:
        return _opt_config(path, raw) if family == "opt" else _llama_config(path, raw)
    except KeyError as error:
        raise WeightsError(f"{path}: {error.args[0]} is missing") from None
    except WeightsError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise WeightsError(f"{path}: {error}") from None


def _refuse_unknown(path: Path, raw: dict[str, Any]) -> None:
    for key, value in raw.items():
        if key in _READ or key in _HARMLESS or not _COMPUTES.search(key) or _at_rest(value):
            continue
        if "quant" in key or "compress" in key:
            raise WeightsError(f"{path}: quantised weights ({key}) are not supported; use the original checkpoint or a "
                               ".gguf file")
        raise WeightsError(f"{path}: {key} = {value!r} is not understood and may change the logits; only models "
                           "without it are supported")


def _at_rest(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {}) or (value in (0, 1) and value is not True)


def _refuse_unless(path: Path, raw: dict[str, Any], supported: dict[str, Any]) -> None:
    for option, value in supported.items():
        if raw.get(option, value) != value:
            raise WeightsError(f"{path}: {option} = {raw[option]!r} is not supported, only {value!r}")


def _llama_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    _refuse_unless(path, raw, {"hidden_act": "silu", "partial_rotary_factor": 1.0})
    family, num_layers = raw["model_type"], raw["num_hidden_layers"]
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if (raw.get("rope_parameters") or rope) != rope:
        raise WeightsError(f"{path}: rope_scaling and rope_parameters contradict each other; remove the wrong one")
    biased = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3")
    return ModelConfig(
        family=family, vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"], num_layers=num_layers, num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        max_context_tokens=raw["max_position_embeddings"], norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(path, raw, rope), rope_scaling=_rope_scaling(path, rope, raw["max_position_embeddings"]),
        layer_windows=_layer_windows(path, raw),
        attention_qkv_bias=biased or family == "qwen2", attention_out_bias=biased,
        mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama", qk_norm=family == "qwen3",
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


def _layer_windows(path: Path, raw: dict[str, Any]) -> tuple[int | None, ...]:
    """Mistral windows every layer, Qwen the layers from max_window_layers on if use_sliding_window; Llama none."""
    family, num_layers, window = raw["model_type"], raw["num_hidden_layers"], raw.get("sliding_window")
    if family == "llama" or (family != "mistral" and not raw.get("use_sliding_window", False)):
        window = None
    types = raw.get("layer_types")
    if not isinstance(num_layers, int) or num_layers > MAX_LAYERS or (window is None and types is None):
        return ()  # a bad number of layers is reported by ModelConfig
    first = 0 if family == "mistral" else raw.get("max_window_layers", 0)
    default = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(num_layers)]
    types = default if types is None else types
    if not {*types} <= {"full_attention", "sliding_attention"} or len(types) != num_layers or (
            family == "mistral" and types != default) or (window is None and "sliding_attention" in types):
        raise WeightsError(f"{path}: layer_types = {types!r} is not supported with {num_layers} layers of {family} and "
                           f"a sliding window of {window!r} tokens")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rope_theta(path: Path, raw: dict[str, Any], rope: dict[str, Any]) -> Any:
    found = {theta for theta in (raw.get("rope_theta"), rope.get("rope_theta")) if theta is not None}
    if len(found) > 1:  # transformers 5 writes it inside
        raise WeightsError(f"{path}: rope_theta is {raw['rope_theta']!r}, and {rope['rope_theta']!r} in "
                           "rope_parameters; remove the wrong one")
    return found.pop() if found else 10_000.0


def _rope_scaling(path: Path, rope: dict[str, Any], max_context: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _SCALING_KEYS:
        raise WeightsError(f"{path}: rope_scaling of type {kind!r} is not supported, only linear, llama3 and yarn")
    understood = {"type", "rope_type", "rope_theta"} | _SCALING_KEYS[kind]
    unknown = [key for key, value in rope.items() if key not in understood and value is not None]
    if unknown or rope.get("type", kind) != kind or ("factor" in rope and not {"type", "rope_type"} & {*rope}):
        raise WeightsError(f"{path}: rope_scaling = {rope!r} is not understood"
                           + (f" ({', '.join(unknown)} in type {kind!r})" if unknown else " (it must name one type)"))
    if kind == "default":
        return None
    factor = rope["factor"]
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "llama3":
        return RopeScaling("llama3", factor, low_freq_factor=rope["low_freq_factor"],
                           high_freq_factor=rope["high_freq_factor"],
                           original_max_context_tokens=rope["original_max_position_embeddings"])
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    length = yarn_length(factor, rope["mscale"]) / yarn_length(factor, rope["mscale_all_dim"]) if both else (
        yarn_length(factor))
    given = rope.get("attention_factor")
    return RopeScaling("yarn", factor, rope.get("original_max_position_embeddings") or max_context,
                       beta_fast=rope.get("beta_fast") or 32, beta_slow=rope.get("beta_slow") or 1,
                       truncate=bool(rope.get("truncate", True)), attention_factor=length if given is None else given)


def yarn_length(factor: float, scale: float = 1.0) -> float:
    """By how much yarn lengthens queries and keys for a context stretched `factor` times (arXiv 2309.00071, 3.4)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _eos_ids(raw: dict[str, Any]) -> tuple[int, ...]:
    eos = raw.get("eos_token_id")
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
