"""Text to token ids and back: the checkpoint's own tokenizer, or plain bytes for toys.

It knows vocabularies and chat templates, and nothing about models or requests. Text that comes token by token is
`bros_ref.engine.detokenizer`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from bros_ref.model.weights.checkpoint import read_json
from bros_ref.model.weights.gguf_file import open_gguf
from bros_ref.model.weights.load import RANDOM_PREFIX, locate
from bros_ref.model.weights.parameters import BYTE_VOCABULARY

Messages = str | Sequence[Mapping[str, str]]  # a user's prompt, or [{"role": ..., "content": ...}, ...]

_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of tokens that are never text


class TokenizerError(ValueError):
    """A tokenizer cannot be built or used. The message names the file and what would do."""


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer. `decode` leaves out special tokens and never fails."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation, ending where the assistant is to speak."""
        ...


class ByteTokenizer:
    """One token a UTF-8 byte, then begin and end of text. Reads any text; made for random weights."""

    vocab_size = BYTE_VOCABULARY
    bos_token_id: int | None = 256
    eos_token_ids: tuple[int, ...] = (257,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")

    def chat(self, messages: Messages) -> list[int]:
        contents = [messages] if isinstance(messages, str) else [message["content"] for message in messages]
        return [256, *self.encode("\n".join(contents))]


class CheckpointTokenizer:
    """A checkpoint's tokenizer and its chat template.

    Raises (from `chat`):
        TokenizerError: the template is broken or refuses the messages, or there is none for a list of messages.
    """

    def __init__(self, tokenizer: RustTokenizer, origin: Path, template: str | None, bos_token: str | None,
                 eos_token: str | None) -> None:
        self._tokenizer, self._origin, self._template = tokenizer, origin, template
        self._special = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.bos_token_id: int | None = tokenizer.token_to_id(bos_token) if bos_token else None
        eos = tokenizer.token_to_id(eos_token) if eos_token else None
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(_whole(text)).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def chat(self, messages: Messages) -> list[int]:
        """A model without a chat template is no chat model: it continues a plain prompt, and refuses messages."""
        if self._template is None:
            if isinstance(messages, str):
                return self.encode(messages)
            raise TokenizerError(f"{self._origin} has no chat template; give the prompt as one plain text")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.render(messages)  # which has its special tokens already
        ids: list[int] = self._tokenizer.encode(_whole(text), add_special_tokens=False).ids
        return ids

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The template's text for `messages`, ending with the opening of the assistant's turn."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # checkpoints are not trusted
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self._template or "").render(
                messages=messages, add_generation_prompt=True, **self._special)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"{self._origin}: the chat template failed: {error}") from None


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of the model called `model`, by the names of `bros_ref.model.weights.load`.

    Raises:
        WeightsError: there is no such model.
        TokenizerError: it carries no tokenizer that can be read.
    """
    if model.startswith(RANDOM_PREFIX):
        return ByteTokenizer()
    path = locate(model)
    return _from_folder(path) if path.is_dir() else _from_gguf(path)


def _from_folder(folder: Path) -> CheckpointTokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{path} is missing; only this format is read (save_pretrained of a fast tokenizer)")
    try:
        tokenizer = RustTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every bad file
        raise TokenizerError(f"{path} is no tokenizer file: {error}") from None
    options = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    template = options.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return CheckpointTokenizer(tokenizer, folder, template, _token_text(options.get("bos_token")),
                               _token_text(options.get("eos_token")))


def _from_gguf(path: Path) -> CheckpointTokenizer:
    meta = open_gguf(path).metadata
    kind, split = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or not isinstance(split, str) or split not in _PRE_TOKENIZERS:
        raise TokenizerError(f"{path}: tokenizer {kind!r} with pre-tokenizer {split!r} is not supported, only 'gpt2' "
                             f"with {', '.join(_PRE_TOKENIZERS)}; use the model's Hugging Face folder")
    try:
        return _from_metadata(path, meta, _PRE_TOKENIZERS[split])
    except KeyError as error:
        raise TokenizerError(f"{path}: metadata key {error.args[0]} is missing") from None
    except Exception as error:  # the library raises bare Exception for merges that fit no vocabulary
        raise TokenizerError(f"{path}: its vocabulary is damaged ({error}); download it again") from None


def _from_metadata(path: Path, meta: Mapping[str, Any], pre_tokenizer: Any) -> CheckpointTokenizer:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    types: list[int] = meta["tokenizer.ggml.token_type"]
    tokenizer = RustTokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL_TOKEN])

    def token_text(key: str) -> str | None:
        token_id = meta.get(f"tokenizer.ggml.{key}")
        return None if token_id is None else tokens[token_id]

    return CheckpointTokenizer(tokenizer, path, meta.get("tokenizer.chat_template"), token_text("bos_token_id"),
                               token_text("eos_token_id"))


def _split_then_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# How text is cut before merging, by the name GGUF gives it. SmolLM2 cuts every digit; GPT-2 is ByteLevel's own rule.
_PRE_TOKENIZERS: dict[str, Any] = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                       pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": _split_then_bytes(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                                   r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "qwen2": _split_then_bytes(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
}


def _whole(text: str) -> str:
    """Half a surrogate pair, which JSON can smuggle into a string, becomes a question mark."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _token_text(token: Any) -> str | None:
    """A special token is written as text, or as a dictionary that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
