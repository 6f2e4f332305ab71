"""The command line as programs use it: exit status, one line of error, JSON with the promised keys and nothing else."""

import json
import re
import subprocess
import sys

import pytest
import typer
from rich.text import Text

from bros_ref.cli.common import make_console
from bros_ref.cli.live import main
from bros_ref.cli.tables import results_table
from bros_ref.scheduler.latency_model import StepFeatures
from bros_ref.trace import Trace
from bros_ref.trace.metrics import summarise

RT_KEYS = {"completed", "failed", "request_throughput", "output_throughput", "normalized_latency_ms_per_token",
           "ttft_attainment", "tpot_attainment", "slo_attainment",
           *(f"{kind}_{name}_ms" for kind in ("mean", "median", "p99") for name in ("ttft", "tpot", "itl", "e2el"))}
BE_KEYS = {"completed", "failed", "request_throughput", "output_throughput", "total_token_throughput", "max_wait_s"}
KV_KEYS = {"num_blocks", "block_size", "peak_usage", "preempted_requests", "recomputed_tokens", "overwritten_slots",
           "checkpointed_slots", "restored_slots", "relocated_slots", "d2h_bytes", "h2d_bytes"}
SCHEDULER_KEYS = {"steps", "mean_us_per_step", "p99_us_per_step", "us_per_request_step", "share_of_iteration"}


def bros_ref(*arguments, cache=None):
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(cache or "/nonexistent")}
    words = [word if isinstance(word, bytes) else str(word) for word in arguments]
    return subprocess.run([sys.executable, "-m", "bros_ref", *words], capture_output=True, text=True,
                          timeout=300, env=environment)


@pytest.fixture
def workload(tmp_path):
    path = tmp_path / "workload.csv"
    path.write_text("arrival_s,request_class,prompt_tokens,output_tokens,ttft_slo_s,tpot_slo_s\n"
                    "0,be,90,20,,\n0,be,70,20,,\n0.01,rt,20,8,1,0.5\n0.05,rt,9999,8,1,0.5\n")
    return path


