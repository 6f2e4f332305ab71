"""What the command line leaves and shows when it is interrupted, the disk is full, or the terminal is a poor one."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bros_ref.cli.common import output_file
from bros_ref.cli.live import main
from bros_ref.cli.terminal import prepare_streams, printable
from bros_ref.scheduler.latency_model import StepFeatures
from bros_ref.trace import Trace

TOY = ["--model", "random:llama"]
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": "/nonexistent"}
TEXT = "caf\xe9 \U0001f600 \x1b[31mred\x07\r\x9b2J\tdone\n"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "bros_ref", *map(str, arguments)]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """The exit status of a command that runs in this process."""
    monkeypatch.setattr("sys.argv", ["bros-ref", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose answer is TEXT, one character after the other."""
    letters = iter(TEXT)
    monkeypatch.setattr("bros_ref.engine.detokenizer.TextStream.push", lambda *_: next(letters, ""))


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "workload.csv"
    path.write_text("arrival_s,request_class,prompt_tokens,output_tokens,ttft_slo_s,tpot_slo_s\n"
                    "0,be,30,40,,\n0,be,20,40,,\n0,rt,20,8,1,0.5\n0,rt,9999,8,1,0.5\n")
    return path


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def interrupt_in_step(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Ctrl-C comes in this step, of a model that is profiled in no time."""
    from bros_ref.engine import model_runner

    count, sample = itertools.count(1), model_runner.sample

    def interrupt(*arguments: object) -> object:
        if next(count) == last:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(model_runner, "sample", interrupt)
    monkeypatch.setattr("bros_ref.engine.profile.profile", lambda *_: [(StepFeatures(1), 0.01)] * 4)


@pytest.fixture
def interrupted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_in_step(monkeypatch, 5)


def has_part_of_a_run(path: Path) -> bool:
    trace = Trace.load(path)
    return len(trace.steps) >= 4 and len(trace.requests) >= 3 and not any(step.finished for step in trace.steps[:4])


def test_an_interrupted_serve_trace_saves_what_it_has(workload, tmp_path, monkeypatch, capsys, interrupted_run):
    out = tmp_path / "trace.json"
    status = call(monkeypatch, "serve-trace", "--workload", workload, *TOY, "--trace", out, "--json", "-")
    printed = capsys.readouterr()
    assert status == 130
    assert has_part_of_a_run(out)
    result = json.loads(printed.out)
    assert result["interrupted"] is True
    assert result["runs"][0]["classes"]["be"]["completed"] == 0
    assert f"interrupted: what was served until then is above; trace: {out}" in printed.err


def test_an_interrupted_demo_saves_what_it_has(tmp_path, monkeypatch, capsys, interrupted_run):
    assert call(monkeypatch, "demo", *TOY, "--out", tmp_path) == 130
    assert has_part_of_a_run(tmp_path / "trace-vllm-priority.json")
    assert json.loads((tmp_path / "summary.json").read_text())["interrupted"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "summary.json",
                                                                 "trace-vllm-priority.json"]


def test_an_interrupt_in_the_first_step_leaves_a_trace_of_what_arrived(tmp_path, monkeypatch, capsys):
    interrupt_in_step(monkeypatch, 1)
    assert call(monkeypatch, "demo", *TOY, "--out", tmp_path) == 130
    trace = Trace.load(tmp_path / "trace-vllm-priority.json")
    assert trace.requests
    assert len(trace.steps) <= 1


def test_an_interrupted_bench_saves_what_it_has(tmp_path, monkeypatch, capsys, interrupted_run):
    report = tmp_path / "report.html"
    report.write_text("old")
    assert call(monkeypatch, "bench", "hybrid", *TOY, "--policies", "tgi,bros", "--report", report) == 130
    assert has_part_of_a_run(tmp_path / "report.trace.json")
    assert report.read_text() == "old"


@pytest.mark.parametrize("module", ["typer.models", "rich.text", "numpy", "torch"])
def test_an_interrupt_during_the_imports_shows_no_traceback(module: str) -> None:
    """The interpreter reports each import on standard error; the interrupt comes after that of `module`."""
    arguments = [sys.executable, "-X", "importtime", *command("generate", "hi", *TOY, "--max-tokens", 900)[1:]]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert any(line.split("|")[-1].strip() == module for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert "Traceback" not in rest
    assert process.returncode == 130


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As for a job that a script runs in the background."""
    script = "trap '' INT; " + " ".join(command("--help")) + " & job=$!; sleep 0.1; kill -INT $job; wait $job"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


# -- terminals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_answer_is_never_lost_to_an_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: None,
                                                encoding: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, newline="\n"))
    report = tmp_path / "r.json"
    assert not call(monkeypatch, "generate", "hi", *TOY, "--max-tokens", len(TEXT), "--json", report)
    assert written.getvalue() == TEXT.encode(encoding, "backslashreplace") + b"\n"
    assert json.loads(report.read_text())["finish_reason"] == "length"


