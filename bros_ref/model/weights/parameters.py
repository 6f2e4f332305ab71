"""The tensors a decoder needs: their names, their shapes, and seeded random values for toys.

It knows ModelConfig and nothing about files. `parameter_shapes` is the single list: loaders fill it, the decoder
reads it, tests compare against it. Q, K and V are one matrix here, and so are gate and up: one large product is
faster than several small ones, and a loader that copies parts into place never holds a weight twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import numpy as np
import torch
from torch import Tensor

from bros_ref.config import ModelConfig

Parameters = dict[str, Tensor]
Keep = Callable[[str, Tensor], Tensor]  # a parameter's name and value -> the part of it that a rank keeps
PIECE_BYTES = 256 << 20
ALIGNMENT = 64  # bytes of a cache line


def whole(name: str, tensor: Tensor) -> Tensor:
    """Keeps all of a parameter."""
    return tensor


class ParameterMemory:
    """Memory for parameters of these shapes. On a CPU they lie one after another in large pieces.

    Decoding reads all weights at every step. Tensors that are allocated one at a time, between the buffers of a loader,
    lie in scattered pages: with them, a decode step of SmolLM2-135M took 1.2 to 1.3 times as long. NumPy also asks the
    system for huge pages.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: torch.device | str) -> None:
        self._dtype, self._device = dtype, torch.device(device)
        self._bytes_to_come = sum(map(self._bytes, shapes))
        self._piece = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor of one of the shapes."""
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        size = self._bytes(shape)
        if size > len(self._piece):
            piece = torch.from_numpy(np.empty(max(size, min(PIECE_BYTES, self._bytes_to_come)) + ALIGNMENT, np.uint8))
            self._piece = piece[-piece.data_ptr() % ALIGNMENT:]
        taken, self._piece = self._piece[:prod(shape) * self._dtype.itemsize], self._piece[size:]
        self._bytes_to_come -= size
        return taken.view(self._dtype).view(shape)

    def _bytes(self, shape: tuple[int, ...]) -> int:
        return -(-prod(shape) * self._dtype.itemsize // ALIGNMENT) * ALIGNMENT


BYTE_VOCABULARY = 258  # 256 bytes, begin and end of text: what ByteTokenizer speaks

_TOY = {"vocab_size": BYTE_VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_heads": 6,
        "num_kv_heads": 2, "head_dim": 16, "max_context_tokens": 1024, "bos_token_id": 256, "eos_token_ids": (257,)}
RANDOM_FAMILIES: dict[str, ModelConfig] = {
    "llama": ModelConfig(family="llama", tied_embeddings=True, **_TOY),  # type: ignore[arg-type]
    "mistral": ModelConfig(family="mistral", **_TOY),  # type: ignore[arg-type]
    "qwen2": ModelConfig(family="qwen2", attention_qkv_bias=True, **_TOY),  # type: ignore[arg-type]
    "qwen3": ModelConfig(family="qwen3", qk_norm=True, **_TOY),  # type: ignore[arg-type]
    "opt": ModelConfig(family="opt", norm="layer", mlp="relu", positions="learned", learned_position_offset=2,
                       attention_qkv_bias=True, attention_out_bias=True, mlp_bias=True, tied_embeddings=True,
                       **{**_TOY, "num_heads": 4, "num_kv_heads": 4}),  # type: ignore[arg-type]
}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, in the order of use. Matrices are [out, in]."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (c.vocab_size, c.hidden_size)}
    if c.positions == "learned":
        shapes["positions.weight"] = (c.max_context_tokens + c.learned_position_offset, c.hidden_size)
    for i in range(c.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _layer_shapes(c).items()}
    shapes |= _norm_shapes(c, "final_norm")
    if not c.tied_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def fused_rows(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Rows of the parts that checkpoints store apart and `name` holds as one; one entry if it is not fused."""
    c = config
    if ".qkv." in name:
        return c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim
    if ".mlp_in." in name and c.mlp == "gated-silu":
        return c.intermediate_size, c.intermediate_size
    return (parameter_shapes(config)[name][0],)


def _layer_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    qkv_rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    mlp_rows = c.intermediate_size * (2 if c.mlp == "gated-silu" else 1)
    shapes: dict[str, tuple[int, ...]] = _norm_shapes(c, "attn_norm")
    shapes["qkv.weight"] = (qkv_rows, c.hidden_size)  # q rows, then k, then v
    if c.attention_qkv_bias:
        shapes["qkv.bias"] = (qkv_rows,)
    if c.qk_norm:
        shapes |= {"q_norm.weight": (c.head_dim,), "k_norm.weight": (c.head_dim,)}
    shapes["attn_out.weight"] = (c.hidden_size, c.num_heads * c.head_dim)
    if c.attention_out_bias:
        shapes["attn_out.bias"] = (c.hidden_size,)
    shapes |= _norm_shapes(c, "mlp_norm")
    shapes["mlp_in.weight"] = (mlp_rows, c.hidden_size)  # gated: gate rows, then up rows
    if c.mlp_bias:
        shapes["mlp_in.bias"] = (mlp_rows,)
    shapes["mlp_out.weight"] = (c.hidden_size, c.intermediate_size)
    if c.mlp_bias:
        shapes["mlp_out.bias"] = (c.hidden_size,)
    return shapes


def _norm_shapes(c: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias") if c.norm == "layer" else ("weight",)
    return {f"{name}.{part}": (c.hidden_size,) for part in parts}


def random_parameters(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32,
                      device: torch.device | str = "cpu", keep: Keep = whole) -> Parameters:
    """Seeded weights, scaled so that activations stay near unit variance: the same on every machine and device. Of each
    parameter, what `keep` returns."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2 and not name.startswith(("embed", "positions")):
            values *= shape[1] ** -0.5
        elif len(shape) == 1:
            values *= 0.1
            if name.endswith("norm.weight"):
                values += 1.0
        parameters[name] = keep(name, values.to(device, dtype))
    return parameters
