"""What can be known about a kernel's speed without a GPU, exactly: registers, spills, occupancy, instructions, sectors,
bank conflicts, the cost of directions. And one estimate, labelled as such: when instruction issue would be the limit.

It compiles (compile.py), reads machine code, and counts what runs on the emulator and on the PTX interpreter. It
measures no time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kernels_cupy.device import FOLDER, Device, Gpu, Kernel, cdiv
from kernels_cupy.heads import Heads
from kernels_cupy.launch import DECODE_STEPS, Problem, why_not
from kernels_cupy.launch_prefill import PLAIN, TENSOR_CORES, prefill_launch, why_not_1
from kernels_cupy.proof.compile import Resources, compile_cubin, machine_code, resources
from kernels_cupy.proof.contract import TOLERANCE, Batch, decode, prefill
from kernels_cupy.proof.emulator import Emulator
from kernels_cupy.proof.ptx import PtxCounters, PtxDevice
from kernels_cupy.tensor_core_shapes import Shape

WARP = 32
# Threads and thread blocks that a multiprocessor holds, by compute capability (CUDA programming guide, table of
# technical specifications); all have 65,536 registers.
LIMITS = {75: (1024, 16), 80: (2048, 32), 86: (1536, 16), 89: (1536, 24), 90: (2048, 32), 100: (2048, 32),
          103: (2048, 32), 120: (1536, 24)}
CONTEXT = 2048  # tokens that a decode is judged at
REGISTERS, REGISTER_UNIT = 65_536, 256  # registers are given to warps in units of 256
# Multiprocessors, boost clock, DRAM bandwidth (data sheets of the SXM cards); four warp instructions a clock.
GPUS = {"A100": (108, 1.41e9, 2.039e12), "H100": (132, 1.755e9, 3.35e12)}
ISSUES_PER_CLOCK = 4
FEEDING = ("tensor core", "matrix load", "asynchronous copy", "packing")  # classes of ptx/device.py


@dataclass(frozen=True)
class Rung:
    """One kernel of the ladder.

    Attributes:
        name: "0" to "5" for decode steps, "prefill 0", "prefill 1".
        idea: what is new in it, in a few words.
        load: the instruction that loads K and V, 16 bytes per lane, whose count says how much of them one iteration of
            the main loop reads; empty where loops nest and no single iteration can be counted.
        fp8: what is different with an fp8 cache; empty where the launcher refuses one.
    """

    name: str
    file: str
    idea: str
    load: str = ""
    fp8: str = ""

    @property
    def function(self) -> str:
        return "prefill_attention" if self.is_prefill else "paged_attention"

    @property
    def is_prefill(self) -> bool:
        return self.name.startswith("prefill")

    @property
    def tensor_cores(self) -> bool:
        return self.file == TENSOR_CORES

    def supports(self, heads: Heads, arch: int) -> bool:
        """Whether the launcher would launch it for these sizes, contexts of CONTEXT tokens, on this architecture."""
        if self.is_prefill:
            return not self.tensor_cores or why_not_1(heads, Gpu.of(arch)) is None
        return why_not(int(self.name), _problem(heads), Gpu.of(arch)) is None


LADDER = (
    Rung("0", DECODE_STEPS[0].file, "one thread per head"),
    Rung("1", DECODE_STEPS[1].file, "one warp per head"),
    Rung("2", DECODE_STEPS[2].file, "one block per head, two passes"),
    Rung("3", DECODE_STEPS[3].file, "split-KV, 16-byte loads, the group in registers", "LDG",
         "8-byte loads, decoded in registers"),
    Rung("4", DECODE_STEPS[4].file, "tensor cores, a cp.async ring, swizzled tiles", "LDGSTS"),
    Rung("5", DECODE_STEPS[5].file, "an even share of all tiles for every warp, heads as N", "LDGSTS",
         "operands decoded after ldmatrix"),
    Rung("prefill 0", PLAIN, "one warp per query row, any dtype", fp8="decoded byte by byte"),
    Rung("prefill 1", TENSOR_CORES, "32 query rows a warp on tensor cores", "LDGSTS",
         "operands decoded after ldmatrix"),
)


@dataclass(frozen=True)
class MainLoop:
    """The shortest way around the loop that brings all its K and V and does all its multiplications.

    Attributes:
        instructions: a warp's instructions on it.
        kib: of K and V brought by it, by one warp.
        multiplications: mma instructions; feeding: those and what only serves them (ldmatrix, copies, conversions).
    """

    instructions: int
    kib: float
    multiplications: int
    feeding: int

    @property
    def per_kib(self) -> float | None:
        """Instructions per KiB; None if the loads are in a loop of their own, which this way does not enter."""
        return self.instructions / self.kib if self.kib else None

    @property
    def feeding_share(self) -> float:
        return self.feeding / self.instructions


def main_loop(instructions: Sequence[str], labels: Mapping[str, int], load: str, load_bytes: int = 16) -> MainLoop:
    """Finds the loop that loads so many bytes per lane ("LDG" or "LDGSTS") and multiplies most, and in it the path with
    the most loads and multiplications, and of those the shortest: what an iteration without rare events executes.
    Parts of it may stand behind its end in the text.

    Raises:
        LookupError: no loop loads anything.
    """
    ways = [[j for j in _successors(text, i, labels) if j < len(instructions)] for i, text in enumerate(instructions)]
    width = str(8 * load_bytes)
    wanted = [_opcode(text).split(".")[0] == load and width in _opcode(text).split(".") for text in instructions]
    products = [_opcode(text).startswith(("HMMA", "FFMA")) for text in instructions]
    loops = [(head, tail, _body(ways, head, tail)) for tail in range(len(ways)) for head in ways[tail] if head <= tail]
    loops = [loop for loop in loops if any(wanted[i] for i in loop[2])]
    if not loops:
        raise LookupError(f"no loop has a {load_bytes}-byte {load}")
    head, tail, body = max(loops, key=lambda loop: (sum(products[i] for i in loop[2]), -len(loop[2])))
    must = {i for i in body if wanted[i] or _opcode(instructions[i]).startswith("HMMA")}
    path = _way_round(ways, body, head, tail, must)
    kinds = Counter(_opcode(instructions[i]).split(".")[0] for i in path)
    feeding = sum(kinds[kind] for kind in ("HMMA", "LDSM", "LDGSTS", "F2FP"))
    return MainLoop(len(path), sum(wanted[i] for i in path) * load_bytes * WARP / 1024, kinds["HMMA"], feeding)


def _body(ways: Sequence[Sequence[int]], head: int, tail: int) -> set[int]:
    """What can be executed between a loop's head and the jump back to it."""
    before: dict[int, list[int]] = {}
    for i, targets in enumerate(ways):
        for j in targets:
            before.setdefault(j, []).append(i)
    body, left = {head, tail}, [tail]
    while left:
        at = left.pop()
        new = [i for i in before.get(at, []) if i not in body] if at != head else []
        body.update(new)
        left += new
    return body


