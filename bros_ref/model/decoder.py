"""One decoder-only transformer in plain PyTorch: Llama, SmolLM2, Mistral, Qwen2, Qwen3 and OPT, told apart by config.

It knows weights, tokens and positions. It does not know requests, blocks or schedules: where K and V go and who may
see them is all in `AttentionMetadata`. Invariant: `forward` changes nothing but the step's own slots in the KV
storage, so the same tokens give the same logits however they are divided into steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bros_ref.config import ModelConfig
from bros_ref.kv_cache.storage import KVStorage
from bros_ref.model.attention import AttentionFn, AttentionMetadata, paged_attention
from bros_ref.model.linear import LinearFn, linear
from bros_ref.model.parallel import TensorParallel
from bros_ref.model.rotary import rope_tables, rotate_
from bros_ref.model.weights.parameters import Parameters, parameter_shapes


@dataclass(frozen=True)
class Layer:
    """One layer's weights, by the names of `parameter_shapes`; None where the family has no such tensor."""

    attn_norm: Tensor
    attn_norm_bias: Tensor | None
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    attn_out: Tensor
    attn_out_bias: Tensor | None
    mlp_norm: Tensor
    mlp_norm_bias: Tensor | None
    mlp_in: Tensor
    mlp_in_bias: Tensor | None
    mlp_out: Tensor
    mlp_out_bias: Tensor | None

    @classmethod
    def pick(cls, weights: Parameters, i: int) -> Layer:
        """The tensors of layer `i`."""
        def get(name: str) -> Tensor:
            return weights[f"layers.{i}.{name}"]

        def maybe(name: str) -> Tensor | None:
            return weights.get(f"layers.{i}.{name}")

        return cls(get("attn_norm.weight"), maybe("attn_norm.bias"), get("qkv.weight"), maybe("qkv.bias"),
                   maybe("q_norm.weight"), maybe("k_norm.weight"), get("attn_out.weight"), maybe("attn_out.bias"),
                   get("mlp_norm.weight"), maybe("mlp_norm.bias"), get("mlp_in.weight"), maybe("mlp_in.bias"),
                   get("mlp_out.weight"), maybe("mlp_out.bias"))


