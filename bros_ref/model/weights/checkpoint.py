"""From a checkpoint's many tensors to the decoder's parameters, whatever the file format.

It knows names and shapes, and reads through a `TensorSource`. Invariant: at any moment at most one tensor of the
checkpoint is held beside the parameters built so far, every parameter has the shape the config demands, and every
tensor of the checkpoint was read or is known not to matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bros_ref.config import ModelConfig
from bros_ref.model.weights.parameters import (
    Keep,
    ParameterMemory,
    Parameters,
    fused_rows,
    parameter_shapes,
    whole,
)

PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # others need scales that lie elsewhere


class WeightsError(ValueError):
    """A checkpoint cannot be used. The message names the file, the tensor or option, and what would do."""


class TensorSource(Protocol):
    """An opened checkpoint."""

    def names(self) -> Iterable[str]:
        """Every tensor that it holds."""
        ...

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
             device: torch.device | str, known: Iterable[str] = (), keep: Keep = whole) -> Parameters:
    """Reads every parameter, fusing parts in place, cast to `dtype` on `device`; of each, what `keep` returns.

    Args:
        known: tensors that are not parameters, and rightly so.

    Raises:
        WeightsError: a tensor is missing, unreadable, quantised or of another shape than the config says; or the
            checkpoint holds a tensor that no parameter comes from.
    """
    wanted = {part for name in parameter_shapes(config) for part in name_map.names(name)}
    unread = sorted({*source.names()} - wanted - {*known})
    if unread:
        raise WeightsError(f"{source.describe(unread[0])} has no place in this model, nor have {len(unread) - 1} "
                           "others; the checkpoint is quantised, an adapter, or of another architecture")
    parameters, shapes = {}, parameter_shapes(config)
    # Where only parts are kept, the whole tensors are temporary, and must not hold the memory of others.
    memory = ParameterMemory(shapes.values() if keep is whole else (), dtype, device)
    for name, shape in shapes.items():
        fused, start = None, 0
        for part_name, rows in zip(name_map.names(name), fused_rows(config, name), strict=True):
            part = source.read(part_name)
            if part.dtype not in PLAIN_DTYPES:
                raise WeightsError(f"{source.describe(part_name)} is stored as {part.dtype}: quantised weights are not "
                                   "supported here; use the original checkpoint or a .gguf file")
            expected = (rows, *shape[1:])
            if tuple(part.shape) != expected:
                raise WeightsError(f"{source.describe(part_name)}: shape {tuple(part.shape)}, but the config asks for "
                                   f"{expected}; config and weights belong to different models")
            if fused is None:  # not before the first part has the right shape: a wrong config may ask for terabytes
                fused = memory.empty(shape)
            fused[start:start + rows] = part
            start += rows
        assert fused is not None
        parameters[name] = keep(name, fused)
    return parameters


def read_json(path: Path) -> dict[str, Any]:
    """Raises WeightsError: no such file, or it holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise WeightsError(f"{path} is missing or cannot be read") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a JSON object, found a {type(content).__name__}")
    return content
