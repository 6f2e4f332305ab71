"""Text as it is generated: whole characters only, and nothing that a stop string may still take back.

The invariant: what `IncrementalDecoder` hands out piece by piece is, put together, exactly what decoding everything at
once gives, and no piece ever ends in the middle of a character. (One exception: a byte-fallback vocabulary turns a
whole run of byte tokens to U+FFFD once one of them is not UTF-8, so there a character already shown can be missing from
the text decoded at once.)
"""

from __future__ import annotations

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

    It decodes a window of the newest tokens only. UTF-8 finds its own character borders again after a cut, and what
    some tokenizers do to the first token of a text (drop its space) happens to text that was handed out before, so the
    end of the window's text is the end of the whole text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_shown = 0  # characters of the window's text that were handed out
        self._num_uncertain = 0  # newest tokens for which the text ended in U+FFFD

    def push(self, token_id: int) -> str:
        """The text that became certain with this token. U+FFFD at its end is held back as long as it may be the
        beginning of a character: of four bytes, and so of four tokens, at most."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        num_half = len(text) - len(text.rstrip(_HALF))
        self._num_uncertain = self._num_uncertain + 1 if num_half else 0
        if self._num_uncertain >= _MAX_CHARACTER_BYTES:
            num_half = min(num_half, _MAX_CHARACTER_BYTES - 1)
        if len(self._window) >= 4 * _LONGEST_WINDOW:  # nothing but tokens without text since: it stays half
            num_half = 0
        piece = self._show(text, len(text) - num_half)
        if len(self._window) >= _LONGEST_WINDOW:
            self._shorten(text[self._num_shown:])
        return piece

    def finish(self) -> str:
        """The rest, in which a character that never got whole shows as U+FFFD. Starts anew."""
        text = self._tokenizer.decode(self._window)
        piece = self._show(text, len(text))
        self._window, self._num_shown, self._num_uncertain = [], 0, 0
        return piece

    def _show(self, text: str, end: int) -> str:
        piece = text[self._num_shown:end]
        self._num_shown = max(self._num_shown, end)
        return piece

    def _shorten(self, held: str) -> None:
        """Keeps half of the window, unless that would lose what is held back."""
        newest = self._window[len(self._window) // 2:]
        text = self._tokenizer.decode(newest)
        if text.endswith(held):
            self._window, self._num_shown = newest, len(text) - len(held)
