"""Texts: a hub data set, local files, or the standard library of the running Python, as a stream of documents.

A corpus has an identity (what decides its documents and their order) and yields documents from any number on,
so that a stopped harvest goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.errors import ConfigError, DataError, nearest
from common.files import file_sha256, fingerprint
from common.sources import hub_answers

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
HELD_OUT_ONE_IN = 16
# tests, vendored packages and generated code tables say nothing about how people write Python
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}


class Corpus(Protocol):
    """A fixed sequence of documents."""

    def identity(self) -> dict[str, Any]:
        """All that decides the documents and their order, as JSON values."""
        ...

    def documents(self, start: int = 0) -> Iterator[str]:
        """The texts from document number `start` on; empty ones are left out and not counted."""
        ...


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """Where texts come from.

    Attributes:
        name: `stdlib`, `stdlib:asyncio,json` for some of its modules, a local file or folder, or a hub data set.
        config: the hub data set's configuration, if it has several.
        split: the hub data set's split; for `stdlib`, `train` or `heldout`.
        revision: the hub data set's revision.
        column: the field that holds the text in .jsonl, .parquet and hub data sets.
        separator: splits each .txt file into documents; without it a file is one document.
        seed: order of the files (local, stdlib) or shards (hub).
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"
    separator: str | None = None
    seed: int = 0


def open_corpus(options: CorpusOptions) -> Corpus:
    """The corpus that `options` names.

    Raises:
        ConfigError: no such corpus, or a local path that holds no text file.
    """
    if options.name.partition(":")[0] == "stdlib":
        return StdlibCorpus(options)
    if not options.name:
        raise ConfigError("--corpus: it is empty. Name a hub data set, a local file or folder, or stdlib.")
    path = Path(options.name).expanduser()
    if path.exists():
        return LocalCorpus(options, path)
    if options.name.startswith((".", "/", "~")) or path.suffix in TEXT_SUFFIXES:
        raise ConfigError(f"--corpus {options.name}: no such file or folder.")
    return HubCorpus(options)


