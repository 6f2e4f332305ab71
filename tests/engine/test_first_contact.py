"""What the engine does differently on a GPU, with stand-ins for torch.cuda; and what it imports only where needed."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from bros_ref.config import KVCacheConfig
from bros_ref.engine.build import half_precision
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.engine.profile import _batch_output
from bros_ref.model.checksum import ChecksumModel


@pytest.mark.parametrize(("kind", "new", "waits"), [("cuda", 3, True), ("cuda", 5, False), ("cpu", 3, False)])
def test_a_step_that_samples_nothing_waits_for_the_gpu(monkeypatch, kind, new, waits):
    """Else the trace and the latency model take the time of the launch for the time of the step."""
    said = []
    event = types.SimpleNamespace(synchronize=lambda: said.append("waited"))
    stream = types.SimpleNamespace(record_event=lambda: said.append("recorded") or event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    runner = ModelRunner(ChecksumModel(), KVCacheConfig(4, 4), "cpu", torch.int64)
    compute = runner.compute

    def compute_on_the_cpu(work):
        runner.device = torch.device("cpu")
        logits = compute(work)
        runner.device = torch.device(kind)  # from here on, as where the GPU still computes
        said.append("computed")
        return logits

    monkeypatch.setattr(runner, "compute", compute_on_the_cpu)
    output = _batch_output([(5, 0)], runner.kv.config)
    output.num_scheduled_tokens[0] = new  # of a prompt of 5: with 3 of them nothing is sampled
    tokens = runner.execute(output)
    assert (tokens == [None]) == (new == 3)
    assert said == ["computed", *(["recorded", "waited"] if waits else [])]


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16),
                                                   ((8, 9), torch.bfloat16), ((12, 0), torch.bfloat16)])
def test_half_precision_is_bf16_where_tensor_cores_take_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert half_precision() is dtype


def test_a_live_run_needs_neither_gguf_nor_plotly():
    script = ("import sys\nfor name in ('gguf', 'plotly'): sys.modules[name] = None\n"
              "from bros_ref.engine.build import load_model\nload_model('random:llama', 'cpu')\n"
              "from bros_ref.cli.live import main\n"
              "sys.argv = ['bros-ref', 'bench', 'hybrid', '--model', 'random:llama', '--policies', 'bros', "
              "'--seeds', '1', '--be-requests', '1', '--rt-requests', '1', '--clock', 'modelled']\nmain()\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bros" in done.stdout
