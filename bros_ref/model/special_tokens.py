"""What tokenizer_config.json changes about a tokenizer.json, as transformers' tokenizer classes do it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as RustTokenizer

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CLASS_OF_FAMILY = {"llama": "LlamaTokenizer", "mistral": "LlamaTokenizer", "qwen2": "Qwen2Tokenizer",
                   "qwen3": "Qwen2Tokenizer", "opt": "GPT2Tokenizer"}
_END = "<|endoftext|>"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {  # what a class sets where the file has no such key
    "LlamaTokenizer": _LLAMA, "CodeLlamaTokenizer": _LLAMA,
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END}}


class TokenizerError(ValueError):
    """A tokenizer cannot be built or used. The message names the file and what would do."""


def apply_options(tokenizer: RustTokenizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the tokens of `options` and sets what else they say, in place. A token that only the class names, and that
    the vocabulary lacks, is left out: it would have no embedding.

    Returns:
        The special tokens by transformers' names, for chat templates; without those that are not set.

    Raises:
        TokenizerError: it is to open texts with a token that is not named.
    """
    class_name = str(options.get("tokenizer_class", "")).removesuffix("Fast")
    defaults = {name: text for name, text in _CLASS_DEFAULTS.get(class_name, {}).items()
                if tokenizer.token_to_id(text) is not None}
    named = {name: options.get(name, defaults.get(name)) for name in NAMES}
    extra = options.get("extra_special_tokens")  # a model's own, by names of its own
    extra = extra if isinstance(extra, Mapping) else {}
    additional = options.get("additional_special_tokens") or []
    special: dict[str, Any] = {name: text for name, token in (named | dict(extra)).items()
                               if (text := _token_text(token))}
    if additional:
        special["additional_special_tokens"] = [_token_text(token) for token in additional]

    listed = sorted((options.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    added = [_added_token(token) for _, token in listed]
    settled = {token.content for token in added}
    if "added_tokens_decoder" not in options:  # then the tokenizer.json's own flags win over those of the config
        settled |= {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokens: dict[str, Any] = {}
    for token in (*named.values(), *additional, *extra.values()):
        if text := _token_text(token):
            tokens.setdefault(text, token)
    for token in added:
        token.special = token.special or token.content in tokens
    tokenizer.add_tokens(added + [_added_token(token, special=True) for text, token in tokens.items()
                                  if text not in settled])

    tokenizer.encode_special_tokens = bool(options.get("split_special_tokens", False))
    if _CLASS_DEFAULTS.get(class_name) is _LLAMA:
        frame_text(tokenizer, special, options.get("add_bos_token", "bos_token" in special),
                   options.get("add_eos_token", False))
    if class_name != "LlamaTokenizer" and tokenizer.pre_tokenizer is not None and "add_prefix_space" in json.loads(
            tokenizer.pre_tokenizer.__getstate__()):
        tokenizer.pre_tokenizer.add_prefix_space = bool(options.get("add_prefix_space", False))
    return special


def frame_text(tokenizer: RustTokenizer, special: Mapping[str, Any], add_bos: bool, add_eos: bool) -> None:
    """Makes `encode` open a text with the first token and close it with the last, or not. Raises TokenizerError."""
    for wanted, name in ((add_bos, "bos_token"), (add_eos, "eos_token")):
        if wanted and name not in special:
            raise TokenizerError(f"the tokenizer is to add a {name} to each text, but names none")
    used = [special[name] for wanted, name in ((add_bos, "bos_token"), (add_eos, "eos_token")) if wanted]
    pieces = [*used[:1 if add_bos else 0], "$A", *used[1 if add_bos else 0:]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pieces, pair=[*pieces, "$B:1"], special_tokens=[(text, tokenizer.token_to_id(text)) for text in used])


def _token_text(token: Any) -> str | None:
    """A special token is written as text, or as a dictionary that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _added_token(token: Any, **flags: bool) -> AddedToken:
    fields = token if isinstance(token, dict) else {"content": token}
    return AddedToken(**{key: value for key, value in fields.items() if key != "__type"} | flags)
