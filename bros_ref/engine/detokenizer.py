"""Text as it is generated: whole characters only, and nothing that a stop string may still take back.

The invariant: what `IncrementalDecoder` hands out piece by piece is, put together, exactly what decoding everything at
once gives, and no piece ever ends in the middle of a character. (One exception: a byte-fallback vocabulary turns a
whole run of byte tokens to U+FFFD once one of them is no UTF-8, so there a character already shown can be missing from
the text decoded at once.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a simulated run has no tokenizer, and needs no torch
    from bros_ref.model.tokenizer import Tokenizer

_HALF = "\ufffd"  # what a tokenizer shows for a character that is not whole yet


class TextStream:
    """Turns one request's token ids into text pieces.

    Attributes:
        text: everything handed out so far.
        stopped: whether a stop string was met; it and what follows are never handed out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.text = ""
        self.stopped = False
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
        self.text += shown
        return shown

    def _longest_beginning_of_a_stop(self) -> int:
        for length in range(min(len(self._held), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


class IncrementalDecoder:
    """Streams one sequence's text, token by token.

    It decodes only the tokens since the last whole character, after those of the piece before: some tokenizers
    treat the first token of a text differently, and so the piece before takes that place.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # tokens of the last piece handed out
        self._pending: list[int] = []  # tokens not handed out yet

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        self._pending.append(token_id)
        piece = self._new_text()
        if not piece or piece.endswith(_HALF):
            return ""
        self._shown, self._pending = self._pending, []
        return piece

    def finish(self) -> str:
        """The rest, in which a character that never got whole shows as U+FFFD. Starts anew."""
        piece = self._new_text()
        self._shown, self._pending = [], []
        return piece

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._pending)[len(shown):]