@pytest.mark.parametrize(("arguments", "expected"), [
    (["nonsense"], "nonsense"),
    (["generate"], "prompt"),
    (["generate", " "], "empty"),
    (["generate", b"caf\xe9", "--model", "random:llama"], "character 3 is no text"),
    (["generate", "hi", "--model", "no-such-model"], "no-such-model"),
    (["generate", "hi", "--max-tokens", "0"], "--max-tokens"),
    (["generate", "hi", "--model", "random:llama", "--device", "tpu"], "--device"),
    (["demo", "--policies", "bros,fifo"], "vllm-fcfs"),
    (["serve-trace", "--workload", "missing.csv"], "missing.csv"),
    (["bench", "scheduler", "--running", "64,x"], "--running"),
    (["bench", "gpu-step", "--batches", "0"], "--batches"),
    (["bench", "gpu-step", "--model", "opt-13b"], "gated MLP"),
    (["bench", "gpu-step", "--gpus", "v100"], "a100-40gb"),
    (["simulate", "--workload", "paper", "--gpu", "v100"], "a100-40gb"),
    (["simulate", "--workload", "paper", "--model", "gpt-5"], "opt-13b"),
    (["simulate", "--workload", "paper", "--gpu", "l4", "--tp", "1"], "bytes"),
    (["simulate", "--workload", "paper", "--rt-rate", "nan"], "rate"),
    (["simulate", "--workload", "paper", "--ttft-slo-s", "0"], "ttft_s"),
    (["simulate", "--workload", "paper", "--workload", "x.csv"], "alone"),
])
def test_bad_usage_is_one_line_and_status_2(arguments, expected):
    result = bros_ref(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert expected in result.stderr
    assert result.stdout == ""


TOY = ["--model", "random:llama"]


@pytest.mark.parametrize(("arguments", "expected"), [
    (["serve-trace", "--workload", "W", *TOY, "--policy", "bros,tgi"], "--policy takes one policy, got 'bros,tgi'"),
    (["serve-trace", "--workload", "W", *TOY, "--until-s", "nan"], "--until-s"),
    (["serve-trace", "--workload", "W", *TOY, "--until-s", "-1"], "--until-s"),
    (["serve-trace", "--workload", "W", *TOY, "--seed", "-1"], "--seed"),
    (["serve-trace", "--workload", "W", *TOY, "--trace", "no/such/trace.json"], "folder no/such does not exist"),
    (["serve-trace", "--workload", "W", *TOY, "--json", "."], "'--json': '.' is no name of a file"),
    (["serve-trace", "--workload", "W", *TOY, "--kv-blocks", str(10**13)], "GB, which cpu cannot give"),
    (["serve-trace", "--workload", "W", *TOY, "--kv-blocks", str(10**30)], "GB, which cpu cannot give"),
    (["serve-trace", "--workload", "W", *TOY, "--kv-dtype", "int4"], "auto or fp8, not 'int4'"),
    (["serve-trace", "--workload", "W", "--model", "checksum", "--kv-dtype", "fp8"], "floating point"),
    (["bench", "kv-dtype", *TOY, "--windows", "100000"], "the text has"),
    (["generate", "hi", *TOY, "--max-tokens", str(10**12)], "exceed the model's context"),
    (["generate", "hi", *TOY, "--seed", str(2**63)], "--seed"),
    (["generate", "hi", *TOY, "--json", "no/such/x.json"], "folder no/such does not exist"),
    (["demo", *TOY, "--out", "W"], "cannot be made a folder"),
    (["bench", "hybrid", *TOY, "--policies", "bros,bros"], "'bros' is named twice"),
    (["simulate", "--workload", "W", "--json", "no/such/x.json"], "folder no/such does not exist"),
    (["simulate", "--workload", "W", "--report", "."], "'.' is no name of a file"),
    (["reproduce", "--out", "W"], "cannot be made a folder"),
    (["bench", "scheduler", "--running", str(10**20)], "from 1 to 100000"),
])
def test_what_could_not_be_done_is_said_before_anything_is_done(workload, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(workload.parent)
    monkeypatch.setattr("sys.argv", ["bros-ref", *(workload.name if word == "W" else word for word in arguments)])
    with pytest.raises(SystemExit, match="2"):
        main()
    printed = capsys.readouterr()
    assert expected in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""
    assert [path.name for path in workload.parent.iterdir()] == [workload.name], "nothing was written"


@pytest.mark.parametrize(("ends", "status"), [(KeyboardInterrupt(), 130), (typer.Exit(1), 1)])
def test_the_exit_status_tells_how_a_command_ended(monkeypatch, ends, status):
    def end(*_):
        raise ends

    monkeypatch.setattr("bros_ref.engine.build.load_model", end)
    monkeypatch.setattr("sys.argv", ["bros-ref", "generate", "hi"])
    with pytest.raises(SystemExit) as quitting:
        main()
    assert quitting.value.code == status


def test_steps_that_fail_are_told_with_their_cause(workload, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(workload))  # a file: the fit cannot be kept, and that is no reason to stop
    monkeypatch.setattr("bros_ref.engine.model_runner.sample", lambda *_: 1 / 0)
    monkeypatch.setattr("bros_ref.engine.profile.profile", lambda *_: [(StepFeatures(1), 0.01)] * 4)
    monkeypatch.setattr("sys.argv", ["bros-ref", "serve-trace", "--workload", str(workload), *TOY, "--json", "-"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr()
    assert re.search(r"ZeroDivisionError: division by zero; failed requests: .*be-0, be-1", printed.err)
    assert json.loads(printed.out)["runs"][0]["classes"]["be"]["failed"] == 2


def test_brackets_in_what_a_model_or_a_path_says_are_just_text(capsys):
    run = summarise(Trace("bros-swap-request", "m", "cpu", 1, 1, 1, 0))
    console = make_console(None)
    console.print(results_table([run], "folder/[/red]"))
    console.print(Text.assemble(("question", "bold"), " ", "[/INST] answer"), soft_wrap=True)
    printed = capsys.readouterr().out
    assert "folder/[/red]" in printed
    assert "[/INST] answer" in printed
    assert "bros-swap-request" in printed, "the longest name is not cut"


def test_a_bad_workload_line_is_named(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("arrival_s,request_class,prompt_tokens,output_tokens\n0,be,5,5\n1,be,-3,5\n")
    result = bros_ref("serve-trace", "--workload", path, "--model", "random:llama")
    assert result.returncode == 2
    assert "bad.csv" in result.stderr
    assert "3" in result.stderr
    assert "prompt_tokens" in result.stderr


@pytest.mark.parametrize("policy", ["bros", "vllm-priority", "rt-only"])
def test_serve_trace_prints_only_json_with_the_promised_keys(workload, tmp_path, policy):
    trace = tmp_path / "trace.json.gz"
    result = bros_ref("serve-trace", "--workload", workload, "--model", "random:llama", "--policy", policy,
                      "--kv-blocks", 12, "--seed", 3, "--json", "-", "--trace", trace, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["schema"], report["command"], report["seed"]) == (1, "serve-trace", 3)
    [run] = report["runs"]
    assert run["policy"] == policy
    assert run["classes"]["rt"].keys() >= RT_KEYS
    assert run["classes"]["be"].keys() >= BE_KEYS
    assert run["kv"].keys() >= KV_KEYS
    assert run["scheduler"].keys() >= SCHEDULER_KEYS
    assert run["classes"]["rt"]["completed"] == 1
    assert run["classes"]["rt"]["slo_attainment"] <= 0.5, "the refused request counts as missed"
    assert run["classes"]["be"]["completed"] == (0 if policy == "rt-only" else 2)
    assert "9999" in result.stderr, "the refusal is told"
    assert trace.stat().st_size > 0


def test_generate_streams_text_and_reports_it(tmp_path):
    result = bros_ref("generate", "hello", "--model", "random:qwen3", "--max-tokens", 5, "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["text"] in result.stdout
    assert report["runs"][0]["classes"]["be"]["completed"] == 1


def test_an_fp8_cache_serves_and_its_accuracy_is_reported(workload, tmp_path):
    served = bros_ref("serve-trace", "--workload", workload, "--model", "random:llama", "--kv-dtype", "fp8",
                      "--json", "-", cache=tmp_path)
    assert served.returncode == 0, served.stderr
    assert json.loads(served.stdout)["runs"][0]["classes"]["be"]["completed"] == 2
    measured = bros_ref("bench", "kv-dtype", "--model", "random:llama", "--windows", 2, "--window-tokens", 32, "--json",
                        tmp_path / "r.json")
    assert measured.returncode == 0, measured.stderr
    auto, fp8 = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert (auto["kv_dtype"], fp8["kv_dtype"], auto["excess_percent"]) == ("auto", "fp8", None)
    assert auto["bytes_per_token"] == 4 * fp8["bytes_per_token"]
    assert f"{fp8['excess_percent'][0]:+.2f} ±" in measured.stdout


def test_bench_scheduler_has_a_row_per_point_and_a_slope(tmp_path):
    result = bros_ref("bench", "scheduler", "--policies", "bros,tgi", "--running", "4,16", "--waiting", 50,
                      "--rounds", 1, "--json", "-")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [(row["policy"], row["running"]) for row in report["rows"]] == [
        ("bros", 4), ("tgi", 4), ("bros", 16), ("tgi", 16)]
    assert all(row["us_per_request_step"] > 0 and row["waiting"] == 50 for row in report["rows"])
    assert report["slope"].keys() == {"bros", "tgi"}


def test_simulate_gives_a_run_per_policy_and_seed_and_intervals(tmp_path):
    result = bros_ref("simulate", "--workload", "paper", "--policies", "vllm-priority,bros-plus", "--rt-rate", 3,
                      "--duration-s", 5, "--seeds", 2, "--seed", 7, "--json", "-", "--report", tmp_path / "report.html")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [(run["policy"], run["seed"]) for run in report["runs"]] == [
        (policy, seed) for policy in ("vllm-priority", "bros-plus") for seed in (7, 8)]
    for run in report["runs"]:
        assert run["classes"]["rt"].keys() >= RT_KEYS
        assert run["kv"].keys() >= KV_KEYS
        assert run["kv"]["num_blocks"] == 3213
        assert "simulated" in run["device"]
    assert [row["policy"] for row in report["intervals"]] == ["vllm-priority", "bros-plus"]
    assert all(len(row["be.output_throughput"]) == 2 for row in report["intervals"])
    assert (tmp_path / "report.html").stat().st_size > 1_000_000, "plotly is inside"


def test_simulate_reads_published_traces(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.680,374,44\n"
                    "2023-11-16 18:15:47.180,396,109\n")
    result = bros_ref("simulate", "--workload", path, "--class", "rt", "--policies", "bros", "--json", "-")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["runs"][0]["classes"]["rt"]["completed"] == 2
    empty = bros_ref("simulate", "--workload", path, "--class", "rt", "--duration-s", 0)
    assert (empty.returncode, "nothing to simulate" in empty.stderr) == (2, True)


def test_options_of_simulate_that_do_not_go_together_are_refused(tmp_path, workload):
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("conv,in,out\n0,9,3\n1,3000,3\n")
    columns = tmp_path / "columns.csv"
    columns.write_text("long,short\n9,3\n")
    for arguments, expected in (
            (["--workload", workload, "--seeds", 2], "nothing random"),
            (["--workload", workload, "--rt-lengths", lengths], "lengths of its own"),
            (["--workload", "paper", "--rt-lengths", columns], "prompt_tokens"),
            (["--workload", "paper", "--policies", "bros+speed"], "bros+chunks")):
        result = bros_ref("simulate", *arguments)
        assert (result.returncode, expected in result.stderr) == (2, True), result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("unit", "duration_s"), [("1", 90), ("0.001", 0.09)])
def test_the_unit_of_whole_timestamps_can_be_told(tmp_path, monkeypatch, capsys, unit, duration_s):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f'{{"timestamp": {time}, "input_length": 9, "output_length": 1}}\n' for time in (0, 90)))
    monkeypatch.setattr("sys.argv", ["bros-ref", "simulate", "--workload", str(path), "--class", "be", "--policies",
                                     "tgi", "--time-unit-s", unit, "--json", "-"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    assert json.loads(capsys.readouterr().out)["runs"][0]["duration_s"] == pytest.approx(duration_s, abs=0.05)


def test_bench_simulator_reports_cpu_time():
    result = bros_ref("bench", "simulator", "--policies", "bros", "--duration-s", 2, "--file-requests", 40,
                      "--json", "-")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    for row in rows:
        assert row["request_steps"] > 0
        assert row["request_steps_per_s"] == pytest.approx(row["request_steps"] / row["cpu_s"])
        assert row["peak_rss_bytes"] > 1_000_000
    assert [row["model"] for row in rows] == ["opt-13b", "llama-3-8b"]
    assert rows[1]["requests"] == 40, "the trace file's, all of them"


def test_a_model_split_over_two_processes_answers_as_one():
    command = ("generate", "hello", "--model", "random:llama", "--max-tokens", "6", "--json", "-")
    whole, split = bros_ref(*command), bros_ref(*command, "--tp", "2")
    assert whole.returncode == split.returncode == 0, split.stderr
    assert json.loads(split.stdout)["text"] == json.loads(whole.stdout)["text"]


def test_a_model_that_does_not_divide_is_one_line():
    result = bros_ref("generate", "hello", "--model", "random:llama", "--tp", "5")
    assert result.returncode == 2
    assert "tp can be one of" in result.stderr
    assert "Traceback" not in result.stderr
