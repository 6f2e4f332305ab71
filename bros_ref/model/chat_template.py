"""Chat templates, rendered as transformers renders them, in a separate process.

A checkpoint's template is untrusted code. Jinja's sandbox keeps it from the interpreter's internals, but not from
looping for hours or building terabytes, and a list of what to forbid would never be complete. So the templates of all
tokenizers are rendered in one child process with limits of the operating system: any template ends within CPU_SECONDS
and MEMORY_BYTES, and after one that exceeds them the next request starts a new child. A render costs one exchange over
a pipe.

This file is also the child's program; that is why it imports nothing of the package.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 1.0  # of one render; a long conversation takes milliseconds
MEMORY_BYTES = 1 << 29  # of the child, the interpreter included
MAX_CHARACTERS = 1 << 24  # of one rendered conversation


class TemplateFailedError(ValueError):
    """A template raised, ran too long or took too much memory. The message is one line."""


class TemplateRenderer:
    """The parent's side: starts the child when first asked, and again after a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0  # the process that may use the pipes: a fork must not share them

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The template's text. `variables` must be serialisable as JSON.

        Raises:
            TemplateFailedError: the template or the variables are at fault.
        """
        try:
            request = json.dumps([template, variables], default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateFailedError(f"the messages are no plain texts, lists and dictionaries ({error})") from None
        with self._lock:
            try:
                answer = self._exchange(request)
            except BaseException:  # an interrupt: the answer that is under way must not meet the next request
                self.close()
                raise
            if not answer:
                code = self.close()
                raise TemplateFailedError(f"it took more than {CPU_SECONDS:g} s" if code == -signal.SIGPROF else
                                          f"the process that rendered it ended with code {code}")
        succeeded, text = json.loads(answer)
        if not succeeded:
            raise TemplateFailedError(text)
        return str(text)

    def _exchange(self, request: str) -> str:
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self._owner = os.getpid()
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    stderr=subprocess.DEVNULL, start_new_session=True)
            except OSError as error:
                raise TemplateFailedError(f"no process can be started to render it ({error})") from None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(request + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._child.stdout.readline()

    def close(self) -> int | None:
        """Ends the child, if there is one. Returns its exit code, negative for a signal."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return None
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            child.communicate(timeout=1)  # closes its input, at which it ends
        child.kill()
        return child.wait()


RENDERER = TemplateRenderer()
atexit.register(RENDERER.close)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__}")


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _answer(request: str) -> str:
    try:
        template, variables = json.loads(request)
        text = _compiled(template).render(variables)
        if len(text) > MAX_CHARACTERS:
            raise OverflowError(f"its text has {len(text)} characters, more than {MAX_CHARACTERS}")
        return json.dumps([True, text])
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if not (reason and isinstance(error, jinja2.TemplateError)):
            reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        return json.dumps([False, reason])


def _serve() -> None:
    """The child's loop: reads one line, writes one line, each within the limits."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(most, MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for request in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # nobody handles its signal, so it ends the process
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
