"""Every writer writes a file whole or not at all; caches are kept only in the expected folder."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import stat
from pathlib import Path

import pytest

from bros_ref.cli.common import write_json
from bros_ref.files import cache_folder, keep_cached, read_cached, write_bytes, write_text
from bros_ref.request import RequestClass
from bros_ref.trace import RequestRecord, Trace
from bros_ref.trace.metrics import summarise
from bros_ref.viz.figures.report import write_report
from bros_ref.workload import WorkloadItem
from bros_ref.workload.files import save_workload

OLD = b"what was there before"


def trace() -> Trace:
    made = Trace("bros", "m", "cpu", 4, 4, 1, 0)
    made.requests["a"] = RequestRecord("a", "be", 0.0, 4, 2)
    return made


def many_items() -> list[WorkloadItem]:
    return [WorkloadItem(float(i), RequestClass.BEST_EFFORT, 1, 1) for i in range(500)]


WRITERS = {
    "text": lambda path: write_text(path, "x" * 10_000),
    "bytes": lambda path: write_bytes(path, bytes(10_000)),
    "trace": lambda path: Trace("b" * 10_000, "m", "cpu", 4, 4, 1, 0).save(path),
    "perfetto": lambda path: Trace("b" * 10_000, "m", "cpu", 4, 4, 1, 0).to_perfetto(path),
    "workload": lambda path: save_workload(many_items(), path),
    "report": lambda path: write_report(path, [trace()], [summarise(trace())], "t"),
    "json": lambda path: write_json(str(path), "c", 0, runs=["x" * 10_000]),
}


@pytest.fixture
def full_disk():
    """No file of this process may grow beyond 4 KiB: a write fails half-way, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("had_one", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, full_disk: None, name: str,
                                                          had_one: bool) -> None:
    path = tmp_path / "out"
    if had_one:
        path.write_bytes(OLD)
    with pytest.raises(OSError, match=r"out could not be written: File too large") as raised:
        WRITERS[name](path)
    assert raised.value.errno == errno.EFBIG
    assert ("the file that was there is unchanged" in str(raised.value)) == had_one
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == ({"out": OLD} if had_one else {})


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                                        moment: str) -> None:
    path = tmp_path / "out"
    path.write_bytes(OLD)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"bros_ref.files.os.{moment}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        WRITERS[name](path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"out": OLD}


def test_the_new_content_reaches_the_disk_before_it_takes_the_name(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(f"bros_ref.files.os.{name}",
                            lambda *arguments, name=name, real=real: (done.append(name), real(*arguments)))
    write_text(tmp_path / "out", "new")
    assert done[:2] == ["fsync", "replace"]
    assert (tmp_path / "out").read_text() == "new"


def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(OLD)
    real.chmod(0o640)
    link.symlink_to("real")
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    plain = tmp_path / "plain"
    plain.touch()
    write_text(tmp_path / "made", "new")
    assert (tmp_path / "made").stat().st_mode == plain.stat().st_mode, "as any new file of this user"


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "new")
    assert (tmp_path / ("n" * 255)).read_text() == "new"


def test_a_device_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    inode = os.stat("/dev/null").st_ino
    write_text("/dev/null", "gone")
    assert os.stat("/dev/null").st_ino == inode
    with pytest.raises(OSError, match=r"/dev/full could not be written: No space left on device$"):
        write_text("/dev/full", "x")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)


def test_what_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "no" / "file", "No such file or directory")):
        with pytest.raises(OSError, match=f"{path} could not be written: {why}"):
            write_text(path, "x")
    kept = tmp_path / "kept"
    kept.write_bytes(OLD)
    monkeypatch.setattr("bros_ref.files.os.access", lambda *_: False)  # root may write what is read-only
    with pytest.raises(PermissionError, match="it is read-only; the file that was there is unchanged"):
        write_text(kept, "x")
    assert kept.read_bytes() == OLD


def test_equal_text_gives_equal_bytes_and_a_lone_surrogate_is_no_end(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        write_text(tmp_path / name, "text")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"text"
    write_text(tmp_path / "c", "half \ud83d of an emoji, é")
    assert (tmp_path / "c").read_text(encoding="utf-8") == "half \\ud83d of an emoji, é"


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "relative", "./x"])
def test_the_cache_is_never_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        value: str | None) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    keep_cached("name.json", "kept")
    assert list(here.iterdir()) == []
    assert (home / ".cache" / "bros_ref" / "name.json").read_text() == "kept"
    assert read_cached("name.json") == "kept"
    assert read_cached("another") is None


def test_an_absolute_cache_home_is_used_and_no_home_means_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bros_ref"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "relative")
    assert cache_folder() is None
    keep_cached("name", "text")
    assert read_cached("name") is None
    assert caplog.messages == [
        "nothing is cached: neither XDG_CACHE_HOME nor the home folder is an absolute path"]


def make_file(folder: Path) -> None:
    folder.write_bytes(OLD)


def make_folder_of_that_name(folder: Path) -> None:
    (folder / "name.json").mkdir(parents=True)


@pytest.mark.parametrize("in_the_way", [make_file, make_folder_of_that_name])
def test_what_is_in_the_way_of_the_cache_is_one_line_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                     caplog: pytest.LogCaptureFixture,
                                                                     in_the_way) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    in_the_way(tmp_path / "bros_ref")
    assert read_cached("name.json") is None
    keep_cached("name.json", "kept")
    [message] = caplog.messages
    assert message.startswith(f"nothing is cached in {tmp_path / 'bros_ref'}: ")
    assert "\n" not in message


def test_a_damaged_cache_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "bros_ref").mkdir()
    (tmp_path / "bros_ref" / "name").write_bytes(b"\xff\xfe")
    assert read_cached("name") is None
    keep_cached("name", json.dumps({"a": 1}))
    assert read_cached("name") == '{"a": 1}'