def test_every_command_prints_its_table_without_utf8(tmp_path: Path, workload: Path) -> None:
    done = subprocess.run(command("simulate", "--workload", workload, "--policies", "bros"), capture_output=True,
                          env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "LANG": "C"}, timeout=100)
    assert done.returncode == 0, done.stderr
    assert b"bros" in done.stdout
    assert done.stdout.isascii()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_are_escaped_on_a_terminal_only() -> None:
    shown = printable(TEXT, Terminal())
    assert shown == "caf\xe9 \U0001f600 \\x1b[31mred\\x07\\r\\x9b2J\tdone\n"
    assert printable(TEXT, io.StringIO()) == TEXT
    for code in range(0x110000):
        if 0xd800 <= code < 0xe000:
            continue
        is_control = code < 32 or 127 <= code < 160
        if is_control != (printable(chr(code), Terminal()) != chr(code)):
            assert chr(code) in "\n\t"


def test_generate_escapes_on_a_terminal(monkeypatch: pytest.MonkeyPatch, says: None) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert not call(monkeypatch, "generate", "hi", *TOY, "--max-tokens", len(TEXT))
    assert terminal.getvalue() == printable(TEXT, terminal) + "\n"


def test_an_error_that_quotes_a_name_cannot_steer_the_terminal() -> None:
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(command("serve-trace", "--workload", "\x1b]0;owned\x07.csv"), stderr=theirs,
                              stdout=subprocess.PIPE, env=ENVIRONMENT, timeout=60)
        said = os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert b"\\x1b]0;owned\\x07.csv" in said
    assert b"\x1b" not in said


def test_closed_streams_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    prepare_streams()
    with sys.stdout as stream:
        print("nothing", flush=True, file=stream)


def test_a_command_whose_output_is_closed_ends_well() -> None:
    done = subprocess.run(["bash", "-c", " ".join(command("--help")) + " >&-"], capture_output=True, env=ENVIRONMENT,
                          timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


# -- full disks and closed pipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "scheduler", "--running", "4", "--waiting", "8",
                                                    "--rounds", "1", "--json", "-"]])
def test_output_that_cannot_be_written_is_told_in_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(*arguments), stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
                              timeout=100)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr.strip().splitlines()[-1]
    assert "Exception" not in done.stderr


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    done = subprocess.run(["bash", "-c", " ".join(command("--help")) + " | true; exit ${PIPESTATUS[0]}"],
                          capture_output=True, env=ENVIRONMENT, timeout=60)
    assert (done.returncode, done.stderr) in ((1, b""), (0, b""))  # 0: it was written before `true` had ended


def test_a_full_disk_costs_no_result(workload, tmp_path, monkeypatch, capsys):
    """The table is printed before anything is written, and the old trace stays."""
    monkeypatch.setattr("bros_ref.engine.profile.profile", lambda *_: [(StepFeatures(1), 0.01)] * 4)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "trace.json"
    out.write_text("old")
    monkeypatch.setattr("bros_ref.files.os.fsync", full)
    assert call(monkeypatch, "serve-trace", "--workload", workload, *TOY, "--trace", out) == 2
    printed = capsys.readouterr()
    assert "on time" in printed.out
    assert f"{out} could not be written: No space left on device; the file that was there is unchanged" in printed.err
    assert out.read_text() == "old"


def test_where_nothing_can_be_written_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    path = tmp_path / "out"
    assert output_file(path) == path
    assert output_file("/dev/stdout") == "/dev/stdout"
    monkeypatch.setattr("bros_ref.cli.common.os.access", lambda place, _: Path(place) != tmp_path)  # root may write
    with pytest.raises(typer.BadParameter, match="nothing can be written in"):
        output_file(path)


# -- refused requests -------------------------------------------------------------------------------------------------


def test_simulate_says_how_many_requests_were_refused(workload, monkeypatch, capsys):
    assert not call(monkeypatch, "simulate", "--workload", workload, "--policies", "bros,tgi,be-only", "--json", "-")
    printed = capsys.readouterr()
    for policy in ("bros", "tgi"):
        assert f"{policy}: refused 1 of 4 requests, the first rt-1: 9999 prompt + 8 new tokens exceed" in printed.err
    assert "be-only: refused" not in printed.err
    runs = json.loads(printed.out)["runs"]
    assert [run["classes"]["rt"]["refused"] for run in runs] == [1, 1, 0]
    assert [run["classes"]["rt"]["failed"] for run in runs] == [1, 1, 0]
    assert runs[0]["classes"]["rt"]["first_refusal"].startswith("rt-1: 9999 prompt")
    assert runs[2]["classes"]["rt"]["first_refusal"] is None
