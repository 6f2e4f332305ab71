"""The command `kernels`: compiles every kernel for every architecture, runs its text emulated and its PTX interpreted
against the contract, prints the ladder, tries the seeded defects. It measures no time: no GPU figure comes from here
without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bros_ref.cli.common import (
    JsonOption,
    KvDtypeOption,
    SeedOption,
    app,
    bench_app,
    make_console,
    progress,
    write_json,
)
from bros_ref.cli.tables import gpu_step_table, kernel_times_table, kernels_table
from bros_ref.files import write_text

BEGIN, END = "<!-- ladder: written by `bros-ref kernels --write-readme` -->", "<!-- end of the ladder -->"
QUICK_ARCHITECTURES = (80, 90)
SHAPES = ("float16/64", "float16/80", "float16/96", "float16/256", "bfloat16/128", "float32/128")  # beside the ladder's
LADDER_ARCHITECTURE = 90


@dataclass(frozen=True)
class KernelRow:
    """One kernel for one architecture: the keys of the result JSON. None: not counted for this one.

    Attributes:
        name: the idea; `step` is the rung's own name, with the cache if that is fp8.
        dtype, cache: of queries and outputs; of K and V in the cache.
        max_error: the larger of both executions' errors against float64, that of the emulated text and `ptx_error`.
        verified: both are within the contract.
        sectors_over_minimum, reversed_sectors_over_minimum: memory sectors read, of the fewest possible.
        warp_instructions_per_kib: executed per KiB of K and V, moves left out; `with_moves_per_kib` counts them.
        main_loop_*: of the main loop's machine code.
        direction_overhead: executed instructions more than with one direction known when compiling, a fraction.
        issue_cap_estimate: GPU -> the share of its DRAM bandwidth at which issuing would limit.
        measured_on_gpu: always None here: nothing is timed.
    """

    name: str
    step: str
    dtype: str
    cache: str
    head_dim: int
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    max_error: float
    ptx_error: float
    verified: bool
    sectors_over_minimum: float | None
    reversed_sectors_over_minimum: float | None
    warp_instructions_per_kib: float | None
    with_moves_per_kib: float | None
    main_loop_instructions_per_kib: float | None
    direction_overhead: float | None
    worst_bank_conflict: int | None
    mma_instructions: int | None
    mma_feeding_share: float | None
    mma_per_shared_kib: float | None
    main_loop_feeding_share: float | None
    issue_cap_estimate: dict[str, float] | None
    measured_on_gpu: None = None


@app.command()
def kernels(quick: Annotated[bool, typer.Option(help="sm_80 and sm_90 only, no seeded defects.")] = False,
            write_readme: Annotated[bool, typer.Option(help="Rewrite the ladder in kernels_cupy/README.md.")] = False,
            seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """Proves the CUDA kernels without a GPU: compiled, emulated and their PTX run against float64, mutated."""
    import kernels_cupy
    from kernels_cupy.proof.compile import ARCHITECTURES, why_unavailable
    from kernels_cupy.proof.static_report import LADDER

    if reason := why_unavailable():
        raise ValueError(reason)
    console = make_console(json_path)
    architectures = QUICK_ARCHITECTURES if quick else ARCHITECTURES
    jobs = [(rung, "float16", 128, fp8, architectures) for fp8 in (False, True) for rung in LADDER]
    jobs += [(rung, *_shape(shape), fp8, QUICK_ARCHITECTURES) for rung in LADDER
             for shape in ([] if quick else SHAPES) for fp8 in (False, True)]
    with progress(console, "compiling, emulating", len(jobs)) as advance:
        rows = [row for job in jobs for row in _rows(*job, seed, advance)]
    mutations = None if quick else _mutations(console)
    console.print(kernels_table([vars(row) for row in rows]))
    console.print("Instr / KiB: warp instructions of its PTX that a whole kernel executed, moves left out, per KiB of "
                  "K and V. Loop: those of the main loop's machine code. Direction: executed instructions more than "
                  "with one direction known when compiling. On a GPU: not measured here.")
    if mutations is not None:
        console.print(f"Seeded defects: {mutations['seeded']}, flagged by the check that was named beforehand: "
                      f"{mutations['flagged']}; beside them {len(mutations['equivalent'])} that change nothing.")
    if write_readme:
        path = Path(kernels_cupy.__file__).parent / "README.md"
        write_text(path, with_ladder(path.read_text(encoding="utf-8"), rows))
    write_json(json_path, "kernels", seed, kernels=[asdict(row) for row in rows], mutations=mutations)
    if not all(row.verified and row.spill_bytes == 0 for row in rows):
        raise typer.Exit(1)


@bench_app.command("kernels")
def bench_kernels_command(head_dim: Annotated[int, typer.Option(min=16, max=256)] = 128,
                          dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
                          kv_dtype: KvDtypeOption = "auto", seed: SeedOption = 0, json_path: JsonOption = None) -> None:
    """Times every decode step on a GPU, against torch; without one it says so, and measures nothing."""
    import torch

    from bros_ref.engine.kv_dtype import storage_dtype
    from bros_ref.evaluation.bench.kernels import CASES, GraphTimer, bench_kernels, copy_bandwidth
    from kernels_cupy.gpu import CupyDevice, why_unavailable
    from kernels_cupy.heads import SCALARS, Heads
    from kernels_cupy.launch import STEPS, Problem, why_not

    console = make_console(json_path)
    known = {str(one).removeprefix("torch."): one for one in SCALARS}
    if dtype not in known:
        raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(known)}")
    cache_dtype = storage_dtype(kv_dtype, known[dtype])
    if reason := why_unavailable():
        console.print(f"not measured here: {reason}")
        write_json(json_path, "bench kernels", seed, rows=[], not_measured=reason)
        return
    device, timer, heads = CupyDevice(), GraphTimer(), Heads(32, 8, head_dim, 16, known[dtype], cache_dtype)
    longest = max(max(case.context_lens) for case in CASES) // heads.block_size
    steps = [step for step in STEPS if why_not(step, Problem(heads, 1, longest), device.gpu) is None]
    bandwidth = copy_bandwidth(timer, "cuda")
    with progress(console, "kernels", len(CASES) * (len(steps) + 1)) as advance:
        rows = bench_kernels(device, timer, heads, seed, "cuda", bandwidth, steps=steps,
                             on_row=lambda: advance(1))
    console.print(kernel_times_table(rows, torch.cuda.get_device_name()))
    write_json(json_path, "bench kernels", seed, rows=rows, copy_bandwidth=bandwidth, cuda=torch.version.cuda,
               not_measured=None)


@bench_app.command("gpu-step")
def bench_gpu_step(model: Annotated[str, typer.Option(help="A model of Llama's kind, as `simulate` names it.")]
                   = "llama-3-8b", gpus: Annotated[str, typer.Option(help="Comma-separated.")] = "h100-80gb,a100-80gb",
                   batches: Annotated[str, typer.Option(help="Sequences, comma-separated.")] = "1,32",
                   context: Annotated[int, typer.Option(min=2, max=1 << 17, help="Tokens of each sequence.")] = 1024,
                   json_path: JsonOption = None) -> None:
    """Counts what a decode step asks of a GPU, without one, and estimates the time that it would take."""
    from bros_ref.evaluation.bench.gpu_step import estimate_steps

    console = make_console(json_path)
    if not all(size.strip().isdecimal() and 0 < int(size) <= 1024 for size in batches.split(",")):
        raise ValueError(f"--batches needs numbers from 1 to 1024 separated by commas, got {batches!r}")
    rows = estimate_steps(model, gpus.split(","), [int(size) for size in batches.split(",")], context)
    console.print(gpu_step_table([asdict(row) for row in rows]))
    console.print("Kernels, uploads, waits and allocations are counted: the engine's own code ran on tensors without "
                  "memory. Times are estimates from published rates and assumed overheads, not measurements.")
    write_json(json_path, "bench gpu-step", 0, rows=[asdict(row) for row in rows])


def ladder_rows(seed: int, advance: Callable[[int], None] = lambda _: None) -> list[KernelRow]:
    """The rows that the README's ladder shows: fp16, head_dim 128, one architecture, a cache of fp16 and then fp8."""
    from kernels_cupy.proof.static_report import LADDER

    return [row for fp8 in (False, True) for rung in LADDER
            for row in _rows(rung, "float16", 128, fp8, (LADDER_ARCHITECTURE,), seed, advance)]