class Decoder:
    """The model, or with `parallel` one rank's part of it. Holds the weights it is given (moved and cast only if need
    be), never a second copy.

    Attributes:
        config: the model's; a rank's own numbers of heads and MLP width where the model is split.

    An attention that has no sliding windows computes a windowed model exactly up to its shortest window, so
    `config.max_context_tokens` ends there.

    Raises:
        ValueError: `weights` lacks a tensor of `parameter_shapes(config)`, or one has another shape; rotary positions
            with an odd head_dim.
    """

    def __init__(self, config: ModelConfig, weights: Parameters, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", attention: AttentionFn = paged_attention,
                 linear: LinearFn = linear, parallel: TensorParallel | None = None) -> None:
        if config.positions == "rope" and config.head_dim % 2:
            raise ValueError(f"{config.family}: rotary positions turn pairs, but head_dim {config.head_dim} is odd")
        shapes = parameter_shapes(config)
        if parallel is not None:
            config, shapes = parallel.local_config, parallel.shapes()
        for name, shape in shapes.items():
            found = tuple(weights[name].shape) if name in weights else "nothing"
            if found != shape:
                raise ValueError(f"{config.family} weights: {name} must have shape {shape}, found {found}")
        windows = [window for window in config.layer_windows if window is not None]
        if windows and not getattr(attention, "sliding_windows", True):
            config = replace(config, max_context_tokens=min(*windows, config.max_context_tokens))
        self.config, self.dtype, self.device, self._attention = config, dtype, torch.device(device), attention
        self._linear, self._parallel = linear, parallel
        placed = {name: weights[name].to(self.device, dtype) for name in shapes}
        self._windows = config.layer_windows or (None,) * config.num_layers
        self._layers = [Layer.pick(placed, i) for i in range(config.num_layers)]
        self._embed = placed["embed.weight"]
        self._learned_positions = placed.get("positions.weight")
        self._final_norm, self._final_norm_bias = placed["final_norm.weight"], placed.get("final_norm.bias")
        self._lm_head = placed.get("lm_head.weight", self._embed)
        if parallel is not None and config.tied_embeddings:
            self._lm_head = parallel.head(self._embed)
        if config.positions == "rope":
            self._cos, self._sin = rope_tables(config, dtype, self.device)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, kv: KVStorage, meta: AttentionMetadata,
                logits_rows: Tensor) -> Tensor:
        """Computes this step's tokens: writes their K and V, returns the logits asked for.

        Args:
            token_ids, positions: [T] int64; positions are logical, as in `meta.positions`.
            kv: this model's storage, in this model's dtype or FP8.
            logits_rows: [num_rows] int64, indices into T.

        Returns:
            [num_rows, V] float32.
        """
        x = F.embedding(token_ids, self._embed)  # [T, E]
        cos_sin = None
        if self._learned_positions is not None:
            x += self._learned_positions[positions + self.config.learned_position_offset]
        else:
            cos_sin = self._cos[positions], self._sin[positions]  # [T, 1, R / 2] each
        for i, layer in enumerate(self._layers):
            h = self._norm(x, layer.attn_norm, layer.attn_norm_bias)
            x += self._whole(self._attend(i, layer, h, cos_sin, kv, meta))
            h = self._norm(x, layer.mlp_norm, layer.mlp_norm_bias)
            x += self._whole(self._mlp(layer, h))
        x = self._norm(x[logits_rows], self._final_norm, self._final_norm_bias)
        logits = self._linear(x, self._lm_head).float()
        return logits if self._parallel is None else self._parallel.gather_logits(logits)

    def _whole(self, x: Tensor) -> Tensor:
        """The sum over ranks, where the model is split over several."""
        return x if self._parallel is None else self._parallel.all_reduce(x)

    def _attend(self, i: int, layer: Layer, h: Tensor, cos_sin: tuple[Tensor, Tensor] | None, kv: KVStorage,
                meta: AttentionMetadata) -> Tensor:
        c = self.config
        heads = self._linear(h, layer.qkv, layer.qkv_bias).view(len(h), -1, c.head_dim)  # [T, H + 2K, D]
        q, k, v = torch.split(heads, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q.copy_(rms_norm(q, layer.q_norm, c.norm_eps))
            k.copy_(rms_norm(k, layer.k_norm, c.norm_eps))
        if cos_sin is not None:
            rotate_(heads[:, :c.num_heads + c.num_kv_heads, :c.rotary_dim], *cos_sin)
        kv.write(i, *kv.encoded(i, k, v), meta.slot_mapping)
        k_scale, v_scale = kv.scales[i]  # scores are linear in K, and the result in V
        attended = self._attention(q if k_scale == 1 else q * k_scale, kv.k(i), kv.v(i), meta.within(self._windows[i]))
        if v_scale != 1:
            attended *= v_scale
        return self._linear(attended.flatten(1), layer.attn_out, layer.attn_out_bias)

    def _mlp(self, layer: Layer, h: Tensor) -> Tensor:
        inner = self._linear(h, layer.mlp_in, layer.mlp_in_bias)
        if self.config.mlp == "gated-silu":
            gate, up = inner.chunk(2, dim=1)
            # Not in place: gate's rows lie two rows apart, and a product over them runs at a quarter of its speed.
            inner = F.silu(gate, inplace=True) * up
        else:
            inner = inner.relu_()
        return self._linear(inner, layer.mlp_out, layer.mlp_out_bias)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.config.norm == "rms":
            return rms_norm(x, weight, self.config.norm_eps)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.norm_eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [..., n], weight [n].

    On a CPU F.rms_norm makes six passes over x; this makes three, and is up to five times as fast on long prefills.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(_constant(eps), length, length, value=1 / x.shape[-1])
    return (x * mean_square.rsqrt_()).mul_(weight)


@cache
def _constant(value: float) -> Tensor:
    """A float32 tensor of one value, cached: creating one takes longer than adding it to a decode step's rows."""
    return torch.tensor(value)