def _way_round(ways: Sequence[Sequence[int]], body: set[int], head: int, tail: int, must: set[int]) -> list[int]:
    """From head to tail, inner loops once: through the most of `must`, and of such ways the shortest."""
    paths: dict[int, tuple[int, int, int | None]] = {}  # to the tail: musts, minus instructions, the next one
    entered, stack = {head}, [(head, iter(ways[head]))]
    while stack:
        at, left = stack[-1]
        if at != tail and (way := next(left, None)) is not None:
            if way in body and way not in entered:
                entered.add(way)
                stack.append((way, iter(ways[way])))
            continue
        stack.pop()
        options = [(paths[j][0], paths[j][1], j) for j in ways[at] if j in paths and at != tail]
        if at == tail:
            paths[at] = (at in must, -1, None)
        elif options:
            musts, length, following = max(options)
            paths[at] = (musts + (at in must), length - 1, following)
    path: list[int] = []
    step: int | None = head
    while step is not None:
        path.append(step)
        step = paths[step][2]
    return path


def _successors(text: str, i: int, labels: Mapping[str, int]) -> list[int]:
    target, conditional = _target(text), text.startswith("@") or ".DIV" in text
    if target is not None:
        jump = [labels[target]] if target in labels else []
        return [i + 1, *jump] if conditional else jump
    return [] if _opcode(text).startswith("EXIT") and not conditional else [i + 1]


