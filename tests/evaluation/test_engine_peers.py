"""Other engines get the same prompts and are timed in the same rounds; one that cannot run is named with the reason."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bros_ref.engine.build import load_model
from bros_ref.evaluation.bench import engine, engine_peers
from bros_ref.evaluation.bench.engine_peers import Unavailable, draw_prompts, start_peers, write_fp32_gguf
from bros_ref.evaluation.bench.reference import write_llama_folder
from bros_ref.model.weights.load import load_weights

FAKE_VLLM = """
print("an engine that talks", flush=True)

class SamplingParams:
    def __init__(self, max_tokens, **_):
        self.max_tokens = max_tokens

class Output:
    def __init__(self, count):
        self.token_ids = [0] * count
        self.outputs = [self]

class LLM:
    def __init__(self, model, **settings):
        assert settings["dtype"] == "float32" and not settings["enable_prefix_caching"]
        open(model + "/config.json").close()

    def generate(self, prompts, params, use_tqdm):
        if any(len(prompt["prompt_token_ids"]) == 13 for prompt in prompts):
            raise ValueError("no thirteen tokens")
        return [Output(min(one.max_tokens, 40)) for one in params]
"""


@pytest.fixture
def toy():
    return load_model("random:llama", "cpu")


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """Makes `import vllm` give FAKE_VLLM, version 9.8, in processes that are started from now on."""
    package, info = tmp_path / "vllm", tmp_path / "vllm-9.8.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(FAKE_VLLM)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.8\n")
    (info / "top_level.txt").write_text("vllm\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return package


def test_a_peer_in_a_process_of_its_own_gets_the_work_and_ends_with_the_context(toy, fake_vllm):
    with start_peers(toy, ["vllm"], Path(sys.executable)) as ([peer], absent):
        assert (peer.name, peer.version, absent) == ("vllm", "9.8", {})
        assert peer.seconds([(16, 3), (5, 1)], 0) >= 0
        with pytest.raises(Unavailable, match="vllm generated 40 tokens instead of 41"):
            peer.seconds([(16, 41)], 0)
        with pytest.raises(Unavailable, match="failed: ValueError: no thirteen tokens"):
            peer.seconds([(13, 1)], 0)
        process = peer._process
    assert process.returncode is not None


def test_what_cannot_run_is_named_with_the_reason(toy, fake_vllm, monkeypatch, tmp_path):
    (fake_vllm / "__init__.py").write_text("import a_library_that_is_missing")
    monkeypatch.setattr(engine_peers, "_has", lambda python, package: package == "vllm")
    with start_peers(toy, ["vllm", "llama.cpp"], Path(sys.executable)) as (peers, absent):
        assert peers == []
        assert absent == {"vllm": "failed: ModuleNotFoundError: No module named 'a_library_that_is_missing'",
                          "llama.cpp": "not installed"}
    monkeypatch.undo()
    with start_peers(toy, ["vllm"], tmp_path / "no-python") as (peers, absent):
        assert absent == {"vllm": "not installed"}
    monkeypatch.setattr(engine_peers, "_has", lambda python, package: True)
    other = load_model("random:qwen2", "cpu")
    with start_peers(other, ["transformers", "vllm", "llama.cpp"], Path(sys.executable)) as (peers, absent):
        assert list(absent) == ["transformers", "vllm", "llama.cpp"]
        assert "qwen2 is another model" in absent["vllm"]
        assert absent["llama.cpp"] == "it needs a .gguf file"


def test_one_round_with_transformers_and_a_peer_that_is_missing(toy, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setattr(engine, "_against_the_machine", lambda loaded: {})
    result = engine.bench_engine(toy, ("decode-8", "prefill-512"), rounds=1, peers=("transformers", "vllm"),
                                 vllm_python=tmp_path / "no-python")
    assert [(row["case"], row["system"]) for row in result["rows"]] == [
        (case, system) for case in ("decode-8", "prefill-512") for system in ("bros_ref", "transformers")]
    assert all(row["output_tok_s"] > 0 and row["ms_per_step"] > 0 for row in result["rows"])
    assert result["speedup_over"]["transformers"].keys() == {"decode-8", "prefill-512"}
    assert result["absent"] == {"vllm": "not installed"}
    assert result["versions"].keys() == {"transformers"}


def test_a_ratio_is_the_median_over_rounds_of_both_systems_in_the_same_round(toy, monkeypatch):
    class Peer:
        name, version, in_this_process = "other", "1", False
        times = iter([30.0, 4.0, 10.0])

        def seconds(self, lengths, seed):
            return next(self.times)

    ours = iter([[4.0, 6.0], [0.5, 0.5], [9.0, 1.0]])  # the second round ran alone on a machine that was busy otherwise
    monkeypatch.setattr(engine, "run_ours", lambda loaded, lengths, seed: next(ours))
    rows, speedup = engine._alternate(toy, "decode-1", [(16, 48)], [Peer()], 3, 0, None)
    assert speedup == {"other": 3.0}
    assert [(row.system, row.output_tok_s, row.ms_per_step) for row in rows] == [
        ("bros_ref", 4.8, 5000.0), ("other", 4.8, None)]


def test_the_fastest_step_after_the_prompts_is_compared_with_the_fastest_reading(toy, monkeypatch):
    runs = iter([[0.1, 5.0, 4.0], [7.0], [0.1, 3.0, 9.0], [6.0]] + [[0.1, 8.0], [8.0]] * 3)
    monkeypatch.setattr(engine, "run_ours", lambda loaded, lengths, seed: next(runs))
    monkeypatch.setattr(engine, "read_bytes_per_s", lambda num_bytes: num_bytes / 2.0)
    monkeypatch.setattr(engine, "matrix_flops_per_s", lambda: 1e12)
    found = engine._against_the_machine(toy)
    assert (found["decode1_s"], found["weights_read_s"], found["decode1_over_weights_read"]) == (3.0, 2.0, 1.5)
    assert found["prefill512_share_of_matrix_rate"] == pytest.approx(found["prefill512_flops_per_s"] / 1e12)


def test_prompts_are_the_same_for_every_system():
    lengths = [(5, 1), (3, 9)]
    assert draw_prompts(lengths, 100, 4) == draw_prompts(lengths, 100, 4) != draw_prompts(lengths, 100, 5)
    assert [len(prompt) for prompt in draw_prompts(lengths, 100, 4)] == [5, 3]


def test_the_weights_that_peers_read_are_ours(toy, tmp_path):
    write_llama_folder(toy.config, toy.parameters, tmp_path)
    for name, found in load_weights(str(tmp_path)).items():
        torch.testing.assert_close(found, toy.parameters[name], rtol=0, atol=0)


def test_a_gguf_file_in_fp32_has_the_values_of_its_source(tmp_path):
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize, quantize

    values = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    writer = GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_context_length(77)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    packed = quantize(values, GGMLQuantizationType.Q8_0)
    writer.add_tensor("w", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_fp32_gguf(tmp_path / "small.gguf", tmp_path / "fp32.gguf")
    copy = GGUFReader(tmp_path / "fp32.gguf")
    assert copy.fields["llama.context_length"].contents() == 77
    assert copy.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    np.testing.assert_array_equal(copy.tensors[0].data, dequantize(packed, GGMLQuantizationType.Q8_0))
