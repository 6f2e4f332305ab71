"""Writing files and keeping caches. All files are written here, so that every output is written the same way.

Invariant: a file is written whole or not at all. The new content goes to a file beside the old one, reaches the disk,
and then takes the old one's name in one step, so a full disk or an interrupt leaves what was there before.
"""

from __future__ import annotations

import errno
import gzip
import logging
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8, gzipped if the name ends in `.gz`; no time stamp inside, so equal text gives equal bytes.

    A lone surrogate, which UTF-8 cannot carry, is written as its escape, such as `\\ud800`.

    Raises:
        OSError: as for `write_bytes`.
    """
    data = text.encode("utf-8", "backslashreplace")
    write_bytes(path, gzip.compress(data, compresslevel=6, mtime=0) if Path(path).suffix == ".gz" else data)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Writes a file whole, or leaves what was there. A link keeps pointing where it does, and an old file keeps its
    permissions. A device or a pipe (`/dev/stdout`) holds nothing to keep, so it is written directly.

    Raises:
        OSError: it could not be written; the message names the file and says why. Nothing partial is left behind.
    """
    target, mode = Path(os.path.realpath(path)), None
    try:
        with suppress(FileNotFoundError):
            mode = target.stat().st_mode
        if mode is None or stat.S_ISREG(mode):
            if mode is not None and not os.access(target, os.W_OK):  # a rename would not ask
                raise PermissionError(errno.EACCES, "it is read-only")
            _replace(target, data, mode)
        else:
            Path(path).write_bytes(data)
    except OSError as error:
        kept = "" if mode is None or not stat.S_ISREG(mode) else "; the file that was there is unchanged"
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}{kept}") from error


def _replace(target: Path, data: bytes, mode: int | None) -> None:
    """Writes beside `target`, which must be a regular file or absent, and renames. `mode`: that of the old file."""
    beside = target.parent / f".bros_ref-{secrets.token_hex(8)}.part"
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            if mode is not None:
                os.chmod(beside, stat.S_IMODE(mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the file system can promise that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- the cache --------------------------------------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """Where this package keeps what it measured: `$XDG_CACHE_HOME/bros_ref`, or `~/.cache/bros_ref` where the variable
    is unset, empty or relative (the XDG specification has a relative path ignored). None if there is no home either:
    nothing is ever kept in the working directory. The folder need not exist."""
    for root in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(root):
            return Path(root) / "bros_ref"
    return None


def read_cached(name: str) -> str | None:
    """The text kept under a name; None if it is missing or cannot be read. `keep_cached` reports the reason."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def keep_cached(name: str, text: str) -> None:
    """Keeps a text under a name. Where that is not possible, one line is logged and the caller goes on without."""
    folder = cache_folder()
    if folder is None:
        logger.warning("nothing is cached: neither XDG_CACHE_HOME nor the home folder is an absolute path")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, text)
    except OSError as error:
        logger.warning("nothing is cached in %s: %s", folder, error)