def with_ladder(readme: str, rows: list[KernelRow]) -> str:
    """The README's text with the table between its markers rewritten from rows.

    Raises:
        ValueError: the markers are not there.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(readme):
        raise ValueError(f"kernels_cupy/README.md has no {BEGIN} ... {END}")
    header = ("| step | idea | sectors / minimum | warp instructions per KiB, executed | main loop, machine code | "
              "registers | worst bank conflict | direction, instructions | mma per KiB of shared memory | "
              "issuing would limit at, of DRAM (A100, H100; estimate) | on a GPU |")
    lines = [header, "|" + "---|" * 11]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows
              if (row.dtype, row.head_dim, row.arch) == ("float16", 128, f"sm_{LADDER_ARCHITECTURE}")]
    return pattern.sub(lambda _: "\n".join([BEGIN, *lines, END]), readme)


def _cells(row: KernelRow) -> list[str]:
    caps = row.issue_cap_estimate
    return [row.step, row.name, _number(row.sectors_over_minimum, ".2f"),
            _number(row.warp_instructions_per_kib, ".0f"), _number(row.main_loop_instructions_per_kib, ".0f"),
            str(row.registers), _number(row.worst_bank_conflict, "d"), _number(row.direction_overhead, "+.1%"),
            _number(row.mma_per_shared_kib, ".1f"), "-" if caps is None else ", ".join(map(_cap, caps.values())),
            "not measured here"]


def _cap(share: float) -> str:
    return f"{share:.0%}" if share < 1 else "not the limit"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _shape(text: str) -> tuple[str, int]:
    dtype, _, head_dim = text.partition("/")
    return dtype, int(head_dim)


def _rows(rung: Any, dtype: str, head_dim: int, fp8: bool, architectures: tuple[int, ...], seed: int,
          advance: Callable[[int], None]) -> list[KernelRow]:
    """One row per architecture; what the emulator counts is the same for all. A row is verified if both executions are
    within the contract: that of the text on the emulator, and that of its PTX."""
    import numpy as np
    import torch

    from kernels_cupy.heads import FP8, Heads
    from kernels_cupy.proof.emulator import Emulator
    from kernels_cupy.proof.ptx import PtxDevice
    from kernels_cupy.proof.static_report import GPUS, compiled, error_of, executed, issue_cap, traffic, verified

    heads = Heads(8, 2, head_dim, 16, getattr(torch, dtype), FP8 if fp8 else None)
    targets = [arch for arch in architectures if rung.supports(heads, arch)]
    if not targets:
        advance(1)
        return []
    error = error_of(rung, heads, np.random.default_rng(seed), Emulator())
    on_ladder = (dtype, head_dim) == ("float16", 128)
    counted = traffic(rung, heads) if on_ladder and not rung.is_prefill else None
    rows = []
    for arch in targets:
        row = compiled(rung, heads, arch)
        loop, run = row.loop, executed(rung, heads, arch) if on_ladder else None
        per_kib = loop.per_kib if loop else None
        ptx_error = error_of(rung, heads, np.random.default_rng(seed), PtxDevice(arch))
        rows.append(KernelRow(
            name=rung.fp8 if fp8 else rung.idea, step=rung.name + ", fp8 cache" * fp8, dtype=dtype,
            cache=str(heads.cache_dtype).removeprefix("torch."), head_dim=head_dim, arch=f"sm_{arch}",
            registers=row.used.registers, spill_bytes=row.used.spill_bytes, shared_bytes=row.used.shared_bytes,
            occupancy=row.occupancy, max_error=max(error, ptx_error), ptx_error=ptx_error,
            verified=verified(error, heads) and verified(ptx_error, heads),
            sectors_over_minimum=counted.sectors_over_minimum if counted else None,
            reversed_sectors_over_minimum=counted.reversed_sectors_over_minimum if counted else None,
            warp_instructions_per_kib=run.per_kib if run else None,
            with_moves_per_kib=run.with_moves_per_kib if run else None,
            main_loop_instructions_per_kib=per_kib,
            direction_overhead=run.direction_overhead if run else None,
            worst_bank_conflict=counted.worst_bank_conflict if counted else None,
            mma_instructions=loop.multiplications if loop else None,
            mma_feeding_share=run.feeding_share if run else None,
            mma_per_shared_kib=run.mma_per_shared_kib if run else None,
            main_loop_feeding_share=loop.feeding_share if loop else None,
            issue_cap_estimate={gpu: issue_cap(per_kib, gpu) for gpu in GPUS}
            if per_kib is not None and not rung.is_prefill else None))
    advance(1)
    return rows


def _mutations(console: Any) -> dict[str, Any]:
    """Runs every seeded defect; a survivor that is not listed as equivalent is not counted as flagged."""
    from kernels_cupy.proof.mutations import EQUIVALENT, MUTANTS, outcome

    with progress(console, "seeded defects", len(MUTANTS)) as advance:
        flagged = 0
        for mutant in MUTANTS:
            flagged += outcome(mutant) == mutant.flagged
            advance(1)
    return {"seeded": len(MUTANTS), "flagged": flagged,
            "equivalent": [{"kernel": mutant.run, "change": f"{mutant.old.strip()} -> {mutant.new.strip()}",
                            "reason": reason} for mutant, reason in EQUIVALENT]}
