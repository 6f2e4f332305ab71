"""The decoder for the Llama architecture in ten kernels per layer, each writing to memory that is already allocated.

    qkv product -> rope_store -> attention, merge -> output product -> add_norm
        -> gate and up product -> silu_mul -> down product -> add_norm

It computes the same as `Decoder` with fewer roundings, because a fused kernel computes in float32. A decode step
allocates nothing and reads nothing from the host, so a CUDA graph can capture it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bros_ref.config import ModelConfig
from bros_ref.gpu.attention import KernelAttention
from bros_ref.gpu.step import PackedStep, StepShape
from bros_ref.kv_cache.storage import KVStorage
from bros_ref.model.decoder import Decoder
from bros_ref.model.rotary import rope_tables
from bros_ref.model.weights.parameters import Parameters
from kernels_cupy.heads import MAX_HEAD_DIM, Heads
from kernels_cupy.launch import paged_attention, workspace_floats
from kernels_cupy.launch_fused import add_norm, rope_store, silu_mul, whole_pieces
from kernels_cupy.launch_prefill import prefill_attention


def why_not_fused(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """None if `KernelDecoder` supports such a model, otherwise the reason why not."""
    if (config.norm, config.mlp, config.positions) != ("rms", "gated-silu", "rope"):
        return f"{config.family} has {config.norm} norms, {config.positions} positions and a {config.mlp} MLP"
    if not all(whole_pieces(size, dtype) for size in (config.hidden_size, config.intermediate_size, config.head_dim)) \
            or config.head_dim > MAX_HEAD_DIM:
        return (f"rows of {config.hidden_size}, {config.intermediate_size} and {config.head_dim} values are not all "
                f"whole 16-byte pieces, or the last exceed {MAX_HEAD_DIM}")
    return None


@dataclass(frozen=True)
class Activations:
    """The buffers that the layers of a step write to in turn. T is the number of tokens."""

    residual: Tensor  # [T, E]
    normed: Tensor  # [T, E]
    delta: Tensor  # [T, E]: what a sublayer adds to the residual
    qkv: Tensor  # [T, (H + 2 K) * D]
    q: Tensor  # [T, H, D]
    attended: Tensor  # [T, H, D]
    gate_up: Tensor  # [T, 2 I]
    inner: Tensor  # [T, I]
    logits: Tensor  # [num_logits, V]


class KernelDecoder(Decoder):
    """A `Decoder` that computes packed steps with fused kernels; see `why_not_fused` for the models it supports.

    `forward` is inherited, and computes any step as `Decoder` does.
    """

    def __init__(self, config: ModelConfig, weights: Parameters, dtype: torch.dtype, device: torch.device | str,
                 attention: KernelAttention) -> None:
        super().__init__(config, weights, dtype, device, attention)
        self.kernels = attention.device
        cos, sin = rope_tables(self.config, torch.float32, self.device)
        self._angle_cos, self._angle_sin = cos[:, 0].contiguous(), sin[:, 0].contiguous()  # [positions, R / 2]

    def activations(self, shape: StepShape) -> Activations:
        """New buffers for steps of this shape."""
        c, tokens = self.config, shape.tokens

        def empty(*sizes: int) -> Tensor:
            return torch.empty(*sizes, dtype=self.dtype, device=self.device)

        return Activations(
            residual=empty(tokens, c.hidden_size), normed=empty(tokens, c.hidden_size),
            delta=empty(tokens, c.hidden_size), qkv=empty(tokens, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim),
            q=empty(tokens, c.num_heads, c.head_dim), attended=empty(tokens, c.num_heads, c.head_dim),
            gate_up=empty(tokens, 2 * c.intermediate_size), inner=empty(tokens, c.intermediate_size),
            logits=empty(shape.num_logits, c.vocab_size))

    def workspace(self, shape: StepShape, kv: KVStorage) -> Tensor:
        """A new float32 workspace of the decode kernel for steps of this shape."""
        c = self.config
        heads = Heads(c.num_heads, c.num_kv_heads, c.head_dim, kv.config.block_size, self.dtype, kv.data.dtype)
        floats = workspace_floats(heads, shape.num_decodes, shape.width, self.kernels.gpu) if shape.num_decodes else 0
        return torch.empty(floats, dtype=torch.float32, device=self.device)

    @torch.inference_mode()
    def forward_step(self, step: PackedStep, to: Activations, workspace: Tensor, kv: KVStorage) -> Tensor:
        """Computes an uploaded step: writes its K and V, returns the logits, [num_logits, V], in the model's dtype.

        The logits are stored in `to.logits`, which the next step of this shape overwrites.
        """
        c = self.config
        torch.index_select(self._embed, 0, step.token_ids, out=to.residual)
        add_norm(self.kernels, to.residual, None, self._layers[0].attn_norm, to.normed, c.norm_eps)
        following = [*(layer.attn_norm for layer in self._layers[1:]), self._final_norm]
        for i, (layer, next_norm) in enumerate(zip(self._layers, following, strict=True)):
            _product(to.normed, layer.qkv, layer.qkv_bias, to.qkv)
            self._attend_step(i, step, to, workspace, kv)
            _product(to.attended.flatten(1), layer.attn_out, layer.attn_out_bias, to.delta)
            add_norm(self.kernels, to.residual, to.delta, layer.mlp_norm, to.normed, c.norm_eps)
            _product(to.normed, layer.mlp_in, layer.mlp_in_bias, to.gate_up)
            silu_mul(self.kernels, to.gate_up, to.inner)
            _product(to.inner, layer.mlp_out, layer.mlp_out_bias, to.delta)
            add_norm(self.kernels, to.residual, to.delta, next_norm, to.normed, c.norm_eps)
        rows = to.normed if step.shape.is_bucket else to.normed.index_select(0, step.logits_rows)
        if step.shape.num_logits:
            _product(rows, self._lm_head, None, to.logits)
        return to.logits

    def _attend_step(self, i: int, step: PackedStep, to: Activations, workspace: Tensor, kv: KVStorage) -> None:
        """Rotary positions, KV store and attention. In a mixed batch, decodes and prefills use one launch each."""
        c, layer, decodes = self.config, self._layers[i], step.shape.num_decodes
        k, v, (k_scale, v_scale) = kv.k(i), kv.v(i), kv.scales[i]
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        rope_store(self.kernels, to.qkv.view(len(to.qkv), -1, c.head_dim), step.positions, step.slots,
                   self._angle_cos, self._angle_sin, k, v, to.q, norms, c.norm_eps, k_scale, v_scale)
        if decodes:
            paged_attention(self.kernels, to.q[:decodes], k, v, *step.decodes, to.attended[:decodes],
                            scratch=workspace, k_scale=k_scale, v_scale=v_scale)
        if step.shape.num_prefills:
            prefill_attention(self.kernels, to.q[decodes:], k, v, *step.prefills, step.query_starts,
                              to.attended[decodes:], k_scale=k_scale, v_scale=v_scale)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ weight.T + bias."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
