"""Shared by the commands: the application, options, the console for tables, progress, the JSON envelope."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bros_ref.cli.interrupts import raise_again
from bros_ref.cli.terminal import printable
from bros_ref.files import write_text

TABLE_WIDTH = 80  # columns, where the output is no terminal

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Serve real-time and best-effort LLM requests on one model, as BROS does (arXiv 2504.09590).")
bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The project's own measurements.")
app.add_typer(bench_app, name="bench")
EXTRA_OF = {"plotly": "viz", "cupy": "gpu"}


def output_file(value: Any) -> Any:
    """Refuses, before any work is done, a file that could not be written afterwards; "-" is standard output."""
    if value is None or str(value) == "-":
        return value
    path = Path(value)
    if str(value) == "" or path.is_dir():
        raise typer.BadParameter(f"{str(value)!r} is no name of a file")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist; make it first")
    if path.exists() and not path.is_file():
        return value  # a pipe or a device: written into, not replaced
    if not os.access(path.resolve().parent, os.W_OK):
        raise typer.BadParameter(f"nothing can be written in {path.resolve().parent}, and a file is written beside the "
                                 "old one first; choose another place")
    if path.exists() and not os.access(path, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written; choose another place")
    return value


def output_folder(value: Path) -> Path:
    """Makes the folder, or refuses before any work is done."""
    try:
        value.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{value} cannot be made a folder ({error.strerror}); choose another place") from None
    if not os.access(value, os.W_OK):
        raise typer.BadParameter(f"nothing can be written in {value}; choose another place")
    return value


JsonOption = Annotated[str | None, typer.Option("--json", metavar="FILE", callback=output_file,
                                                help="Write JSON here; - is stdout.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
ModelOption = Annotated[str, typer.Option(help="smollm2, random:<family>, checksum, a HF folder or a .gguf file.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
BackendOption = Annotated[str, typer.Option(help="Attention: auto, torch, cupy or cpu-emulated.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help=(
    "Threads torch may use; 0: OMP_NUM_THREADS, or as many as are worth it beside the machine's other work."))]
SplitOption = Annotated[int, typer.Option("--tp", min=1, help="Devices of this machine that the model is split over.")]
KvDtypeOption = Annotated[str, typer.Option(
    help="K and V: auto, the model's own dtype; or fp8, 8 bits with a scale for each layer.")]
SlowdownOption = Annotated[float | None, typer.Option(min=1, help=(
    "BROS: BE may make RT latency at most this many times what it would be alone."))]
RefitOption = Annotated[bool, typer.Option("--refit", help="Measure this machine again for the latency model.")]
TtftOption = Annotated[float, typer.Option(help="TTFT target of real-time requests that bring none, seconds.")]
ClassOption = Annotated[str | None, typer.Option("--class", help="rt or be, for files that do not say.")]
TimeUnitOption = Annotated[float | None, typer.Option(
    help="Seconds in one unit of `timestamp`, for files that do not tell: 1 or 0.001.")]
ChunkedOption = Annotated[bool | None, typer.Option(help="Default: as the policy's original does.")]
CountOption = Annotated[int, typer.Option(min=1)]
RequestsOption = Annotated[int | None, typer.Option(min=1, help="Default: half as many by the wall clock.")]
OutOption = Annotated[Path, typer.Option(callback=output_folder,
                                         help="Folder for the report, the traces and the summary.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")]
TpotOption = Annotated[float, typer.Option(help="TPOT target of real-time requests that bring none, seconds.")]


def set_threads(wanted: int) -> None:
    """Sets torch's number of threads as `compute_threads` says; on standard error, if they are fewer than usual."""
    import torch

    from bros_ref.cpu.threads import compute_threads

    usual, chosen = torch.get_num_threads(), compute_threads(wanted)
    if chosen < usual and not wanted:
        say(Console(stderr=True), f"using {chosen} of {usual} threads: more are slower now, because other processes "
            "keep cores busy")
    torch.set_num_threads(chosen)


def parse_policies(names: str) -> list[str]:
    """Names from a comma-separated list. Raises ValueError for an unknown one, or one named twice."""
    from bros_ref.scheduler import known_policies

    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known_policies():
            raise ValueError(f"unknown policy {name!r}; known are {', '.join(known_policies())}")
        if chosen.count(name) > 1:
            raise ValueError(f"policy {name!r} is named twice; its second run would replace the first")
    return chosen


def missing_package(error: ModuleNotFoundError) -> str:
    """What to install for a missing package of an extra. Raises the error again if the package is not of an extra."""
    package = str(error.name).split(".")[0]
    if package not in EXTRA_OF:
        raise error
    return f"{package} is missing; pip install 'bros-ref[{EXTRA_OF[package]}]' brings it"


def make_console(json_path: str | None) -> Console:
    """Where tables go: standard output, unless the JSON goes there. Brackets in a path or an answer are just text.

    A command asks for it when it begins its work; from then on Ctrl-C raises, so that the work can be ended in order.
    """
    raise_again()
    return Console(stderr=json_path == "-", width=None if sys.stdout.isatty() else TABLE_WIDTH, markup=False)


def say(console: Console, text: str, style: str = "") -> None:
    """A line of text, not cut at the console's width; what it quotes cannot steer a terminal."""
    console.print(printable(text, console.file), style=style, soft_wrap=True, highlight=False)


def tell_refusals(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    """How many requests each policy refused, with the first of them: they count as missed."""
    for policy in dict.fromkeys(run["policy"] for run in runs):
        own = [run for run in runs if run["policy"] == policy]
        refused, arrived = (sum(counts[key] for run in own for counts in run["classes"].values())
                            for key in ("refused", "arrived"))
        if refused:
            first = next(counts["first_refusal"] for run in own for counts in run["classes"].values()
                         if counts["refused"])
            say(console, f"{policy}: refused {refused:,} of {arrived:,} requests, the first {first}", "yellow")


@contextmanager
def progress(console: Console, label: str, total: float) -> Iterator[Any]:
    """A bar on standard error; yields a function that advances it. Ctrl-C raises from here on, and ends the bar."""
    raise_again()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
               TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)


def write_json(path: str | None, command: str, seed: int, **parts: Any) -> dict[str, Any]:
    """The envelope of every result; strict JSON."""
    from bros_ref.environment import environment_stamp

    result = {"schema": 1, "command": command, "seed": seed, "environment": environment_stamp(), **parts}
    if path is not None:
        text = json.dumps(result, indent=1, allow_nan=False)
        if path == "-":
            print(text, flush=True)
        else:
            write_text(path, text + "\n")
    return result
