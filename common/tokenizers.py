"""Tokenizers: those of transformers, and bytes for models that come without one."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import ConfigError
from common.files import fingerprint
from common.sources import ModelSource

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


class Tokenizer(Protocol):
    """Text to token ids and back; the special ids are marked in the store so that training can leave them out."""

    bos: int | None
    special: tuple[int, ...]
    size: int
    memory_per_byte: int  # bytes of memory per byte of a text while it is encoded

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One int64 array of ids per text, no special tokens added."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def name(self, token: int) -> str:
        """What the vocabulary calls an id; for bytes that are no character alone, decoding says nothing."""
        ...

    def identity(self) -> str:
        """A fingerprint of all that decides the ids."""
        ...


class HfTokenizer:
    """A transformers tokenizer."""

    memory_per_byte = 160  # 156 on 10 MB of Python: tokens with their names and offsets

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *tokenizer.all_special_ids}
        self.special = tuple(sorted(i for i in ids if i is not None))
        self.size = len(tokenizer)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(row, dtype=np.int64) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def name(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token) or f"<{token}>")

    def identity(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        return fingerprint([rules, self.bos, self.special])


class ByteTokenizer:
    """UTF-8 bytes as ids 0–255, for models that come without a tokenizer; id 256 is BOS where there is room."""

    memory_per_byte = 10  # the bytes, and int64 of them

    def __init__(self, vocabulary: int) -> None:
        if vocabulary < 256:
            raise ConfigError(
                f"the model has no tokenizer and a vocabulary of {vocabulary}, too small for raw bytes (256). "
                "Name one with --tokenizer PATH."
            )
        self.bos = 256 if vocabulary > 256 else None
        self.special: tuple[int, ...] = () if self.bos is None else (self.bos,)
        self.size = 256 + len(self.special)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def name(self, token: int) -> str:
        return f"<0x{token:02X}>" if token < 256 else f"<{token}>"

    def identity(self) -> str:
        return fingerprint(["bytes", self.bos])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' own progress bars and notices while a model loads; errors still rise."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        hf_logging.enable_progress_bar()
        hf_logging.set_verbosity(verbosity)


def load_tokenizer(source: ModelSource, vocabulary: int, override: str | None = None) -> Tokenizer:
    """The model's tokenizer, the one named by `override`, or raw bytes for a folder without one.

    Raises:
        ConfigError: it cannot be loaded, or has more ids than the model has embeddings.
    """
    from transformers import AutoTokenizer

    location = override or source.location
    folder = Path(location).expanduser()
    if override == "bytes" or (folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES)):
        return ByteTokenizer(vocabulary)
    try:
        with quiet():
            revision = None if override else source.revision
            tokenizer = HfTokenizer(AutoTokenizer.from_pretrained(str(location), revision=revision))
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(
            f"--tokenizer {location}: cannot be loaded ({type(error).__name__}: {first[:160]})."
        ) from None
    if tokenizer.size > vocabulary and max(tokenizer.tokenizer.get_vocab().values()) >= vocabulary:
        raise ConfigError(
            f"--tokenizer {location}: {tokenizer.size:,} ids, but the model embeds {vocabulary:,}. Is it this model's?"
        )
    return tokenizer
