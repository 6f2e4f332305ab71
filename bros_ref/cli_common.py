"""What the commands share: the application, options, tables' console, progress, the JSON envelope."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Serve real-time and best-effort LLM requests on one model, as BROS does (arXiv 2504.09590).")
bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The project's own measurements.")
app.add_typer(bench_app, name="bench")

JsonOption = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON here; - is stdout.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
ModelOption = Annotated[str, typer.Option(help="smollm2, random:<family>, checksum, a HF folder or a .gguf file.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
BackendOption = Annotated[str, typer.Option(help="Attention: auto, torch, cupy or cpu-emulated.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="Threads torch may use; 0: as torch chooses.")]
RefitOption = Annotated[bool, typer.Option("--refit", help="Measure this machine again for the latency model.")]
TtftOption = Annotated[float, typer.Option(help="TTFT target of real-time requests that bring none, seconds.")]
ClassOption = Annotated[str | None, typer.Option("--class", help="rt or be, for files that do not say.")]
ChunkedOption = Annotated[bool | None, typer.Option(help="Default: as the policy's original does.")]
CountOption = Annotated[int, typer.Option(min=1)]
OutOption = Annotated[Path, typer.Option(help="Folder for the report, the traces and the summary.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")]
TpotOption = Annotated[float, typer.Option(help="TPOT target of real-time requests that bring none, seconds.")]


def parse_policies(names: str) -> list[str]:
    """Names from a comma-separated list. Raises ValueError for an unknown one."""
    from bros_ref.scheduler import known_policies

    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known_policies():
            raise ValueError(f"unknown policy {name!r}; known are {', '.join(known_policies())}")
    return chosen


def make_console(json_path: str | None) -> Console:
    """Where tables go: standard output, unless the JSON goes there."""
    return Console(stderr=json_path == "-", width=None if sys.stdout.isatty() else 140)


@contextmanager
def progress(console: Console, label: str, total: float) -> Iterator[Any]:
    """A bar on standard error; yields a function that advances it."""
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
            print(text)
        else:
            Path(path).write_text(text + "\n", encoding="utf-8")
    return result