def stdlib_documents(split: str) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every module of the running Python's standard library, in path order.

    One top-level module in sixteen, chosen by a hash of its name, is held out: `split` is `train` or `heldout`.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if STDLIB_LEFT_OUT & set(relative.parts[:-1]):
            continue
        module = module_of(relative.as_posix())
        held_out = int(hashlib.sha256(module.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0
        if held_out != (split == "heldout"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield relative.as_posix(), text


def module_of(path: str) -> str:
    """The top-level module of a file of the standard library, by its relative path."""
    return path.partition("/")[0].removesuffix(".py")


@dataclass(frozen=True)
class StdlibCorpus:
    """The text of the Python standard library on this machine, or of some of its modules."""

    options: CorpusOptions

    def __post_init__(self) -> None:
        if self.options.split not in ("train", "heldout"):
            known = nearest(self.options.split, ("train", "heldout"))
            raise ConfigError(f"--split {self.options.split}: the corpus stdlib has no such split.{known}")
        if ":" in self.options.name:
            known_modules = {module_of(path) for path, _ in stdlib_documents(self.options.split)}
            for module in self._modules():
                if module not in known_modules:
                    where = f"the split {self.options.split} of stdlib has no module '{module}'"
                    raise ConfigError(f"--corpus {self.options.name}: {where}.{nearest(module, known_modules)}")

    def _modules(self) -> list[str]:
        """The top-level modules asked for; none: all."""
        named = self.options.name.partition(":")[2]
        return [module.strip() for module in named.split(",")] if ":" in self.options.name else []

    def _documents(self) -> list[tuple[str, str]]:
        wanted = set(self._modules())
        everything = stdlib_documents(self.options.split)
        return [(path, text) for path, text in everything if not wanted or module_of(path) in wanted]

    def _texts(self) -> list[str]:
        texts = [text for _, text in self._documents()]
        random.Random(self.options.seed).shuffle(texts)
        return texts

    def identity(self) -> dict[str, Any]:
        content = fingerprint(self._documents())
        return {"name": self.options.name, "split": self.options.split, "content": content, "seed": self.options.seed}

    def documents(self, start: int = 0) -> Iterator[str]:
        yield from self._texts()[start:]


@dataclass(frozen=True)
class LocalCorpus:
    """Local .txt, .jsonl and .parquet files; a folder stands for all of them under it."""

    options: CorpusOptions
    path: Path

    def __post_init__(self) -> None:
        if not self._files():
            kinds = ", ".join(TEXT_SUFFIXES)
            raise ConfigError(f"--corpus {self.path}: no {kinds} file here.")

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path] if self.path.suffix in TEXT_SUFFIXES else []
        files = sorted(file for file in self.path.rglob("*") if file.suffix in TEXT_SUFFIXES and self._is_text(file))
        random.Random(self.options.seed).shuffle(files)
        return files

    def _is_text(self, file: Path) -> bool:
        """Whether it is a file and no store's: under `--corpus .` lies the journal of `cache/<name>.zarr`."""
        folders = file.relative_to(self.path).parts[:-1]
        return file.is_file() and not any(folder.endswith(".zarr") for folder in folders)

    def identity(self) -> dict[str, Any]:
        base = self.path if self.path.is_dir() else self.path.parent
        try:
            files = [[file.relative_to(base).as_posix(), file_sha256(file)] for file in self._files()]
        except OSError as error:
            raise ConfigError(f"--corpus {error.filename}: cannot be read ({error.strerror}).") from None
        return {
            "name": os.path.basename(os.path.abspath(self.path)),  # of `.`, too
            "content": fingerprint(files),
            "column": self.options.column,
            "separator": self.options.separator,
        }

    def documents(self, start: int = 0) -> Iterator[str]:
        number = 0
        for file in self._files():
            for text in self._read(file):
                if not text.strip():
                    continue
                if number >= start:
                    yield text
                number += 1

    def _read(self, file: Path) -> Iterator[str]:
        if file.suffix == ".txt":
            text = file.read_text(encoding="utf-8", errors="replace")
            yield from text.split(self.options.separator) if self.options.separator else [text]
        elif file.suffix == ".jsonl":
            yield from self._read_jsonl(file)
        else:
            yield from self._read_parquet(file)

    def _read_jsonl(self, file: Path) -> Iterator[str]:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{file} line {number}: not valid JSON ({error.msg}).") from None
                if not isinstance(row, dict) or not isinstance(row.get(self.options.column), str):
                    raise DataError(
                        f"{file} line {number}: no text under '{self.options.column}'. Say which with --column."
                    )
                yield writable(row[self.options.column])

    def _read_parquet(self, file: Path) -> Iterator[str]:
        from pyarrow import ArrowException

        try:
            yield from self._parquet_texts(file)
        except (ArrowException, OSError) as error:  # the end of the file is read first, pages as they come
            raise DataError(f"{file}: not a readable parquet file ({error}).") from None

    def _parquet_texts(self, file: Path) -> Iterator[str]:
        from pyarrow.parquet import ParquetFile

        parquet = ParquetFile(file)
        names = parquet.schema_arrow.names
        if self.options.column not in names:
            hint = nearest(self.options.column, names)
            raise DataError(f"{file}: no column '{self.options.column}'. Say which with --column.{hint}")
        for batch in parquet.iter_batches(batch_size=1024, columns=[self.options.column]):
            texts = batch.column(0)
            if any(not isinstance(text, str) for text in texts.drop_null().to_pylist()[:1]):
                raise DataError(
                    f"{file}: column '{self.options.column}' holds {texts.type}, not text. Say which with --column."
                )
            yield from (text for text in texts.to_pylist() if text)


def writable(text: str) -> str:
    """Half a surrogate pair, which JSON can spell and UTF-8 cannot, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True)
class HubCorpus:
    """A data set of the Hugging Face hub, streamed; only the order of its shards is shuffled."""

    options: CorpusOptions

    def identity(self) -> dict[str, Any]:
        from huggingface_hub import HfApi

        if not hub_answers():
            raise self._unreachable(ConnectionError("the hub does not answer"))
        try:
            revision = HfApi().dataset_info(self.options.name, revision=self.options.revision, timeout=10).sha
        except Exception as error:
            raise self._unreachable(error) from None
        return {
            "name": self.options.name,
            "config": self.options.config,
            "split": self.options.split,
            "revision": revision,
            "column": self.options.column,
            "seed": self.options.seed,
        }

    def documents(self, start: int = 0) -> Iterator[str]:
        number, column = 0, self.options.column
        for row in self._rows():
            if column not in row:
                raise ConfigError(f"--corpus {self.options.name}: no column '{column}'.{nearest(column, row)}")
            text = row[column]
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise ConfigError(f"--corpus {self.options.name}: column '{column}' holds {kind}, not text.")
            if text and text.strip():
                if number >= start:
                    yield text
                number += 1

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The rows, as they come over the network.

        Raises:
            ConfigError: they do not, or no longer.
        """
        from datasets import load_dataset

        name, config, split = self.options.name, self.options.config, self.options.split
        revision = self.identity()["revision"]
        try:
            rows = load_dataset(name, config, split=split, revision=revision, streaming=True)
            yield from rows.shuffle(seed=self.options.seed, buffer_size=1)
        except Exception as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> ConfigError:
        first = str(error).splitlines()[0] if str(error) else ""
        return ConfigError(
            f"--corpus {self.options.name}: neither a local path nor a hub data set that can be reached "
            f"({type(error).__name__}: {first[:200]}). "
            "Check the name, log in with 'hf auth login' if it is gated, or use --corpus stdlib or a local path."
        )
