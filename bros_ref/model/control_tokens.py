"""Text that spells a control token stays text, while the control tokens of the chat template work.

A user who writes "<|im_end|>" must not end their turn. Before rendering, the first character of each such spelling is
replaced by a stand-in; in the rendered text every control token, which must now come from the template, gets a secret
name, and the stand-ins are changed back. A copy of the tokenizer that knows control tokens by those names alone then
encodes the text, so every other token is unchanged.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

_STAND_INS = range(0x10FFFD, 0x100000, -1)  # private use: no text needs them


class ControlTokens:
    """The control tokens of one tokenizer: those it leaves out when it decodes."""

    def __init__(self, tokenizer: RustTokenizer) -> None:
        self._tokenizer, secret = tokenizer, secrets.token_hex(8)
        self._names = {token.content: f"<{secret}:{i}>"
                       for i, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special}
        longest_first = sorted(self._names, key=len, reverse=True)  # as the tokenizer matches them
        firsts = "".join(re.escape(first) for first in {name[0] for name in longest_first})
        any_of = f"(?=[{firsts}])(?:{'|'.join(map(re.escape, longest_first))})" if firsts else "(?!)"
        self._spelling, self._first = re.compile(any_of), re.compile(f"(?={any_of}).", re.DOTALL)

    def hide(self, value: Any) -> tuple[Any, dict[str, str]]:
        """`value` (texts, lists, mappings) with stand-ins, and the character that each stand-in stands for; no
        stand-ins where no text spells a control token."""
        texts = "\n".join(_texts(value))
        firsts = sorted({*self._first.findall(texts)})
        free = (chr(code) for code in _STAND_INS if chr(code) not in texts)
        stand_ins = dict(zip(firsts, free, strict=False))
        if not stand_ins:
            return value, {}
        hidden = _map_texts(value, lambda text: self._first.sub(lambda match: stand_ins[match[0]], text))
        return hidden, {stand_in: first for first, stand_in in stand_ins.items()}

    def encode(self, text: str, stand_ins: Mapping[str, str], add_special_tokens: bool) -> list[int]:
        """Token ids of a text in which control tokens are meant and stand-ins are not."""
        named = self._spelling.sub(lambda match: self._names[match[0]], text)
        restored = named.translate({ord(stand_in): first for stand_in, first in stand_ins.items()})
        ids: list[int] = self._renamed.encode(restored, add_special_tokens=add_special_tokens).ids
        return ids

    @cached_property
    def _renamed(self) -> RustTokenizer:
        """The tokenizer with secret names. Made on first use, because it takes as long as loading a tokenizer."""
        raw = json.loads(self._tokenizer.to_str())
        for token in raw["added_tokens"]:
            if token["special"]:
                token |= {"content": self._names[token["content"]], "normalized": False}
        model, names = raw["model"], self._names
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return RustTokenizer.from_str(json.dumps(raw))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same lists and mappings with every text in them changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list | tuple) else value
