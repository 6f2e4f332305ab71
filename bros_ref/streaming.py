"""Text as it is generated: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

from bros_ref.model.tokenizer import IncrementalDecoder, Tokenizer


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
