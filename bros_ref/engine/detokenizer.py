"""Text as it is generated: whole characters only, and nothing that may turn out to be part of a stop string.

Invariant: the pieces that `IncrementalDecoder` returns, put together, are exactly what decoding everything at once
gives, and no piece ever ends in the middle of a character. (One exception: a byte-fallback vocabulary turns a
whole run of byte tokens to U+FFFD once one of them is not UTF-8, so in such a run the characters shown can differ from
the text decoded at once.)
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a simulated run has no tokenizer, and needs no torch
    from bros_ref.model.tokenizer import Tokenizer

_HALF = "\ufffd"  # what a tokenizer shows for a character that is not whole yet
_MAX_CHARACTER_BYTES = 4  # of UTF-8
_LONGEST_WINDOW = 16  # tokens; half of them hold a character that is not whole yet, and then some


class TextStream:
    """Turns one request's token ids into text pieces.

    Attributes:
        text: everything handed out so far.
        stopped: whether a stop string was met; it and what follows are never handed out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._shown: list[str] = []
        self._decoder = IncrementalDecoder(tokenizer)
        self._stop = stop
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that can be shown now, perhaps none."""
        return self._emit(self._decoder.push(token_id), final=False)

    def close(self) -> str:
        """No more tokens: returns what was held back."""
        return self._emit(self._decoder.finish(), final=True)

    def _emit(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [position for position in (self._held.find(stop) for stop in self._stop) if position >= 0]
        if found:
            self.stopped, keep = True, min(found)
        elif final:
            keep = len(self._held)
        else:
            keep = len(self._held) - self._longest_beginning_of_a_stop()
        shown = self._held[:keep]
        self._held = "" if self.stopped else self._held[keep:]
        self._shown.append(shown)
        return shown

    @property
    def text(self) -> str:
        self._shown = ["".join(self._shown)]
        return self._shown[0]

    def _longest_beginning_of_a_stop(self) -> int:
        for length in range(min(len(self._held), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


class IncrementalDecoder:
    """Streams one sequence's text, token by token, with O(1) work for each.

    It decodes a window of the newest tokens only. UTF-8 resynchronises at the next character after a cut, and some
    tokenizers drop the space of a text's first token, which affects only text that was handed out before. So the end
    of the window's text is the end of the whole text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_shown = 0  # characters of the window's text that were handed out
        self._lengths = deque[int](maxlen=_MAX_CHARACTER_BYTES)  # of the window's text after each of the newest tokens
        self._num_uncertain = 0  # newest tokens for which the text ended in U+FFFD

    def push(self, token_id: int) -> str:
        """The text that became certain with this token. U+FFFD at its end is held back as long as it may be the
        beginning of a character: that has four bytes at most, so three tokens can come before its last one."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        end = len(text.rstrip(_HALF))
        self._lengths.append(len(text))
        self._num_uncertain = self._num_uncertain + 1 if end < len(text) else 0
        if len(self._window) >= 4 * _LONGEST_WINDOW:  # nothing but tokens without text since: it stays half
            end = len(text)
        elif self._num_uncertain >= _MAX_CHARACTER_BYTES:
            end = max(end, min(len(text) - _MAX_CHARACTER_BYTES + 1, *self._lengths))
        piece = self._show(text, end)
        if len(self._window) >= _LONGEST_WINDOW:
            self._shorten(text)
        return piece

    def finish(self) -> str:
        """The rest, in which a character that stayed incomplete shows as U+FFFD. Resets the decoder."""
        text = self._tokenizer.decode(self._window)
        piece = self._show(text, len(text))
        self._window, self._num_shown, self._num_uncertain = [], 0, 0
        self._lengths.clear()
        return piece

    def _show(self, text: str, end: int) -> str:
        piece = text[self._num_shown:end]
        self._num_shown = max(self._num_shown, end)
        return piece

    def _shorten(self, text: str) -> None:
        """Keeps the newest half of the window, cut between two characters, where the text of the rest is the end of
        the whole text. If damaged text has no such place, cuts a little later anyway."""
        half, held = len(self._window) // 2, text[self._num_shown:]
        overdue = len(self._window) >= 2 * _LONGEST_WINDOW
        if held and not overdue:
            return
        for start in range(half, half - _MAX_CHARACTER_BYTES, -1):
            rest = self._tokenizer.decode(self._window[start:])
            if rest.endswith(held) and (overdue or text.endswith(rest)):
                self._window, self._num_shown = self._window[start:], len(rest) - len(held)
                self._lengths.extend([length - len(text) + len(rest) for length in self._lengths])
                return
