"""Answers in an SQLite file: on disk before the rater sees the next latent."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import StoreError

MAGIC = b"SQLite format 3\0"
TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    rater TEXT NOT NULL,
    learner TEXT NOT NULL,
    latent INTEGER NOT NULL,
    score INTEGER CHECK (score BETWEEN 1 AND 5),
    label TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (rater, learner, latent)
)
"""


@dataclass(frozen=True)
class Answer:
    """What a rater said of a latent.

    Attributes:
        score: 1 (no pattern) to 5 (one clear pattern), None where it was skipped.
        at: Unix time.
    """

    rater: str
    learner: str
    latent: int
    score: int | None
    label: str
    at: float


def opening_of(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as file:
        return file.read(len(MAGIC))


class Answers:
    """The file of answers. Every call opens it anew, so that several servers can share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and opening_of(path) not in (b"", MAGIC):
            raise StoreError(f"{path}: no file of ratings. Name another with --db.")  # SQLite writes over short ones
        with self._open() as database:
            database.execute(TABLE)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=10)) as database:
                database.execute("PRAGMA synchronous = FULL")
                with database:  # commits
                    yield database
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}. Is it a file of ratings? Name another with --db.") from None

    def store(self, rater: str, learner: str, latent: int, score: int | None, label: str) -> None:
        """Write an answer, in place of an earlier one of this rater to this latent."""
        with self._open() as database:
            database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)",
                (rater, learner, latent, score, label, time.time()),
            )

    def of(self, rater: str) -> dict[tuple[str, int], Answer]:
        """The answers of one rater by learner and latent, the oldest first."""
        return {(answer.learner, answer.latent): answer for answer in self.all() if answer.rater == rater}

    def all(self) -> list[Answer]:
        """Every answer, the oldest first."""
        with self._open() as database:
            rows = database.execute("SELECT rater, learner, latent, score, label, at FROM answers ORDER BY at")
            return [Answer(*row) for row in rows]
