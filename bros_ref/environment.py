"""What a result was measured on: enough to judge a number later, and to reproduce it.

It reads versions, the CPU and the commit without importing a heavy package. Invariant: the stamp is strict JSON, and
making it never fails; what cannot be found out is None.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[1]


def environment_stamp() -> dict[str, Any]:
    """Python, package versions, CPU, usable cores, GPU (None if no CUDA device is in use), commit and date (UTC)."""
    return {
        "python": platform.python_version(),
        "bros_ref": _version("bros-ref"),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "platform": platform.platform(),
        "cpu_model": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _gpu_name(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def compute_device(wanted: str = "auto") -> str:
    """Where a live run computes, "cpu" or "cuda". "auto" is what the variable BROS_REF_DEVICE says (auto, cpu, cuda),
    and without it a GPU if there is one.

    Raises:
        ValueError: another name, or cuda where torch finds no CUDA device: a CPU must not pass for a GPU.
    """
    import torch

    source = "--device"
    if wanted == "auto":
        wanted, source = os.environ.get("BROS_REF_DEVICE", "auto"), "BROS_REF_DEVICE"
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{source} must be auto, cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{source} is cuda, but torch finds no CUDA device; use cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def available_memory_bytes() -> int:
    """Host memory that can be taken without swapping: what the machine has free, or less where a cgroup (a container)
    allows less. Where the system does not tell, 4 GiB."""
    free = [_kilobytes("/proc/meminfo", "MemAvailable")]
    for limit, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
                        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes")):
        try:
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return max(0, min((value for value in free if value is not None), default=4 << 30))


def _kilobytes(path: str, field: str) -> int | None:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _version(package: str) -> str | None:
    """The installed version, without importing the package: torch alone would take seconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str | None:
    """The processor's name, as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _gpu_name() -> str | None:
    """The CUDA device, if this process has already loaded torch; a simulated run must not start to."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_available() else None


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with "+" if tracked files differ from it."""
    if not (_REPOSITORY / ".git").exists():
        return None  # an installed copy: the commit of whatever repository surrounds it would be wrong
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "--no-optional-locks", "-C", str(_REPOSITORY), *arguments],
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