def _target(text: str) -> str | None:
    match = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", text)
    return match[1] if match else None


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _problem(heads: Heads) -> Problem:
    return Problem(heads, 1, cdiv(CONTEXT, heads.block_size))


def launch_of(rung: Rung, heads: Heads, arch: int) -> tuple[Kernel, Shape]:
    """The rung's kernel for these sizes and its launch, for a context of CONTEXT tokens, as on a GPU of this kind."""
    if rung.is_prefill:
        return prefill_launch(heads, Gpu.of(arch), 1, 1, rung.tensor_cores)
    step = DECODE_STEPS[int(rung.name)]
    return heads.kernel(step.file, "paged_attention"), step.shape(_problem(heads), 1)


def occupancy(used: Resources, threads: int, dynamic_shared: int, arch: int) -> float:
    """Theoretical occupancy: resident warps over the most a multiprocessor holds, 0 if a block does not fit at all."""
    (max_threads, max_blocks), gpu = LIMITS[arch], Gpu.of(arch)
    warps = cdiv(threads, WARP)
    registers = cdiv(used.registers * WARP, REGISTER_UNIT) * REGISTER_UNIT * warps
    static = used.shared_bytes
    if arch >= 90 and static:  # there a binary counts the system's share in
        static -= gpu.reserved_bytes
    shared = static + dynamic_shared + gpu.reserved_bytes
    blocks = min(max_blocks, max_threads // threads, REGISTERS // registers, gpu.sm_shared_bytes // max(shared, 1))
    return blocks * warps / (max_threads // WARP)


def without_direction(rung: Rung) -> dict[str, str]:
    """The rung's text with every sequence filling from the left, known when compiling: what direction costs is what
    this saves."""
    text = (FOLDER / rung.file).read_text()
    return {rung.file: re.sub(r"reversed\[[\w.]+\]", "0", text)}


@dataclass(frozen=True)
class StaticRow:
    """One kernel compiled for one architecture. `loop` is None where loops nest, and where K and V are loaded 4 bytes
    at a time, as integers are: step 3 with float32 queries and an fp8 cache."""

    cubin: Path
    used: Resources
    occupancy: float
    loop: MainLoop | None


def compiled(rung: Rung, heads: Heads, arch: int) -> StaticRow:
    """Compiles and reads a rung. Raises CompileError."""
    kernel, shape = launch_of(rung, heads, arch)
    cubin = compile_cubin(kernel, arch)
    used = resources(cubin, rung.function)
    load = "LDG" if arch < 80 else rung.load  # sm_75 has no asynchronous copy
    load_bytes = 16 // heads.dtype.itemsize if heads.is_fp8 and rung.load == "LDG" else 16
    loop = main_loop(*machine_code(cubin, rung.function), load, load_bytes) if rung.load and load_bytes > 4 else None
    return StaticRow(cubin, used, occupancy(used, int(np.prod(shape.block)), shape.shared_bytes, arch), loop)


def error_of(rung: Rung, heads: Heads, rng: np.random.Generator, device: Device) -> float:
    """The largest error of a row against float64 on a ragged batch. Raises KernelFault if a check fires."""
    size = heads.block_size
    lengths = [1, size - 1, size, size + 1, int(rng.integers(2 * size, 8 * size))]
    if rung.is_prefill:
        batch = Batch.draw(rng, heads, [1, size - 1, 3, 1, int(rng.integers(1, 2 * size))], lengths)
        return batch.error(prefill(device, batch, rung.tensor_cores))
    batch = Batch.draw(rng, heads, [1] * len(lengths), lengths)
    return batch.error(decode(device, batch, int(rung.name)))


@dataclass(frozen=True)
class Executed:
    """Warp instructions that a whole kernel executed, counted by running its PTX on one reversed sequence.

    Attributes:
        tokens: of the sequence; queries: its new tokens.
        per_kib: of K and V, without moves: between registers or of a constant into one, they are gone once registers
            are given out. None for a prefill, which reads K and V once for many queries.
        with_moves_per_kib: all of them.
        classes: warp instructions by class.
        mma_per_shared_kib: tensor-core instructions (m16n8k16) per KiB that warps store to shared memory and load from
            it; None without tensor cores.
        direction_overhead: how many more (without moves) than the same text executes with one direction known when
            compiling.
    """

    tokens: int
    queries: int
    per_kib: float | None
    with_moves_per_kib: float | None
    classes: Mapping[str, int]
    mma_per_shared_kib: float | None
    direction_overhead: float

    @property
    def feeding_share(self) -> float:
        """Of instructions without moves, those that multiply on tensor cores or bring and make their operands."""
        return sum(self.classes.get(name, 0) for name in FEEDING) / _without_moves(self.classes)


def executed(rung: Rung, heads: Heads, arch: int) -> Executed:
    """Runs a rung's PTX: 2,048 tokens for the steps that have targets, fewer where a thread does much alone."""
    tokens = {"0": 32, "1": 128, "2": 128, "prefill 0": 128, "prefill 1": 512}.get(rung.name, 2048)
    queries = 1 if not rung.is_prefill else 64 if rung.tensor_cores else 8
    batch = Batch.draw(np.random.default_rng(0), heads, [queries], [tokens], [True])
    plain = Batch.draw(np.random.default_rng(0), heads, [queries], [tokens], [False])

    def run(one: Batch, sources: Mapping[str, str] | None) -> PtxCounters:
        device = PtxDevice(arch, counters=True, sources=sources)
        if rung.is_prefill:
            prefill(device, one, rung.tensor_cores)
        else:
            decode(device, one, int(rung.name), 1, num_sms=1)
        assert device.counters is not None
        return device.counters

    counters = run(batch, None)
    classes, base = counters.classes(), run(plain, without_direction(rung)).classes()
    kib = tokens * heads.token_bytes / 1024
    return Executed(tokens, queries, None if rung.is_prefill else _without_moves(classes) / kib,
                    None if rung.is_prefill else counters.instructions / kib, classes, _mma_per_shared_kib(counters),
                    _without_moves(classes) / _without_moves(base) - 1)


def _mma_per_shared_kib(counters: PtxCounters) -> float | None:
    products = counters.classes().get("tensor core")
    copied = sum(one.bytes for one in counters.traffic if one.opcode.startswith("cp.async"))
    return products and products / ((counters.total("bytes", "shared") + copied) / 1024)


def _without_moves(classes: Mapping[str, int]) -> int:
    return sum(count for name, count in classes.items() if name != "move")


@dataclass(frozen=True)
class Traffic:
    """Counted on the emulator, decode only: sectors loaded over what K and V fill, forward and reversed; the worst
    bank conflict of an access that the main loop makes (1 is none, 0 no shared memory)."""

    sectors_over_minimum: float
    reversed_sectors_over_minimum: float
    worst_bank_conflict: int


def traffic(rung: Rung, heads: Heads, tokens: int = 2048) -> Traffic:
    """One sequence of `tokens`, and of half as many: what is executed more often by the longer is the main loop."""
    def run(length: int, flip: bool) -> Emulator:
        device = Emulator(counters=True)
        decode(device, Batch.draw(np.random.default_rng(0), heads, [1], [length], [flip]), int(rung.name), 1, num_sms=1)
        return device

    short, long, flipped = (run(length, flip).counters for length, flip in ((tokens // 2, False), (tokens, False),
                                                                            (tokens, True)))
    assert short is not None and long is not None and flipped is not None  # noqa: PT018
    before = {(str(site.line), site.kind): site.requests for site in short.sites}
    in_loop = [site.worst_conflict for site in long.sites
               if site.space == "shared" and site.requests > before.get((str(site.line), site.kind), 0)]
    minimum = tokens * heads.token_bytes / 32
    return Traffic(long.total("sectors", "global", "load") / minimum,
                   flipped.total("sectors", "global", "load") / minimum, max(in_loop, default=0))


def issue_cap(per_kib: float, gpu: str) -> float:
    """An estimate: the share of DRAM bandwidth at which issuing instructions would become the limit, if every
    scheduler issued one per clock at boost. Above 1, something else limits."""
    sms, clock, bandwidth = GPUS[gpu]
    return sms * clock * ISSUES_PER_CLOCK / per_kib * 1024 / bandwidth


def verified(error: float, heads: Heads) -> bool:
    """Whether an error is within the contract; NaN is not."""
    return error <= TOLERANCE[heads.dtype]
