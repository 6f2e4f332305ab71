"""The cache of compiled kernels: loaded only if this user wrote it, never in the working directory, never the end."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from kernels.support import needs_emulator

from kernels_cupy.device import Kernel
from kernels_cupy.proof import cache as module
from kernels_cupy.proof.cache import cache_folder, cached
from kernels_cupy.proof.emulator import Emulator, build


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has not looked for its cache folder yet."""
    for function in (cache_folder, module._private_folder, module._say_once, build._runtime):
        function.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for function in (cache_folder, module._private_folder, module._say_once, build._runtime):
        function.cache_clear()


def write(text):
    return lambda path: path.write_text(text)


def test_a_file_is_made_once_and_kept(fresh):
    path = cached("kernel.so", write("one"))
    assert path.parent == fresh / "cache" / "bros_ref" / "emulator"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert cached("kernel.so", lambda path: pytest.fail("made twice")) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["kernel.so"], "no unfinished file stays"


def test_a_failed_build_leaves_nothing(fresh):
    def fail(path):
        path.write_text("half")
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        cached("kernel.so", fail)
    assert list(cache_folder().iterdir()) == []


def test_processes_that_build_the_same_file_do_not_meet(fresh):
    def outer(path):
        inner = cached("kernel.so", write("inner"))
        assert inner != path
        assert inner.read_text() == "inner"
        path.write_text("outer")

    assert cached("kernel.so", outer).read_text() == "outer"


@pytest.mark.parametrize("value", ["", "relative/folder", None])
@pytest.mark.parametrize("home", ["given", ""])
def test_nothing_is_written_to_the_working_directory(fresh, monkeypatch, value, home):
    (fresh / "home").mkdir()
    (fresh / "work").mkdir()
    monkeypatch.chdir(fresh / "work")
    monkeypatch.setenv("HOME", str(fresh / "home") if home else "")
    monkeypatch.delenv("XDG_CACHE_HOME") if value is None else monkeypatch.setenv("XDG_CACHE_HOME", value)
    if not home:
        monkeypatch.setattr(module.Path, "expanduser", lambda path: Path("/proc/no-such-folder"))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        path = cached("kernel.so", write("x"))
    assert path.is_absolute()
    assert list((fresh / "work").iterdir()) == []
    if home:
        assert path.is_relative_to(fresh / "home" / ".cache")


@pytest.mark.parametrize("blocked", ["cache", "cache/bros_ref", "cache/bros_ref/emulator"])
def test_a_file_where_the_folder_belongs_is_one_line_and_not_the_end(fresh, blocked):
    (fresh / blocked).parent.mkdir(parents=True, exist_ok=True)
    (fresh / blocked).write_text("in the way")
    with pytest.warns(UserWarning, match="compiled kernels are not kept") as caught:
        first, second = (cached(name, write(name)) for name in ("a", "b"))
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert (first.read_text(), second.read_text()) == ("a", "b")
    assert (fresh / blocked).read_text() == "in the way"


def test_a_directory_where_a_kernel_belongs_is_one_line_and_not_the_end(fresh):
    (cache_folder() / "kernel.so").mkdir()
    with pytest.warns(UserWarning, match="is a directory where a compiled kernel belongs") as caught:
        path = cached("kernel.so", write("x"))
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):  # nor is it said twice
        assert cached("kernel.so", lambda path: pytest.fail("made twice")) == path
    assert path.read_text() == "x"


@pytest.mark.parametrize("how", ["another user's", "writable by all", "a link"])
def test_what_others_may_have_written_is_not_loaded(fresh, monkeypatch, how):
    path = cached("kernel.so", write("ours"))
    path.write_text("theirs")
    if how == "writable by all":
        path.chmod(0o666)
    elif how == "a link":
        path.rename(fresh / "elsewhere")
        path.symlink_to(fresh / "elsewhere")
    else:
        real = module._is_ours
        monkeypatch.setattr(module, "_is_ours", lambda found: real(found) and found.st_ino != path.stat().st_ino)
        assert not module._may_be_loaded(path)
        made = []
        cached("kernel.so", lambda path: (made.append(path), path.write_text("ours")))
        assert made
        return
    assert cached("kernel.so", write("ours")).read_text() == "ours"
    if how == "a link":
        assert (fresh / "elsewhere").read_text() == "theirs"


def test_another_user_s_folder_is_not_used(fresh, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert not cache_folder().is_relative_to(fresh)


@needs_emulator
def test_a_kernel_is_built_again_if_its_library_is_not_ours(fresh):
    text = 'extern "C" __global__ void f(float* a) { a[threadIdx.x] = 1; }'
    a = torch.zeros(32)

    def launch():
        build._open.cache_clear()
        Emulator(sources={"f.cu": text}).launch(Kernel("f.cu", "f"), (1, 1, 1), (32, 1, 1), 0, [a.zero_()])
        assert bool((a == 1).all())

    launch()
    (library,) = cache_folder().glob("kernel-*.so")
    library.unlink()
    library.write_bytes(b"no library")
    library.chmod(0o666)
    launch()
    assert library.stat().st_mode & 0o002 == 0
