"""What would go wrong on a GPU, as far as a CPU can show it: 16-bit weights, and what the code of the cells says.

The notebooks that compute with a model's weights run with them in fp16 and bf16, which is what older and newer GPUs
use (`engine/build.py: half_precision`). Two more rules are read from the syntax of all cells, which no CPU run could
break: `.numpy()` stands only behind `.cpu()`, and a cell that reads a clock also waits for the device. Names are not
followed into other cells; the package's own timing (`bench/machine.py`) has a test of its own.
"""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# The model in 16 bits; times are made up and sizes stay small, because this is not about speed.
SIXTEEN_BITS = """
from dataclasses import replace

import torch

from bros_ref.engine import build
from bros_ref.evaluation.bench import machine
from bros_ref.model.decoder import Decoder

load_in_32_bits = build.load_model


def load_in_16_bits(name, *arguments, **more):
    loaded = load_in_32_bits(name, "cpu", **more)
    if name == "checksum":
        return loaded
    config = replace(loaded.config, num_layers=min({layers}, loaded.config.num_layers))
    weights = {{key: weight.to({dtype}) for key, weight in loaded.parameters.items()}}
    model = Decoder(config, weights, {dtype}, "cpu")
    return replace(loaded, model=model, dtype={dtype}, parameters=weights)


build.load_model = load_in_16_bits
machine.best_seconds = lambda work, device="cpu", rounds=3: 1.0 if work() is None else 2.0
machine.Roof.measure = lambda *device: machine.Roof(1e12, 1e11)
machine.measured = lambda sizes, seconds_of, **limits: {{size: seconds_of(size) for size in sorted(sizes)[:2]}}
"""


COMPARE_NUMBERS = [(number, 99, f"torch.{name}") for number in ("01", "02", "03") for name in ("float16", "bfloat16")]


@pytest.mark.parametrize(("number", "layers", "dtype"), [("00", 1, "torch.float16"), *COMPARE_NUMBERS])
def test_a_notebook_runs_with_weights_in_16_bits(number, layers, dtype):
    """Up to the exercises, whose answers are numbers of tokens and bytes. 00 serves a thousand tokens three times and
    compares no numbers of the model, so one layer does there."""
    path = next(path for path in NOTEBOOKS if path.name.startswith(number))
    notebook = nbformat.read(path, as_version=4)
    last = next(i for i, cell in enumerate(notebook.cells) if "## Exercises" in cell.source)
    del notebook.cells[last:]
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SIXTEEN_BITS.format(layers=layers, dtype=dtype)))
    notebook.cells.append(nbformat.v4.new_code_cell(f"assert loaded.dtype == {dtype}\nprint('reached the end')"))
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    assert notebook.cells[-1].outputs[0].text == "reached the end\n"


CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "time_ns"}  # CPU time needs no wait
WAITS = {"synchronize", "item", "tolist", "cpu", "step", "generate"}  # an engine's step reads the tokens back


def called(tree):
    """(name of a called method or function, the call) for all calls in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            yield node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id, node


def faults(code):
    """What a cell's code does that is wrong, or means nothing, where tensors lie on a GPU."""
    calls = list(called(ast.parse(code)))
    names = {name for name, _ in calls}
    found = []
    for name, call in calls:
        if name == "numpy" and isinstance(call.func, ast.Attribute):
            owner = call.func.value
            if not (isinstance(owner, ast.Call) and isinstance(owner.func, ast.Attribute) and owner.func.attr == "cpu"):
                found.append("numpy() without cpu()")
    if names & CLOCKS and not names & WAITS:
        found.append("a clock without a wait")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_does_what_a_gpu_forbids(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert {source: faults(source) for source in code if faults(source)} == {}


def test_the_rules_see_what_they_forbid():
    assert faults("x.numpy()") == faults("model(x)[0].numpy()") == ["numpy() without cpu()"]
    assert faults("x.cpu().numpy()") == []
    assert faults("start = time.perf_counter()\nmodel(x)") == ["a clock without a wait"]
    assert faults("start = perf_counter()\nmodel(x)\ntorch.cuda.synchronize()") == []
    assert faults("time.process_time()") == []
