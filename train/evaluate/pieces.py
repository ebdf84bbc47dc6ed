"""Tokens one by one, so that a person can read them: nothing is invisible, and no two bytes look alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from common.tokenizers import Tokenizer
from train.evaluate.text import spell

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no character alone
UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # control, format and space characters


def readable(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token with the space before it; line breaks and tabs are themselves.

    Bytes that are no character alone are `<0xE2>`, control characters their pictures (`␀`), other spaces and
    format characters `<U+200B>`, and a token that spells nothing has its name in the vocabulary.
    """
    return {token: piece(tokenizer, token, text) for token, text in spell(tokenizer, ids).items()}


def piece(tokenizer: Tokenizer, token: int, text: str) -> str:
    if not text or REPLACEMENT in text:
        return bytes_named(tokenizer.name(token))
    return "".join(shown(character) for character in text)


def shown(character: str) -> str:
    """A character, or what stands for one that is not seen, or turns the line around."""
    code = ord(character)
    if character in "\n\t " or unicodedata.category(character) not in UNSEEN:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def bytes_named(name: str) -> str:
    """`<0xE2><0x80>` for a name in the byte-level alphabet that GPT-2 brought up; any other name as it is."""
    table = byte_alphabet()
    if not name or not all(character in table for character in name):
        return name
    if name.isascii():  # <0xE2> and [UNK] are in the alphabet too, and mean themselves
        return name
    return "".join(f"<0x{table[character]:02X}>" for character in name)


def byte_alphabet() -> dict[str, int]:
    """Character to byte: printable Latin-1 stands for itself, the 68 other bytes are numbered from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(other)}
