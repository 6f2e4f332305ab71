"""Text to token ids and back: the checkpoint's own tokenizer, or plain bytes for toys.

It knows vocabularies and chat templates, but nothing about models or requests. `bros_ref.engine.detokenizer` handles
text that comes token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from bros_ref.model.chat_template import RENDERER, TemplateFailedError
from bros_ref.model.control_tokens import ControlTokens
from bros_ref.model.special_tokens import CLASS_OF_FAMILY, TokenizerError, apply_options, frame_text
from bros_ref.model.weights.checkpoint import read_json
from bros_ref.model.weights.load import RANDOM_PREFIX, locate
from bros_ref.model.weights.parameters import BYTE_VOCABULARY

Messages = str | Sequence[Mapping[str, str]]  # a user's prompt, or [{"role": ..., "content": ...}, ...]

__all__ = ["ByteTokenizer", "CheckpointTokenizer", "Messages", "Tokenizer", "TokenizerError", "load_tokenizer"]

# Values of tokenizer.ggml.token_type: 2 and 3 (unknown, control) are never text, 4 (user-defined) is text in one piece.
_CONTROL_TYPES, _WHOLE_TYPES = (2, 3), (2, 3, 4)
_GGUF_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator",
                 "pad_token": "padding", "cls_token": "cls", "mask_token": "mask"}


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer. `decode` leaves out special tokens and never fails.

    `encode` reads control tokens in the text as such, `encode_plain` reads them as ordinary characters:
    untrusted text must not open another speaker's turn.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def encode_plain(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def chat(self, messages: Messages, *, control_tokens: bool = False) -> list[int]:
        """Token ids of a conversation, ending where the assistant is to speak. Text of the messages that spells a
        control token stays text, unless `control_tokens` says that the messages may use them."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte, plus begin and end of text. Encodes any text; meant for random weights."""

    vocab_size = BYTE_VOCABULARY
    bos_token_id: int | None = 256
    eos_token_ids: tuple[int, ...] = (257,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def encode_plain(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")

    def chat(self, messages: Messages, *, control_tokens: bool = False) -> list[int]:
        contents = [messages] if isinstance(messages, str) else [message["content"] for message in messages]
        return [256, *self.encode("\n".join(contents))]


class CheckpointTokenizer:
    """A checkpoint's tokenizer and its chat template.

    Args:
        special: the special tokens by transformers' names ("bos_token", ..., "additional_special_tokens"), as chat
            templates see them.
        end_token_ids: where generation ends besides "eos_token".

    Raises (from `chat` and `render`):
        TokenizerError: the template fails or refuses the messages, or there is none for a list of messages.
    """

    def __init__(self, tokenizer: RustTokenizer, origin: Path, template: str | None, special: Mapping[str, Any],
                 end_token_ids: Sequence[int] = ()) -> None:
        tokenizer.no_truncation()  # what a tokenizer.json has of these belongs to training
        tokenizer.no_padding()
        self._tokenizer, self._origin, self._template, self._special = tokenizer, origin, template, dict(special)
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.bos_token_id: int | None = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*([] if eos is None else [eos]), *end_token_ids]))

    def _id_of(self, name: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(self._special[name]) if name in self._special else None
        return token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands: a control token that it spells is that token."""
        ids: list[int] = self._tokenizer.encode(_whole(text)).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        hidden, stand_ins = self._control_tokens.hide(text)
        if not stand_ins:
            return self.encode(text)
        return self._control_tokens.encode(_whole(str(hidden)), stand_ins, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def chat(self, messages: Messages, *, control_tokens: bool = False) -> list[int]:
        """As `Tokenizer.chat`. Without a chat template, a plain text is continued, and messages are refused."""
        if self._template is None:
            if not isinstance(messages, str):
                raise TokenizerError(f"{self._origin} has no chat template; give the prompt as one plain text")
            return self.encode(messages) if control_tokens else self.encode_plain(messages)
        try:
            hidden, stand_ins = (messages, {}) if control_tokens else self._control_tokens.hide(messages)
        except RecursionError:
            raise TokenizerError("the messages are nested too deeply") from None
        text = _whole(self.render(hidden))  # which has its special tokens already
        if stand_ins:
            return self._control_tokens.encode(text, stand_ins, add_special_tokens=False)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self._tokenizer)

    def render(self, messages: Messages) -> str:
        """The template's text for `messages`, ending with the opening of the assistant's turn."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return RENDERER.render(self._template or "", variables | self._special)
        except TemplateFailedError as error:
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
    options = _options(folder)
    try:
        tokenizer = RustTokenizer.from_file(str(path))
        padding = tokenizer.padding or {}
        special = apply_options(tokenizer, {"pad_token": padding["pad_token"]} | options if padding else options)
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare Exception for every bad file
        raise TokenizerError(f"{path} is no tokenizer file: {error}") from None
    return CheckpointTokenizer(tokenizer, folder, _folder_template(folder, options), special)


def _options(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json where, as in old checkpoints, it says more; the tokenizer's class
    by the model's where neither names it."""
    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    options = read("tokenizer_config.json")
    if "added_tokens_decoder" not in options:
        options |= read("special_tokens_map.json")
    if not options.get("tokenizer_class"):
        options["tokenizer_class"] = CLASS_OF_FAMILY.get(str(read("config.json").get("model_type")), "")
    return options


def _folder_template(folder: Path, options: Mapping[str, Any]) -> str | None:
    template, file = options.get("chat_template"), folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{file} cannot be read: {error}") from None
    if isinstance(template, list):  # several, by name
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in template):
            raise TokenizerError(f"{folder}: each chat template of a list must have a name and a template")
        named = {str(entry["name"]): entry["template"] for entry in template}
        if named and "default" not in named:
            raise TokenizerError(f"{folder}: none of the chat templates {', '.join(sorted(named))} is named default")
        template = named.get("default")
    return _template_text(folder, template)


def _template_text(origin: Path, template: Any) -> str | None:
    if template is None or isinstance(template, str):
        return template
    raise TokenizerError(f"{origin}: the chat template must be a text, found a {type(template).__name__}")


def _from_gguf(path: Path) -> CheckpointTokenizer:
    from bros_ref.model.weights.gguf_file import open_gguf  # gguf is needed by its files alone
    from bros_ref.model.weights.gguf_model import end_token_ids

    meta = open_gguf(path).metadata
    kind, split = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or not isinstance(split, str) or split not in _PRE_TOKENIZERS:
        raise TokenizerError(f"{path}: tokenizer {kind!r} with pre-tokenizer {split!r} is not supported, only 'gpt2' "
                             f"with {', '.join(_PRE_TOKENIZERS)}; use the model's Hugging Face folder")
    try:
        return _from_metadata(path, meta, split, end_token_ids(meta))
    except TokenizerError:
        raise
    except KeyError as error:
        raise TokenizerError(f"{path}: metadata key {error.args[0]} is missing") from None
    except Exception as error:  # the library raises bare Exception for merges that fit no vocabulary
        raise TokenizerError(f"{path}: its vocabulary is damaged ({error}); download it again") from None


def _from_metadata(path: Path, meta: Mapping[str, Any], split: str, end_ids: Sequence[int]) -> CheckpointTokenizer:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    types: list[int] = meta["tokenizer.ggml.token_type"]
    is_llama_3 = split == "llama-bpe"  # takes whole words of the vocabulary unmerged, and opens texts by default
    tokenizer = RustTokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges,
                                         ignore_merges=is_llama_3))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[split]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=type_ in _CONTROL_TYPES, normalized=False)
                          for token, type_ in zip(tokens, types, strict=True) if type_ in _WHOLE_TYPES])
    special = {name: tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for name, key in _GGUF_SPECIAL.items()
               if f"tokenizer.ggml.{key}_token_id" in meta}
    frame_text(tokenizer, special, meta.get("tokenizer.ggml.add_bos_token", is_llama_3),
               meta.get("tokenizer.ggml.add_eos_token", False))
    return CheckpointTokenizer(tokenizer, path, _template_text(path, meta.get("tokenizer.chat_template")), special,
                               end_ids)


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
