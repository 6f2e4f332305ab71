"""Workload files as other people write them: units, failed requests, pipes, and what is no workload at all."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.request import SLO, RequestClass
from bros_ref.workload import WorkloadError, WorkloadItem
from bros_ref.workload import rows as rows_module
from bros_ref.workload.files import read_lengths, read_workload, save_workload
from bros_ref.workload.generate import MAX_PROMPT_CHARACTERS, MAX_TOKENS

RT, BE = RequestClass.REAL_TIME, RequestClass.BEST_EFFORT
OWN = "arrival_s,request_class,prompt_tokens,output_tokens,prompt\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:47,5,6\n2023-11-16 18:15:46,7,8\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def mooncake(*times: object, packed: bool = False, **extra: object) -> str:
    """The trace as JSONL, or as CSV if `packed`; a time given as text is written as it stands."""
    if packed:
        return "timestamp,input_length,output_length\n" + "".join(f"{time},9,5\n" for time in times)
    more = "".join(f', "{key}": {value}' for key, value in extra.items())
    return "".join(f'{{"timestamp": {time}, "input_length": 9, "output_length": 5{more}}}\n' for time in times)


# -- the unit of a timestamp ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_csv", [False, True])
@pytest.mark.parametrize(("times", "seconds"), [
    (["0.0", "3100.0", "3600000.0"], [0.0, 3.1, 3600.0]),  # whole decimals that would be 41 days: milliseconds
    (["86400.0"], [86.4]),
    (["0", "3100"], [0.0, 3.1]),
    (["0.0", "0.52", "7200.0"], [0.0, 0.52, 7200.0]),
    (["0.0", "1.0", "86399.5"], [0.0, 1.0, 86399.5]),  # the fraction comes late
    (["0.0", "0.0"], [0.0, 0.0]),
])
def test_the_unit_of_a_timestamp_is_told_from_all_of_them(tmp_path: Path, times: list[str], seconds: list[float],
                                                          as_csv: bool) -> None:
    path = tmp_path / "t"
    path.write_text(mooncake(*times, packed=as_csv))
    assert [item.arrival_s for item in read_workload(path, BE)] == pytest.approx(seconds)


@pytest.mark.parametrize("as_csv", [False, True])
@pytest.mark.parametrize("times", [["0.0", "1.0", "2.0"], ["86399.0"], ["0.5", "86400.0"], ["3600000.25"]])
def test_a_unit_that_cannot_be_told_is_asked_for(tmp_path: Path, times: list[str], as_csv: bool) -> None:
    path = tmp_path / "t"
    path.write_text(mooncake(*times, packed=as_csv))
    with pytest.raises(WorkloadError, match=r"seconds or milliseconds.*--time-unit-s 1 or --time-unit-s 0.001"):
        read_workload(path, BE)
    for unit_s in (1.0, 0.001):
        assert [item.arrival_s for item in read_workload(path, BE, time_unit_s=unit_s)] == pytest.approx(
            [unit_s * float(time) for time in times])


def test_bailian_whole_decimals_are_seconds(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(mooncake("0.0", "61.0", chat_id=1))
    assert [item.arrival_s for item in read_workload(path, BE)] == [0.0, 61.0]


# -- requests that failed when the trace was recorded -----------------------------------------------------------------

FAILED = {
    "burstgpt": (BURSTGPT + "5,ChatGPT,472,18,490,Conversation log\n6,ChatGPT,9,0,9,API log\n7,GPT-4,0,0,0,API log\n"
                 "45,GPT-4,10,23,33,API log\n", [5.0, 45.0], 2),
    "azure": (AZURE + "2023-11-16 18:15:48,0,3\n", [0.0, 1.0], 1),
    "mooncake": (mooncake(0, 10) + '{"timestamp": 20, "input_length": 9, "output_length": 0}\n', [0.0, 0.01], 1),
}


@pytest.mark.parametrize("name", FAILED)
def test_failed_requests_of_a_public_trace_are_skipped_counted_and_said(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    text, times_s, num_failed = FAILED[name]
    path = tmp_path / "trace"
    path.write_text(text)
    items = read_workload(path, BE)
    assert [item.arrival_s for item in items] == pytest.approx(times_s)
    num_rows = len(times_s) + num_failed
    said = f"{path}: skipped {num_failed} of {num_rows} rows: failed requests, with 0 tokens of prompt or answer"
    assert caplog.messages == [said]
    assert len(read_lengths(path, 10_000)) == len(times_s)
    assert caplog.messages == [said, said]


def test_nothing_is_said_where_nothing_failed_and_nothing_is_served_where_all_did(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trace"
    path.write_text(AZURE)
    read_workload(path, BE)
    assert caplog.messages == []
    path.write_text(BURSTGPT + "5,ChatGPT,472,0,472,Conversation log\n")
    for read in (lambda: read_workload(path, BE), lambda: read_lengths(path, 1000)):
        with pytest.raises(WorkloadError, match=r"skipped 1 of 1 rows.*nothing is left to serve"):
            read()


@pytest.mark.parametrize("header", ["arrival_s,prompt_tokens,output_tokens", "arrival_s,input_tokens,output_tokens"])
def test_a_zero_in_a_file_of_ones_own_is_a_slip(tmp_path: Path, header: str) -> None:
    path = tmp_path / "w"
    path.write_text(f"{header}\n0,5,0\n")
    with pytest.raises(WorkloadError, match=r"w:2: output_tokens: expected a whole number"):
        read_workload(path, BE)


# -- what is saved can be read back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [131_071, 131_072, 131_073, 400_000])
def test_a_long_prompt_comes_back(tmp_path: Path, length: int) -> None:
    item = WorkloadItem(0.0, BE, 1, 1, prompt='"' * length)
    save_workload([item], tmp_path / "w.csv")
    assert read_workload(tmp_path / "w.csv") == [item]
    as_json = {"arrival_s": 0, "request_class": "be", "prompt_tokens": 1, "output_tokens": 1, "prompt": item.prompt}
    (tmp_path / "w.jsonl").write_text(json.dumps(as_json))
    assert read_workload(tmp_path / "w.jsonl") == [item]


@settings(max_examples=30)
@given(prompt=st.text(st.characters(codec="utf-8") | st.sampled_from('",\r\n\0\ufeff\u2028'), min_size=1))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    path = tmp_path_factory.mktemp("w") / "w.csv"
    items = [WorkloadItem(0.0, BE, 1, 1, prompt=prompt), WorkloadItem(1.0, RT, 2, 2, SLO(1.0, 1.0))]
    save_workload(items, path)
    assert read_workload(path) == items


@pytest.mark.parametrize(("changes", "says"), [
    ({"prompt": "half \ud83d"}, r"prompt: character 5 is U\+D83D, a lone surrogate"),
    ({"prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)}, "prompt: expected at most 8,388,608 characters, got 8,388,609"),
    ({"prompt_tokens": MAX_TOKENS + 1}, "prompt_tokens: expected 1 to 10000000 tokens"),
    ({"output_tokens": MAX_TOKENS + 1}, "output_tokens: expected 1 to 10000000 tokens"),
])
def test_what_could_not_be_read_back_is_no_item(changes: dict[str, object], says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        WorkloadItem(**({"arrival_s": 0.0, "request_class": BE, "prompt_tokens": 1, "output_tokens": 1} | changes))


# -- malformed text ---------------------------------------------------------------------------------------------------

AS_JSON = '{"arrival_s": 0, "request_class": "be", "prompt_tokens": 1, "output_tokens": 1'


@pytest.mark.parametrize(("text", "says"), [
    ("arrival_s,prompt_tokens,output_tokens,prompt_tokens\n0,1,2,3\n", "w:1: column prompt_tokens is there twice"),
    ("\n\narrival_s, arrival_s\n0,1\n", "w:3: column arrival_s is there twice"),
    (AS_JSON + ', "arrival_s": 5}\n', "w:1: not JSON .*'arrival_s' is there twice"),
    (AS_JSON + ', "prompt": "\\ud83d"}\n', r"w:1: prompt: character 0 is U\+D83D"),
    ("\n" + AS_JSON + "}\n\n[1]\n", r"w:4: expected a JSON object, got \[1\]"),
    ("[" + AS_JSON + "}]", r"w:1: expected a JSON object, got \[\{"),
    ("[" * 100_000, "w:1: not JSON"),
    (OWN + "0,be,1,1,\n\n1,be,1,-1,\n", "w:4: output_tokens"),
    ("\n" + OWN + '0,be,1,1,"two\r\nlines"\n1,no,1,1,"x\ny"\n2,be,1,1,z', "w:5: request_class"),
    (OWN + '0,be,1,1,"never closed\n1,be,1,1,\n', "w: after line 0: unexpected end of data"),
    (OWN + '0,be,1,1,"a"b\n', "w: after line 0: ',' expected after '\"'"),
    (OWN + "1_0,be,1,1,\n", "w:2: arrival_s: expected a finite number; got '1_0'"),
    ("x" * 5_000 + "\n1\n", r"w:2: no known columns among \.\.\."),
    (OWN + "0,be,1,1" + "0" * 5_000 + ",\n", r"w:2: output_tokens: .{0,120}$"),
    ("TIMESTAMP,ContextTokens,GeneratedTokens\n9999-99-99,1,1\n", "w:2: TIMESTAMP: expected a date and time"),
    (OWN, "w: no requests in it"), ("\ufeff", "w: no requests in it"), (" \r\n\t\n", "w: no requests in it"),
])
def test_malformed_text_names_the_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "w"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(WorkloadError, match=says):
        read_workload(path)


def test_a_spreadsheets_csv_is_read(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, nameless columns, blank rows."""
    path = tmp_path / "w.csv"
    path.write_bytes("\ufeffarrival_s,request_class,prompt_tokens,output_tokens,,\r\n0,be,1,2,,\r\n,,,,,\r\n1,be,3,4\r\n"
                     .encode())
    assert [(item.arrival_s, item.prompt_tokens) for item in read_workload(path)] == [(0.0, 1), (1.0, 3)]


