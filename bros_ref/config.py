"""What the engine is configured with: the model's shape, the KV pool, the scheduler's limits.

Frozen dataclasses, every quantity with its unit in the name, checked on construction so that a bad value is
refused where it was written. Nothing here depends on torch, files or policies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

HOST_BLOCKS_PER_BLOCK = 4  # host memory is the cheaper one, and whoever finds it full is recomputed (our decision)
MAX_LAYERS = 10_000  # more than any model has: beyond it a config is damaged, and would be counted through for hours


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining; the formulas are in
    `model/rotary.py`. `kind` decides which fields count:

        linear     factor
        llama3     factor, original_max_context_tokens, low_freq_factor, high_freq_factor (Llama 3.1 model card)
        yarn       factor, original_max_context_tokens, beta_fast, beta_slow, truncate, attention_factor
        divisors   divisors, one per frequency (what GGUF files store in place of llama3)

    Raises:
        ValueError: a number is not positive and finite, or low_freq_factor is not below high_freq_factor.
    """

    kind: Literal["linear", "llama3", "yarn", "divisors"]
    factor: float = 1.0
    original_max_context_tokens: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_context_tokens", "low_freq_factor", "high_freq_factor", "beta_fast",
                     "beta_slow", "attention_factor"):
            _check_positive(f"RopeScaling.{name}", getattr(self, name))
        for divisor in self.divisors:
            _check_positive("RopeScaling.divisors", divisor)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"RopeScaling.low_freq_factor must be below high_freq_factor, got {self.low_freq_factor} "
                             f"and {self.high_freq_factor}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder-only transformer. Families differ by these fields alone, never by a class.

    `rotary_dim` is how many dimensions of each head turn with the position (None: all of them). `layer_windows` has
    one entry per layer: how many tokens a token sees there, itself included (None: all); empty if no layer is windowed.

    Raises:
        ValueError: a dimension is no positive whole number, the query heads do not divide over the KV heads, or the
            rotary fields or windows do not fit the rest.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    mlp: Literal["gated-silu", "relu"] = "gated-silu"
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    layer_windows: tuple[int | None, ...] = ()
    learned_position_offset: int = 0
    attention_qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_context_tokens"):
            _check_count(f"ModelConfig.{name}", getattr(self, name))
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"ModelConfig.num_layers must be at most {MAX_LAYERS}, got {self.num_layers}")
        for name in ("norm_eps", "rope_theta"):
            _check_positive(f"ModelConfig.{name}", getattr(self, name))
        if not all(isinstance(token_id, int) for token_id in self.eos_token_ids):
            raise ValueError(f"ModelConfig.eos_token_ids must be whole numbers, got {self.eos_token_ids!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not divide over {self.num_kv_heads} KV heads")
        if self.layer_windows and len(self.layer_windows) != self.num_layers:
            raise ValueError(f"ModelConfig.layer_windows has {len(self.layer_windows)} entries for {self.num_layers} "
                             "layers")
        for window in self.layer_windows:
            if window is not None:
                _check_count("ModelConfig.layer_windows", window)
        self._check_rotary()

    def _check_rotary(self) -> None:
        if self.rotary_dim is not None:
            _check_count("ModelConfig.rotary_dim", self.rotary_dim)
            if self.rotary_dim > self.head_dim or self.rotary_dim % 2:
                raise ValueError(f"ModelConfig.rotary_dim must be even and at most head_dim {self.head_dim}, got "
                                 f"{self.rotary_dim}")
        scaling, pairs = self.rope_scaling, (self.rotary_dim or self.head_dim) // 2
        if scaling is not None and scaling.kind == "divisors" and len(scaling.divisors) != pairs:
            raise ValueError(f"RopeScaling.divisors must be {pairs} numbers, got {len(scaling.divisors)}")
        if scaling is not None and scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"ModelConfig.rope_theta must be above 1 for yarn, got {self.rope_theta}")

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers stored for one token: K and V, of every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class KVCacheConfig:
    """The KV pool. A *slot* is room for one token's K and V in every layer; a block is `block_size` slots.

    `num_host_blocks` bounds the checkpoint store in host memory; None means HOST_BLOCKS_PER_BLOCK times the device
    pool. Pass a number if the size of host memory is known.
    """

    num_blocks: int
    block_size: int = 16
    num_host_blocks: int | None = None

    def __post_init__(self) -> None:
        if self.num_blocks <= 0 or self.block_size <= 0:
            raise ValueError(f"the KV pool needs at least one block of one slot, got {self.num_blocks} blocks "
                             f"of {self.block_size}")
        if self.num_host_blocks is not None and self.num_host_blocks < 0:
            raise ValueError(f"num_host_blocks must be None or at least 0, got {self.num_host_blocks}")

    @property
    def num_slots(self) -> int:
        """Tokens that the device pool can hold."""
        return self.num_blocks * self.block_size

    @property
    def host_blocks(self) -> int:
        """Blocks of the checkpoint store, with the default filled in."""
        return HOST_BLOCKS_PER_BLOCK * self.num_blocks if self.num_host_blocks is None else self.num_host_blocks


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits that every policy shares, then what only BROS reads.

    The batch cap works like TCP slow start (paper, section on packing): it starts at `base_batch_cap`, doubles while
    no RT deadline binds and falls back when one does; `max_num_seqs` is its ceiling and B_max.
    `be_max_wait_steps` is N in the bound of `scheduler/bros.py`; `be_aging_tokens_per_step` is how many tokens
    to restore one step of waiting outweighs when BE requests are ordered by the KV they must restore (our decision).

    The next five are the paper's rules, which `bros-plus` changes (`scheduler/bros.py` says why): `batch_slow_start`
    is that cap, `rt_banks_time` whether an RT ahead of its TPOT may use the saved time later, `rt_displaces_eagerly`
    whether an RT that needs room takes it from a less urgent RT at once, `rt_triage` whether an RT may be given up so
    that others are on time, `rt_leaves_tokens` whether RT that have time leave BE that decode their tokens in a step.

    `rt_slowdown` (our decision; BROS policies only): BE may make the latency of RT at most this many times what it
    would be without BE; at least 1. None: only the deadlines bound it.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    chunked_prefill: bool = False
    max_context_tokens: int = field(default=1 << 30)
    base_batch_cap: int = 128
    be_max_wait_steps: int = 128
    be_aging_tokens_per_step: float = 1.0
    min_chunk_tokens: int = 16
    batch_slow_start: bool = True
    rt_banks_time: bool = False
    rt_displaces_eagerly: bool = True
    rt_triage: bool = False
    rt_leaves_tokens: bool = False
    rt_slowdown: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_context_tokens", "base_batch_cap",
                     "be_max_wait_steps", "min_chunk_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"SchedulerConfig.{name} must be positive, got {getattr(self, name)}")
        if self.rt_slowdown is not None and not 1 <= self.rt_slowdown < math.inf:
            raise ValueError(f"rt_slowdown must be None or a finite number of at least 1, got {self.rt_slowdown!r}")
        if not self.be_aging_tokens_per_step >= 0:
            raise ValueError(f"be_aging_tokens_per_step must be at least 0, got {self.be_aging_tokens_per_step}")


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
