"""The tensors of Hugging Face folders: model.safetensors, whole or in shards listed by an index.

Which of them is read is transformers' choice: a whole file before an index. Only files inside the folder are opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bros_ref.config import ModelConfig
from bros_ref.model.weights.checkpoint import NameMap, WeightsError, assemble, read_json
from bros_ref.model.weights.parameters import Keep, Parameters, whole

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

# Tables that older versions saved and that the config determines: transformers does not read them either.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)$")


def load_hf_weights(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str,
                    keep: Keep = whole) -> Parameters:
    """Raises WeightsError: a tensor is missing, truncated, of the wrong shape or dtype, or not understood."""
    if (folder / "adapter_config.json").is_file():
        raise WeightsError(f"{folder} holds an adapter (adapter_config.json); merge it into its base model first")
    names, files = _OPT_NAMES if config.family == "opt" else _LLAMA_NAMES, SafetensorsFolder(folder)
    derived = {name for name in files.names() if _DERIVED.search(name)}
    if config.tied_embeddings and "lm_head.weight" in files.names():
        head, (embedding,) = files.read("lm_head.weight"), names.names("embed.weight")
        if not torch.equal(head, files.read(embedding)):
            raise WeightsError(f"{files.describe('lm_head.weight')} is not {embedding}, though config.json says "
                               "tie_word_embeddings; correct one of them")
        derived.add("lm_head.weight")
    return assemble(config, names, files, dtype, device, derived, keep)


class SafetensorsFolder:
    """The tensors of a folder. At most one file is open at a time.

    Raises:
        WeightsError: no model.safetensors and no index, or an index that names files outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        self._opened: tuple[Path, Any] | None = None
        self._default = index if index.is_file() and not single.is_file() else single
        if single.is_file():
            self._file_of = dict.fromkeys(self._open(single).keys(), single)
        elif index.is_file():
            self._file_of = self._read_index(folder, index)
        else:
            raise WeightsError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there; "
                               "other weight formats (.bin, .pth) are not read")

    def _read_index(self, folder: Path, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(
                isinstance(file, str) for file in weight_map.values()):
            raise WeightsError(f"{index}: weight_map must say in which file each tensor is; download it again")
        for file in sorted({*weight_map.values()}):
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise WeightsError(f"{index}: {file!r} is outside the folder; shards must lie beside their index")
        shards = {folder / file for file in weight_map.values()}
        unlisted = {name: shard for shard in sorted(shards) for name in self._open(shard).keys()}  # noqa: SIM118
        return {**unlisted, **{name: folder / file for name, file in weight_map.items()}}

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

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