@pytest.mark.parametrize(("data", "says"), [
    (gzip.compress((OWN + "0,be,1,1,\n" * 50).encode())[:-9], "w: cannot be read after line .*ended before"),
    (OWN.encode("utf-16"), "w: after line 0: .*expected CSV or JSONL text in UTF-8"),
    (b"\0" * 100, "w: starts with a zero byte, so it is no text"),
    (gzip.compress(b"\0" * 100), "w: starts with a zero byte, so it is no text"),
], ids=["cut", "utf-16", "zeros", "packed zeros"])
def test_what_is_no_text_is_said(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "w"
    path.write_bytes(data)
    with pytest.raises(WorkloadError, match=says):
        read_workload(path)


@pytest.mark.parametrize(("path", "says"), [("/dev/zero", "zero byte"), ("/dev/null", "no requests in it"),
                                            ("/", "Is a directory"), ("/nowhere", "No such file or directory")])
def test_what_is_no_file_ends_with_a_line(path: str, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        read_workload(path)


def test_no_line_is_read_beyond_the_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE", 100)
    path = tmp_path / "w"
    for length, fits in ((99, True), (100, False), (5_000, False)):
        path.write_text(OWN + "0,be,1,1," + "x" * (length - 9) + "\n")
        if fits:
            assert len(read_workload(path)) == 1
        else:
            with pytest.raises(WorkloadError, match="w:2: longer than 100 characters"):
                read_workload(path)


# -- pipes and standard input -----------------------------------------------------------------------------------------

PIPED = {"own": OWN + "0,be,1,2,x\n1,be,3,4,\n", "azure, whose first time must be known": AZURE,
         "decimals, whose unit must be known": mooncake("0.0", "0.5")}


def write_slowly(descriptor: int, data: bytes) -> None:
    with open(descriptor, "wb") as stream:
        for place in (data[:12], data[12:]):
            stream.write(place)
            stream.flush()
            time.sleep(0.05)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", PIPED)
def test_a_pipe_reads_as_the_file_does(tmp_path: Path, name: str, packed: bool) -> None:
    """As `<(...)` gives it: a path below /dev/fd."""
    data = gzip.compress(PIPED[name].encode()) if packed else PIPED[name].encode()
    (tmp_path / "w").write_bytes(data)
    reader, writer = os.pipe()
    thread = threading.Thread(target=write_slowly, args=(writer, data))
    thread.start()
    try:
        assert read_workload(f"/dev/fd/{reader}", BE) == read_workload(tmp_path / "w", BE) != []
    finally:
        thread.join()
        os.close(reader)


@pytest.mark.parametrize("name", PIPED)
def test_standard_input_reads_as_the_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "w"
    path.write_text(PIPED[name])
    with path.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert read_workload("-", BE) == read_workload(path, BE) != []
        assert not stream.closed


def test_a_fifo_reads_as_the_file_does_and_without_a_writer_ends_with_a_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: pipe.write_text(AZURE))
    thread.start()
    assert [item.arrival_s for item in read_workload(pipe, BE)] == [0.0, 1.0]
    thread.join()
    monkeypatch.setattr(rows_module, "WRITER_TIMEOUT_S", 0.01)
    with pytest.raises(WorkloadError, match=r"a pipe into which nothing was written for 0.01 s"):
        read_workload(pipe, BE)
