"""GGUF files: metadata, and tensors dequantised one at a time.

The header is parsed here, because the gguf package's reader spends seconds on a vocabulary; dequantising is the
package's. It knows the format; what the keys and names mean is `gguf_model.py`'s business.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from torch import Tensor

from bros_ref.config import cdiv
from bros_ref.model.weights.checkpoint import WeightsError

_SCALARS = {GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H",
            GGUFValueType.INT16: "<h", GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i",
            GGUFValueType.FLOAT32: "<f", GGUFValueType.BOOL: "<?", GGUFValueType.UINT64: "<Q",
            GGUFValueType.INT64: "<q", GGUFValueType.FLOAT64: "<d"}


class GGUFFile:
    """One opened file.

    Attributes:
        metadata: key -> number, bool, string, or list of those.
        tensors: name -> (shape as torch has it, quantisation type, byte offset in the file).

    Raises:
        WeightsError: the file is missing, no GGUF file of version 2 or 3, or ends inside its header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError):
            raise WeightsError(f"{path} is missing, empty or cannot be read") from None
        self._buffer = memoryview(self._bytes)  # type: ignore[arg-type]  # memmap is a buffer
        self._at = 0
        try:
            self._read_header()
        except (struct.error, ValueError, IndexError, OverflowError, RecursionError) as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"{path} is truncated or damaged: its header ends at byte {self._at} "
                               f"({error}); download it again") from None

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def describe(self, name: str) -> str:
        return f"{self.path}: tensor {name}"

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised to float32. Raises WeightsError."""
        if name not in self.tensors:
            raise WeightsError(f"{self.describe(name)} is missing")
        shape, type_number, start = self.tensors[name]
        try:
            quantisation = GGMLQuantizationType(type_number)
            byte_shape = quant_shape_to_byte_shape(shape, quantisation)
        except (KeyError, ValueError, IndexError) as error:  # IndexError: a shape without dimensions
            raise WeightsError(f"{self.describe(name)} has an unknown quantisation ({error})") from None
        if 0 in shape:
            raise WeightsError(f"{self.describe(name)} has a dimension of 0 ({tuple(shape)}): the file is damaged")
        stop = start + math.prod(byte_shape)
        if stop > self._bytes.size:
            raise WeightsError(f"{self.describe(name)} ends at byte {stop}, but the file has {self._bytes.size}: it is "
                               "truncated; download it again")
        try:
            # Copied out of the mapping, so torch gets memory it may write and the file's pages can go.
            values = dequantize(np.array(self._bytes[start:stop]).reshape(byte_shape), quantisation)
        except NotImplementedError:
            raise WeightsError(f"{self.describe(name)}: quantisation {quantisation.name} is not supported; "
                               "use a Q4, Q5, Q8, F16 or F32 file") from None
        return torch.from_numpy(values.reshape(shape))

    def _read_header(self) -> None:
        magic, version, num_tensors, num_keys = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise WeightsError(f"{self.path} is no GGUF file of version 2 or 3 (it starts with {magic!r}, {version})")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(GGUFValueType(self._unpack("<I")[0]))
        found = {}
        for _ in range(num_tensors):
            name, (num_dims,) = self._string(), self._unpack("<I")
            shape = self._unpack(f"<{num_dims}Q")[::-1]  # GGUF lists the fastest dimension first
            found[name] = shape, *self._unpack("<IQ")
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"general.alignment is {alignment!r}")
        data_start = cdiv(self._at, alignment) * alignment
        self.tensors = {name: (shape, kind, data_start + offset) for name, (shape, kind, offset) in found.items()}

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._buffer, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        if self._at + length > self._bytes.size:
            raise ValueError(f"a string of {length} bytes")
        text = str(self._buffer[self._at:self._at + length], "utf-8")
        self._at += length
        return text

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._unpack(_SCALARS[kind])[0]
        item, length = self._unpack("<IQ")
        item = GGUFValueType(item)
        if item in _SCALARS:
            return list(self._unpack(f"<{length}{_SCALARS[item][1]}"))
        return [self._value(item) for _ in range(length)]


@lru_cache(maxsize=1)
def _open(path: Path, modified_ns: int) -> GGUFFile:
    del modified_ns  # part of the key: a file that was replaced is read again
    return GGUFFile(path)


def open_gguf(path: Path) -> GGUFFile:
    """The opened file; config, weights and tokenizer of one model share it. Raises WeightsError as GGUFFile does."""
    return _open(path, path.stat().st_mtime_ns if path.is_file() else 0)
