"""Mutation testing of the scheduling and accounting code: a seeded sample of mutants, the score, and the survivors.

    python tools/mutation.py --mutants 200 --seed 1

`[tool.mutmut]` in pyproject.toml lists the files and the tests; mutmut creates about 3,500 mutants of these files.
Trying all takes a night, so a sample is drawn: the first mutants in the order of a hash of seed and name. The same
sources and seed give the same sample, and most of it stays the same when a few functions change. A mutant counts as
killed if a test fails, or if the tests do not end within a multiple of their usual time. The score is killed / tried,
with the Wilson interval at 95 %. The exit status is 1 if the score is below `--at-least`.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST = "bros_ref.scheduler.queues.x_by_class_and_arrival__mutmut_1"  # any one: mutmut lists mutants only after a run
FIXED = {"LIVES_SEED": "0", "LIVES_SECONDS": "0", "OMP_NUM_THREADS": "1"}  # the same random lives for every mutant


def mutmut(*arguments: str, shown: bool = False) -> str:
    """Runs mutmut in the root of the project; returns what it printed, or shows it as it comes."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **FIXED}, text=True, check=False,
                          stdout=None if shown else subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:4])} ... failed with exit status {done.returncode}\n{done.stdout or ''}")
    return done.stdout or ""


def outcomes() -> dict[str, str]:
    """Every mutant's name and its outcome: "killed", "survived", "timeout", ..., "not checked"."""
    return dict(re.findall(r"^ +(\S+): (.+)$", mutmut("results", "--all", "true"), re.MULTILINE))


def wilson(killed: int, tried: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z, share = 1.96, killed / tried
    middle, spread = share + z * z / (2 * tried), z * math.sqrt(share * (1 - share) / tried + (z / (2 * tried)) ** 2)
    return (middle - spread) / (1 + z * z / tried), (middle + spread) / (1 + z * z / tried)


def main() -> int:
    """Draws and runs the sample and reports; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mutants", type=int, default=200, help="size of the sample; 0 tries all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--children", type=int, default=2, help="mutants at a time")
    parser.add_argument("--at-least", type=float, default=0.9, help="the least score")
    asked = parser.parse_args()
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)
    mutmut("run", FIRST, shown=True)
    names = sorted(outcomes())
    size = min(asked.mutants or len(names), len(names))
    sample = sorted(names, key=lambda name: hashlib.sha256(f"{asked.seed} {name}".encode()).digest())[:size]
    print(f"{size} of {len(names)} mutants, seed {asked.seed}", flush=True)
    mutmut("run", "--max-children", str(asked.children), *sample, shown=True)
    became = {name: what for name, what in outcomes().items() if name in set(sample)}
    for name in sorted(name for name, what in became.items() if what not in ("killed", "timeout")):
        print(mutmut("show", name))
    for name in sorted(name for name, what in became.items() if what == "timeout"):
        print(f"stopped at the time limit: {name}")  # it never ends, or the machine was too busy: check by hand
    counts = Counter(became.values())
    killed = counts["killed"] + counts["timeout"]
    low, high = wilson(killed, size)
    print(f"{killed} of {size} killed ({counts['timeout']} of them by the time limit): {killed / size:.1%}, "
          f"95 % interval {low:.1%} to {high:.1%}; sample of {len(names)}, seed {asked.seed}; {dict(counts)}")
    return int(killed / size < asked.at_least)


if __name__ == "__main__":
    sys.exit(main())
