"""Tokens one by one: spaces kept, no byte invisible, none like another."""

from __future__ import annotations

import pytest

from common.sources import find_model
from common.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from train.evaluate.pieces import byte_alphabet, bytes_named, readable, shown


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(find_model("demo"), 4096)


def texts(tokenizer: Tokenizer, text: str) -> list[str]:
    ids = [int(token) for token in tokenizer.encode([text])[0]]
    named = readable(tokenizer, ids)
    return [named[token] for token in ids]


def test_pieces_of_plain_text_are_the_text(demo: Tokenizer) -> None:
    text = "def parse(self, name):\n\treturn  name  # a note"
    found = texts(demo, text)
    assert "".join(found) == text
    assert " name" in found


def test_bytes_that_are_no_character_are_named_one_by_one(demo: Tokenizer) -> None:
    found = "".join(texts(demo, "a\U0001f33e"))  # an ear of rice, four bytes that no merge joins
    assert found.startswith("a<0x")
    assert bytes.fromhex(found[1:].replace("<0x", "").replace(">", "")) == "\U0001f33e".encode()


def test_control_characters_are_seen() -> None:
    tokenizer = ByteTokenizer(260)
    assert list(readable(tokenizer, [0, 9, 10, 27, 65, 127, 128, 255, 256, 259]).values()) == [
        "␀", "\t", "\n", "␛", "A", "␡", "<0x80>", "<0xFF>", "<256>", "<259>",
    ]  # fmt: skip


@pytest.mark.parametrize("character", ["\u00a0", "\u00ad", "\u200b", "\u2028", "\u202e", "\u2066", "\ufeff"])
def test_characters_that_are_not_seen_or_turn_the_line_are_named(character: str) -> None:
    assert shown(character) == f"<U+{ord(character):04X}>"


def test_special_tokens_and_ids_beyond_the_vocabulary_have_a_name(demo: Tokenizer) -> None:
    assert demo.bos is not None
    found = readable(demo, [demo.bos, 4_000_000])
    assert found[demo.bos] == "<|endoftext|>"
    assert found[4_000_000] == "<4000000>"


def test_the_alphabet_has_every_byte_once() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert byte_alphabet()["Ġ"] == 0x20  # as every GPT-2 vocabulary shows it
    assert bytes_named("âĢ") == "<0xE2><0x80>"
    assert bytes_named("<0xE2>") == "<0xE2>"  # a SentencePiece vocabulary's own name
    assert bytes_named("▁x") == "▁x"
