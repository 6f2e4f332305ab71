"""Basic blocks, and the order in which threads that diverged continue.

Threads stand at the start of a block. Those at the block that comes first in `order` run next, all together; so the
order says where they meet again. It must put every block of a loop before what follows the loop, and in an `if` both
sides before the join, wherever the compiler placed them in the text: a topological order in which every loop is one
piece, and inside a loop the same again without its way back (Bourdoncle's weak topological order).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kernels_cupy.proof.ptx.parser import Function, Instruction, PtxError, Symbol

EXIT = -1


@dataclass(frozen=True)
class Block:
    """Instructions that are executed one after another by the threads that enter.

    Attributes:
        body: all but the one that decides where to go on.
        last: that one, a branch, an exit or a barrier; None where the block runs into the next.
        taken: where `last` leads, a position in the order or EXIT; itself meaningless for barriers.
        following: where threads go that do not leave by `last`.
    """

    body: tuple[Instruction, ...]
    last: Instruction | None
    taken: int
    following: int


def is_branch(opcode: str) -> bool:
    """bra, with or without .uni."""
    return opcode.split(".")[0] == "bra"


def is_exit(opcode: str) -> bool:
    """ret or exit: in an entry function the same."""
    return opcode.split(".")[0] in ("ret", "exit")


def is_barrier(opcode: str) -> bool:
    """A barrier of the thread block, where threads may have to wait."""
    return opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.cta.sync", "barrier.cta.sync",
                      "barrier.cta.sync.aligned")


def blocks_of(function: Function) -> list[Block]:
    """The function's blocks in the order in which waiting threads are taken up; the entry is the first.

    Raises:
        PtxError: a branch to a label that is not there, or the text runs past its end.
    """
    code = function.instructions
    if not code:
        raise PtxError(f"{function.name} has no instructions")
    starts = {0, *function.labels.values()}
    starts |= {i + 1 for i, one in enumerate(code)
               if is_branch(one.opcode) or is_exit(one.opcode) or is_barrier(one.opcode)}
    firsts = sorted(start for start in starts if start < len(code))
    ends = [*firsts[1:], len(code)]
    number = {first: i for i, first in enumerate(firsts)}
    ways = [_ways(function, code[end - 1], end, number) for end in ends]
    targets = {i: {way for way in pair if way != EXIT} for i, pair in enumerate(ways)}
    order = _order(_reachable(targets), targets, 0)
    place = {block: i for i, block in enumerate(order)} | {EXIT: EXIT}
    found = []
    for block in order:
        last = code[ends[block] - 1]
        leaves = is_branch(last.opcode) or is_exit(last.opcode) or is_barrier(last.opcode)
        taken, following = ways[block]
        found.append(Block(tuple(code[firsts[block]:ends[block] - leaves]), last if leaves else None, place[taken],
                           place[following]))
    return found


def _ways(function: Function, last: Instruction, end: int, number: dict[int, int]) -> tuple[int, int]:
    """(taken, following) of a block that ends with `last`, before instruction `end`."""
    following = number.get(end, EXIT)
    if following == EXIT and not (last.guard is None and (is_branch(last.opcode) or is_exit(last.opcode))):
        raise PtxError(f"PTX line {last.line}: {function.name} runs past its last instruction")
    if is_exit(last.opcode):
        return EXIT, EXIT if last.guard is None else following
    if not is_branch(last.opcode):
        return following, following
    target = last.operands[0] if last.operands else None
    if not isinstance(target, Symbol) or target.name not in function.labels:
        raise PtxError(f"PTX line {last.line}: {last.opcode} to a label that is not there")
    taken = number.get(function.labels[target.name], EXIT)
    return taken, taken if last.guard is None else following


def _reachable(ways: dict[int, set[int]]) -> set[int]:
    seen, left = {0}, [0]
    while left:
        new = ways[left.pop()] - seen
        seen |= new
        left += new
    return seen


def _order(blocks: Collection[int], ways: dict[int, set[int]], entry: int) -> list[int]:
    """Every loop in one piece, what follows it after it; inside a loop the same without the ways to its head."""
    found: list[int] = []
    for component in reversed(_components(blocks, ways, entry)):
        if len(component) == 1:
            found += component
            continue
        inside = set(component)
        outside = {way for block in blocks if block not in inside for way in ways[block]}
        head = min((block for block in component if block in outside or block == entry), default=min(component))
        rest = inside - {head}
        within = {block: (ways[block] & inside) - {head} for block in rest}
        first = min((way for way in ways[head] if way in rest), default=min(rest))
        found += [head, *_order(rest, within, first)]
    return found


def _components(blocks: Collection[int], ways: dict[int, set[int]], entry: int) -> list[list[int]]:
    """Strongly connected components (Tarjan), each after all that it leads to. Without recursion."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []
    for root in [entry, *sorted(set(blocks) - {entry})]:
        if root in index:
            continue
        work = [(root, iter(sorted(ways[root], reverse=True)))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            block, left = work[-1]
            if (way := next(left, None)) is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[block])
                if low[block] == index[block]:
                    found.append(stack[stack.index(block):])
                    del stack[stack.index(block):]
            elif way not in index:
                index[way] = low[way] = len(index)
                stack.append(way)
                work.append((way, iter(sorted(ways[way], reverse=True))))
            elif way in stack:
                low[block] = min(low[block], index[way])
    return found
