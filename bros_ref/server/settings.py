"""What a server is started with, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from bros_ref.request import SLO

MAX_UPLOAD_BYTES = 200 * 1024 * 1024  # OpenAI's limits for a batch input file
MAX_BATCH_LINES = 50_000
FORM_OVERHEAD_BYTES = 64 * 1024  # boundaries and fields around an uploaded file
MAX_BODY_BYTES = 4 * 1024 * 1024  # of every other request
MAX_HEADER_BYTES = 32 * 1024
MAX_CHOICES = 16  # `n` times prompts of one call
MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class ServerSettings:
    """Addresses, limits and targets.

    Attributes:
        slo: for real-time requests without targets of their own.
        data_dir: where files and batches live.
        api_keys: accepted keys; none means that no key is asked for, which only a loopback address allows.
        max_queued_rt, max_queued_be: requests of a class that may wait for their first token, beyond which 503 or 429
            is answered.
        max_http_requests: answers that may be in progress at once, streams included; beyond it 503.
        max_buffered_pieces: pieces of text that a client may leave unread before its request is aborted.
        batch_lines_in_flight: lines of batches that are in the engine at once.
        reject_late: refuse a real-time request at once whose TTFT target the latency model says is out of reach.
        drain_s: the most seconds a shutdown waits for real-time requests.

    Raises:
        ValueError: a limit below 1, an API key that is too short, or an address others can reach without a key.
    """

    model_id: str = "smollm2"
    slo: SLO = field(default_factory=lambda: SLO(1.0, 0.25))
    host: str = "127.0.0.1"
    port: int = 8000
    data_dir: Path = Path("bros-ref-data")
    api_keys: tuple[str, ...] = ()
    max_queued_rt: int = 256
    max_queued_be: int = 256
    max_http_requests: int = 1024
    max_buffered_pieces: int = 4096
    batch_lines_in_flight: int = 16
    reject_late: bool = False
    drain_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("max_queued_rt", "max_queued_be", "max_http_requests", "max_buffered_pieces",
                     "batch_lines_in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port must lie in 0 to 65535, got {self.port}")
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(f"--host {self.host} can be reached from other machines, so --api-key-file is needed; "
                             "without one use 127.0.0.1")
        for key in self.api_keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"every API key needs at least {MIN_KEY_LENGTH} printable ASCII characters and no "
                                 "space; make one with: openssl rand -hex 24")

    def owner_of(self, authorization: str | None) -> str | None:
        """Who sent a request: a name derived from its key, "local" where no keys are in use, None for a wrong key.
        All keys are compared, each in constant time, so the answer's timing tells nothing."""
        if not self.api_keys:
            return "local"
        scheme, _, given = (authorization or "").partition(" ")
        found = None
        for key in self.api_keys:
            if hmac.compare_digest(key.encode(), given.strip().encode("utf-8", "replace")):
                found = hashlib.sha256(key.encode()).hexdigest()[:24]
        return found if scheme.lower() == "bearer" else None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Keys from a file, one on each line; empty lines and lines that begin with # are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no key, or is not text.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file; write one API key on each line") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{path} holds no API key; write one on each line")
    return keys
