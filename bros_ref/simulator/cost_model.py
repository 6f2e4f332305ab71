"""How long a batch takes on a given GPU: operators composed from bytes and FLOPs, with fitted efficiencies.

    T = host + layers * (linear + prefill attention + decode attention + all-reduce) + head

    linear     (read^k + multiply^k)^(1/k)     read: weights once; multiply: 2 FLOPs/(weight * token). A hard maximum
                                               would be off by up to 24 % at 64-512 tokens, where chunk sizes are chosen
    prefill    launch + rows in and out / bandwidth + 4 * heads * dim * sum(new * (context + new / 2)) / FLOP/s
    decode     launch + max(floor per sequence, K and V of all contexts / bandwidth)

Tensor parallelism divides weights, heads and K/V, and adds two all-reduces per layer. Pipeline parallelism is not
simulated. The model knows no requests and no
policy. The features are those of `scheduler/latency_model.py`, but the formula is not linear in them, so the
scheduler's own linear model makes errors here, as it does on a real machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from bros_ref.simulator import gpus
from bros_ref.simulator.gpus import GPU, GPUS, MODELS, ModelShape


def gpu_named(name: str) -> GPU:
    """Raises ValueError with the known names for an unknown one."""
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; known are {', '.join(GPUS)}")
    return GPUS[name]


def model_named(name: str) -> ModelShape:
    """Raises ValueError with the known names for an unknown one."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    return MODELS[name]


@dataclass(frozen=True)
class CostModel:
    """Seconds of one iteration of `model` on `tp` GPUs of one kind.

    Raises:
        ValueError: tp is below 1 or does not divide the KV heads, or the weights do not fit; it says by how many bytes.
    """

    gpu: GPU
    model: ModelShape
    tp: int = 1
    # seconds, derived once
    _host_s: float = field(init=False, default=0.0)
    _read_s: float = field(init=False, default=0.0)  # weights of one layer
    _token_s: float = field(init=False, default=0.0)  # linear products of one layer, a token
    _prefill_row_s: float = field(init=False, default=0.0)
    _prefill_product_s: float = field(init=False, default=0.0)
    _context_s: float = field(init=False, default=0.0)  # K and V of one context token in one layer
    _reduce_token_s: float = field(init=False, default=0.0)
    _head_s: float = field(init=False, default=0.0)
    _head_sequence_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        gpu, model, tp, e = self.gpu, self.model, self.tp, self.gpu.efficiency
        if tp < 1 or model.num_kv_heads % tp:
            raise ValueError(f"tensor parallelism of {tp} does not divide the model's {model.num_kv_heads} KV heads")
        if self.kv_bytes < 0:
            raise ValueError(
                f"the model does not fit: {2 * model.parameters / 1e9:.1f} GB of weights on {tp} GPU(s) of "
                f"{gpu.memory_bytes / 1e9:.0f} GB exceed the usable memory by {-self.kv_bytes:,.0f} bytes; use a "
                "larger --tp or another --gpu")
        reading, flops = gpu.memory_bytes_per_s, gpu.flops_per_s
        weights, attended = model.layer_parameters / tp, model.num_heads * model.head_dim / tp
        derived = {
            "_host_s": gpus.HOST_STEP_S + 2 * model.num_layers * (tp > 1) * gpus.ALL_REDUCE_LATENCY_S,
            "_read_s": 2 * weights / (reading * e.weight_read_share),
            "_token_s": 2 * weights / (flops * e.linear_share),
            "_prefill_row_s": 8 * attended / (reading * e.prefill_read_share),
            "_prefill_product_s": 4 * attended / (flops * e.prefill_share),
            "_context_s": model.kv_bytes_per_token / tp / model.num_layers / (reading * e.decode_read_share),
            "_reduce_token_s": 2 * 2 * (tp - 1) / tp * 2 * model.hidden_size / (
                gpu.link_bytes_per_s * gpus.LINK_SHARE),
            "_head_s": 2 * model.vocab_size * model.hidden_size / tp / (reading * e.weight_read_share),
            "_head_sequence_s": 2 * model.vocab_size * model.hidden_size / tp / (flops * e.linear_share),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def kv_bytes(self) -> float:
        """Memory left for K and V over all GPUs; negative if not even the weights fit."""
        usable = self.gpu.memory_bytes * gpus.MEMORY_SHARE - gpus.RESERVED_BYTES
        return self.tp * usable - 2 * self.model.parameters

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return int(self.kv_bytes / self.model.kv_bytes_per_token)

    def step_s(self, new_tokens: int, num_decodes: int, prefill_products: float, decode_contexts: int) -> float:
        """One iteration. `prefill_products` is the sum over prefills of new * (context + new / 2), `decode_contexts`
        the sum of the contexts of `num_decodes` sequences with one new token each; `new_tokens` counts both."""
        e = self.gpu.efficiency
        knee, multiply_s = e.knee, self._token_s * new_tokens
        layer_s: float = self._read_s * (1 + (multiply_s / self._read_s) ** knee) ** (1 / knee)
        if prefill_products:
            layer_s += (e.prefill_launch_s + self._prefill_row_s * (new_tokens - num_decodes)
                        + self._prefill_product_s * prefill_products)
        if num_decodes:
            layer_s += e.decode_launch_s + max(e.decode_sequence_s * num_decodes, self._context_s * decode_contexts)
        layer_s += self._reduce_token_s * new_tokens
        sequences = num_decodes + (prefill_products > 0)
        return (self._host_s + gpus.HOST_SEQUENCE_S * num_decodes + self.model.num_layers * layer_s
                + self._head_s + self._head_sequence_s * sequences)

    def copy_s(self, to_host_tokens: int, to_device_tokens: int, within_tokens: int) -> float:
        """Checkpoints, restores and relocations of one step. The two directions of PCIe run side by side; each GPU
        has its own link and its share of the heads; what moves within the device is read and written once."""
        per_token = self.model.kv_bytes_per_token / self.tp
        crossing = max(to_host_tokens, to_device_tokens)
        seconds = gpus.COPY_LATENCY_S + crossing * per_token / self.gpu.host_bytes_per_s if crossing else 0.0
        return seconds + 2 * within_tokens * per_token / self.gpu.memory_bytes_per_s

    @property
    def restore_s_per_token(self) -> float:
        """Seconds that each additional token to restore costs."""
        return self.model.kv_bytes_per_token / self.tp / self.gpu.host_bytes_per_s


def relative_error(predicted: float, measured: float) -> float:
    """`abs(predicted / measured - 1)`."""
    return math.fabs(predicted / measured - 1)
