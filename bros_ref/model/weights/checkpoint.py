"""From a checkpoint's many tensors to the decoder's parameters, whatever the file format.

It knows names and shapes, and reads through a `TensorSource`. The invariant: at any moment at most one tensor of the
checkpoint is held beside the parameters built so far, and every parameter has the shape the config demands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bros_ref.config import ModelConfig
from bros_ref.model.weights.parameters import Keep, Parameters, fused_rows, parameter_shapes, whole


class WeightsError(ValueError):
    """A checkpoint cannot be used. The message names the file, the tensor or option, and what would do."""


class TensorSource(Protocol):
    """An opened checkpoint."""

    def describe(self, name: str) -> str:
        """Where `name` is or should be, for messages: file and tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor as stored, any float dtype; valid until the next call.

        Raises:
            WeightsError: it is missing, truncated or stored in an unsupported way.
        """
        ...


@dataclass(frozen=True)
class NameMap:
    """How a format calls our parameters. `parts` maps our stem ("qkv") to its stems there ("q_proj", ...), several
    where the checkpoint splits what we fuse. Stems of a layer follow `layer_prefix`, in which {} is the layer."""

    layer_prefix: str
    parts: dict[str, tuple[str, ...]]

    def names(self, parameter: str) -> list[str]:
        """The checkpoint's tensor names that make up one of our parameters, in row order."""
        stem, kind = parameter.rsplit(".", 1)
        prefix = ""
        if stem.startswith("layers."):
            _, index, stem = stem.split(".")
            prefix = self.layer_prefix.format(index)
        return [f"{prefix}{part}.{kind}" for part in self.parts[stem]]


def assemble(config: ModelConfig, name_map: NameMap, source: TensorSource, dtype: torch.dtype,
             device: torch.device | str, keep: Keep = whole) -> Parameters:
    """Reads every parameter, fusing parts in place, cast to `dtype` on `device`; of each, what `keep` returns.

    Raises:
        WeightsError: a tensor is missing, unreadable, or of another shape than the config says.
    """
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        fused, start = None, 0
        for part_name, rows in zip(name_map.names(name), fused_rows(config, name), strict=True):
            part = source.read(part_name)
            expected = (rows, *shape[1:])
            if tuple(part.shape) != expected:
                raise WeightsError(f"{source.describe(part_name)}: shape {tuple(part.shape)}, but the config asks for "
                                   f"{expected}; config and weights belong to different models")
            if fused is None:  # not before the first part has the right shape: a wrong config may ask for terabytes
                fused = torch.empty(shape, dtype=dtype, device=device)
            fused[start:start + rows] = part
            start += rows
        assert fused is not None
        parameters[name] = keep(name, fused)
    return parameters
