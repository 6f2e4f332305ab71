"""Compiled kernels on disk: files that only their user may have written, because they are loaded and executed."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's file `name`; if it is missing, or another user's, `make(path)` writes it first.

    `make` writes to a path of this process alone, and the file is moved into place when it is complete: processes that
    build the same file at once do not disturb each other.
    """
    path = cache_folder() / name
    if path.is_dir() and not path.is_symlink():
        _say_once(f"{path} is a directory where a compiled kernel belongs; remove it to use the cache again")
        path = _private_folder() / name
    if not _may_be_loaded(path):
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as own:
            made = Path(own) / name
            make(made)
            made.replace(path)
    return path


@cache
def cache_folder() -> Path:
    """bros_ref/emulator in the user's cache folder ($XDG_CACHE_HOME or ~/.cache), readable by the user alone; a
    temporary folder of this process, and one line of warning, where that cannot be had."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if not base.is_absolute():  # unset, empty, or relative, which the XDG specification says to ignore
            base = Path("~/.cache").expanduser()
        folder = base / "bros_ref" / "emulator"
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_ours(folder.stat()):
            raise PermissionError(f"{folder} belongs to another user")
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        _say_once(f"compiled kernels are not kept, as the user's cache folder cannot be used: {error}")
        return _private_folder()


@cache
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="bros_ref-emulator-"))


def _may_be_loaded(path: Path) -> bool:
    """Whether the file is there, is no link, and only this user (and their group) may have written it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and _is_ours(found) and not found.st_mode & stat.S_IWOTH


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.getuid()


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
