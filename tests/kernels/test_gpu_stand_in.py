"""`CupyDevice` without a GPU: a stand-in for CuPy records what it is told, and CuPy's own cache code gets our text."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import types

import numpy as np
import pytest
import torch

from kernels_cupy import device as device_module
from kernels_cupy import gpu
from kernels_cupy.device import FOLDER, Kernel, source_text
from kernels_cupy.heads import Heads

KERNEL = Heads(8, 2, 64, 16, torch.float16).kernel("paged_attention_4_tensor_cores.cu", "paged_attention")


class Function:
    """What RawModule.get_function returns, as far as it is used."""

    def __init__(self, static_bytes=0):
        self.shared_size_bytes, self.limit, self.asked, self.calls = static_bytes, 48 * 1024 - static_bytes, [], []

    @property
    def max_dynamic_shared_size_bytes(self):
        return self.limit

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value):
        self.asked.append(value)
        self.limit = value

    def __call__(self, grid, block, arguments, shared_mem):
        assert shared_mem <= self.limit, "a GPU would refuse this launch"
        self.calls.append((grid, block, arguments, shared_mem))


class FakeCupy(types.SimpleNamespace):
    """Two GPUs; `modules` are the texts and options compiled on each."""

    def __init__(self):
        self.function, self.modules, self.current = Function(), [], []

        def entering(kind):
            @contextlib.contextmanager
            def enter(value):
                self.current.append((kind, value))
                yield
                self.current.remove((kind, value))
            return enter

        def module(code, options):
            self.modules.append((code, options, dict(self.current)["device"]))
            return types.SimpleNamespace(get_function=lambda name: self.function)

        self.RawModule = module
        self.cuda = types.SimpleNamespace(Device=entering("device"), is_available=lambda: True,
                                          Stream=types.SimpleNamespace(from_external=entering("stream")))


@pytest.fixture
def fake(monkeypatch):
    cupy = FakeCupy()
    properties = types.SimpleNamespace(major=8, minor=0, shared_memory_per_block_optin=163 * 1024,
                                       shared_memory_per_multiprocessor=164 * 1024, multi_processor_count=108)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: f"torch's stream of {index}")
    monkeypatch.setattr(gpu, "_stream", cupy.cuda.Stream.from_external)
    gpu._compiled.cache_clear()
    yield cupy
    gpu._compiled.cache_clear()


def launch(device, shared_bytes, *arguments):
    device.launch(KERNEL, (2, 1, 1), (128, 1, 1), shared_bytes, arguments)


def test_it_knows_the_gpu_it_runs_on(fake):
    device = gpu.CupyDevice()
    assert (device.index, device.gpu) == (1, device_module.Gpu.of(80))
    assert gpu.CupyDevice(0).index == 0


@pytest.mark.parametrize(("static", "dynamic", "asks"), [
    (0, 48 * 1024, False), (0, 48 * 1024 + 1, True), (1040, 47 * 1024, True), (1040, 48 * 1024 - 1040, False),
    (16_640, 40_000, True), (0, 0, False)])
def test_more_than_48_kb_is_asked_for_static_memory_included(fake, static, dynamic, asks):
    fake.function = Function(static)
    device = gpu.CupyDevice()
    for _ in range(2):
        launch(device, dynamic)
    assert fake.function.asked == ([dynamic] if asks else []), "once, and only where needed"
    assert len(fake.function.calls) == 2


def test_it_launches_on_its_own_gpu_and_torchs_stream_of_it(fake, monkeypatch):
    seen = []
    monkeypatch.setattr(Function, "__call__", lambda self, *args, **kwargs: seen.append(list(fake.current)))
    for index in (1, 0, 1):
        launch(gpu.CupyDevice(index), 0)
    assert seen == [[("device", i), ("stream", f"torch's stream of {i}")] for i in (1, 0, 1)]
    assert [module[2] for module in fake.modules] == [1, 0], "compiled once for each GPU"


def test_tensors_of_another_device_are_refused(fake, monkeypatch):
    device = gpu.CupyDevice()
    with pytest.raises(ValueError, match=r"argument 0: it lies on cpu, the kernel runs on cuda:1.*pinned"):
        launch(device, 0, torch.zeros(4))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    pinned = torch.zeros(4)
    launch(device, 0, pinned, np.float32(2))
    assert fake.function.calls[-1][2] == (pinned.data_ptr(), np.float32(2))
    elsewhere = types.SimpleNamespace(device=torch.device("cuda:0"))
    assert not device._reaches(elsewhere)
    assert device._reaches(types.SimpleNamespace(device=torch.device("cuda:1")))


def test_includes_are_in_the_text_and_lines_keep_their_names():
    text = source_text(KERNEL.file)
    assert '#include "' not in text
    for name in (KERNEL.file, "query_rows.cuh", "tiles.cuh", "mma.cuh", "common.cuh", "merge.cuh"):
        assert text.count(f'#line 1 "{name}"') == 1
    changed = source_text(KERNEL.file, {"mma.cuh": "int changed;"})
    assert "int changed;" in changed
    assert "ldmatrix.sync" not in changed


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
@pytest.mark.parametrize("file", ["tiles.cuh", "mma.cuh", KERNEL.file])
def test_cupys_cache_sees_a_change_in_any_file(tmp_path, monkeypatch, file):
    compiler = pytest.importorskip("cupy.cuda.compiler")
    texts, compiled = [], []
    monkeypatch.setattr(compiler, "_get_nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "_preprocess", lambda *args: "no GPU here")
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: ("-arch=sm_90", "cubin"))
    monkeypatch.setattr(compiler, "_compile_using_nvrtc_no_warning",
                        lambda source, *args: (compiled.append(source) or b"binary", {}))
    monkeypatch.setattr(compiler.function, "Module", lambda: types.SimpleNamespace(
        load=lambda binary: None, _set_mapping=lambda mapping: None))
    monkeypatch.setattr(compiler, "_kernel_cache_backend", type(compiler._kernel_cache_backend)(str(tmp_path / "kept")))
    folder = shutil.copytree(FOLDER, tmp_path / "kernels", ignore=shutil.ignore_patterns("proof", "__pycache__"))
    monkeypatch.setattr(device_module, "FOLDER", folder)

    def load():
        cupy = FakeCupy()
        cupy.current.append(("device", 0))
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        gpu._compiled.cache_clear()  # as in a new process
        gpu._compiled(KERNEL, 0)
        gpu._compiled.cache_clear()
        code, options, _ = cupy.modules[0]
        texts.append(code)
        compiler._compile_with_cache_cuda(code, options, "90")

    load()
    load()
    assert len(compiled) == 1, "the second process finds the binary"
    (folder / file).write_text((folder / file).read_text() + "\n// changed\n")
    load()
    assert len(compiled) == 2, f"a change in {file} must not load the old binary"
    assert texts[0] == texts[1] != texts[2]


def test_a_kernel_that_is_not_there_is_an_error():
    with pytest.raises(FileNotFoundError):
        source_text(Kernel("nowhere.cu", "f").file)
