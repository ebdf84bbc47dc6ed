"""SAEBench's unlearning data: multiple-choice questions, as prompts, and two corpora, as rows.

Facts of form are SAEBench's (0.6.0): the prompt, the joined corpora cut in 20 strings and in rows of 1,024, seed 42.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.corpus import CorpusOptions, LocalCorpus
from common.errors import ConfigError, DataError
from common.tokenizers import HfTokenizer
from train.evaluate.unlearn.passages import Passages

FORGET_SET, SIDE_SETS = "wmdp-bio", (
    "high_school_us_history", "college_computer_science", "high_school_geography", "human_aging",
)  # fmt: skip
FORGET_CORPUS, RETAIN_CORPUS, THIRD_CORPUS = "bio-forget-corpus", "wikitext-2-raw-v1", "openwebtext"
SHORTEST_TEXT = 50  # characters; only longer texts are taken
ROWS, ROW = 1024, 1024
STRINGS = 20
SEED = 42
TURN = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\nAnswer: ("


@dataclass(frozen=True)
class Question:
    """A question with four choices; `answer` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


def data_file(folder: Path, name: str) -> Path | None:
    """`name`.jsonl or .parquet, or the test file in a folder of that name, as the hub's data sets have it."""
    found = [folder / f"{name}.jsonl", folder / f"{name}.parquet", *sorted(folder.glob(f"{name}/test*.parquet"))]
    return next((file for file in found if file.is_file()), None)


def needed_file(folder: Path, name: str) -> Path:
    """As `data_file`.

    Raises:
        ConfigError: it is not there.
    """
    file = data_file(folder, name)
    if file is None:
        raise ConfigError(f"--data {folder}: no {name}.jsonl, {name}.parquet or {name}/test*.parquet there.")
    return file


def read_questions(folder: Path, name: str) -> list[Question]:
    """The questions of one set, from columns `question`, `choices` and `answer`.

    Raises:
        ConfigError: the file is not there.
        DataError: it lacks a column, or a row is no question with four choices.
    """
    file = needed_file(folder, name)
    questions = []
    for number, row in enumerate(_rows(file)):
        try:
            choices: list[Any] = [] + row["choices"]  # a text is no list, though it can be gone through
            one = Question(str(row["question"]), tuple(map(str, choices)), int(row["answer"]))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{file} row {number}: no question, choices and answer.") from None
        if len(one.choices) != 4 or not 0 <= one.answer < 4:
            raise DataError(f"{file} row {number}: {len(one.choices)} choices, answer {one.answer}; 4 are needed.")
        questions.append(one)
    return questions


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    import json

    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        if file.suffix == ".jsonl":
            yield from (json.loads(line) for line in file.read_text().splitlines() if line.strip())
        else:
            yield from read_table(file).to_pylist()
    except (json.JSONDecodeError, UnicodeDecodeError, ArrowException) as error:
        raise DataError(f"{file}: cannot be read ({error}).") from None


def prompt(one: Question, subject: str, order: tuple[int, ...] = (0, 1, 2, 3)) -> str:
    """The whole prompt, its choices in `order`, up to the bracket that the answer's letter follows."""
    choices = "".join(f"\n{letter}. {one.choices[i]}" for letter, i in zip("ABCD", order, strict=True))
    opening = f"The following are multiple choice questions (with answers) about {subject}.\n"
    return TURN.format(opening + one.question + choices)


def subject_of_set(name: str) -> str:
    """What a prompt calls a set."""
    return "biology" if name == FORGET_SET else name.replace("_", " ")


def as_rows(prompts: list[str], tokenizer: HfTokenizer) -> Passages:
    """Prompts as rows, padded at the right.

    Raises:
        ConfigError: the tokenizer does not know the turns of Gemma.
    """
    ids = tokenizer.encode(prompts) if prompts else []
    if any(row[0] != tokenizer.bos or (row == tokenizer.bos).sum() != 1 for row in ids):
        raise ConfigError("--model: its tokenizer does not read <bos> at the head of a prompt. Is it Gemma's?")
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64)
    tokens = torch.zeros(len(ids), max(map(len, ids), default=1), dtype=torch.int64)
    for number, row in enumerate(ids):
        tokens[number, : len(row)] = torch.from_numpy(row)
    return Passages(tokens, lengths, torch.arange(len(ids)), plain_special(tokenizer))


def letter_ids(tokenizer: HfTokenizer) -> Tensor:
    """Ids of A, B, C, D without and with a space before, int64 [2, 4].

    Raises:
        ConfigError: one of them is no single token.
    """
    ids = tokenizer.encode([f"{space}{letter}" for space in ("", " ") for letter in "ABCD"])
    if any(len(row) != 1 for row in ids):
        raise ConfigError("--model: its tokenizer has no single tokens for A, B, C and D. Is it Gemma's?")
    return torch.tensor([int(row[0]) for row in ids]).view(2, 4)


def plain_special(tokenizer: HfTokenizer) -> tuple[int, ...]:
    """BOS, EOS and padding."""
    inner = tokenizer.tokenizer
    return tuple({i for i in (inner.bos_token_id, inner.eos_token_id, inner.pad_token_id) if i is not None})


def corpora(folder: Path, tokenizer: HfTokenizer) -> tuple[Passages, Passages]:
    """Rows of the forget and of the retain corpus: the same for every SAE.

    SAEBench draws from global generators seeded once a run, so there an SAE's rows depend on those before it; these are
    those of the first.

    Raises:
        DataError: less text than one row.
    """
    generator = torch.Generator().manual_seed(SEED)
    forget = long_texts(folder, FORGET_CORPUS)
    forget = random.Random(SEED).sample(forget, min(ROWS, len(forget)))
    rows = []
    for name, texts in ((FORGET_CORPUS, forget), (RETAIN_CORPUS, long_texts(folder, RETAIN_CORPUS))):
        tokens = joined_rows(texts, tokenizer)
        if not len(tokens):
            raise DataError(f"--data {folder}: {name} has less than the {ROW:,} tokens of one row.")
        tokens = tokens[torch.randperm(len(tokens), generator=generator)][:ROWS]
        lengths = torch.full((len(tokens),), ROW)
        rows.append(Passages(tokens, lengths, torch.arange(len(tokens)), plain_special(tokenizer), mixed=True))
    return rows[0], rows[1]


def long_texts(folder: Path, name: str) -> list[str]:
    """Texts of more than 50 characters."""
    file = needed_file(folder, name)
    documents = LocalCorpus(CorpusOptions(name=str(file)), file).documents()
    return [text for text in documents if len(text) > SHORTEST_TEXT]


def joined_rows(texts: list[str], tokenizer: HfTokenizer) -> Tensor:
    """Texts joined by EOS, cut in 20 strings, tokenised, in rows of 1,024 whose first token is overwritten by BOS."""
    inner = tokenizer.tokenizer
    whole = inner.eos_token.join(texts)
    size = max((len(whole) - 1) // STRINGS + 1, 1)
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    ids = [i for piece in pieces for i in inner(piece, verbose=False)["input_ids"] if i != inner.pad_token_id]
    n = len(ids) // ROW
    rows = torch.tensor(ids[: n * ROW], dtype=torch.int64).view(n, ROW)
    rows[:, 0] = inner.bos_token_id
    return rows
