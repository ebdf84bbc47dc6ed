"""Answers on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import StoreError
from train.rate.answers import Answers


def test_an_answer_is_on_disk_at_once_and_a_second_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ratings.sqlite"
    Answers(path).store("ada", "r/topk", 7, 3, "first")
    Answers(path).store("ada", "r/topk", 8, None, "")
    Answers(path).store("ada", "r/topk", 7, 5, "sums 'quoted'; DROP TABLE answers")
    Answers(path).store("bob", "r/topk", 7, 1, "")
    again = Answers(path)
    mine = again.of("ada")
    assert {key: (answer.score, answer.label) for key, answer in mine.items()} == {
        ("r/topk", 7): (5, "sums 'quoted'; DROP TABLE answers"),
        ("r/topk", 8): (None, ""),
    }
    assert len(again.all()) == 3


def test_a_score_outside_of_1_to_5_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="CHECK"):
        Answers(tmp_path / "r.sqlite").store("ada", "r/topk", 7, 6, "")


@pytest.mark.parametrize("text", ["hello " * 200, "x"])
def test_a_file_that_is_no_database_is_one_error_and_stays(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.sqlite").write_text(text)
    with pytest.raises(StoreError, match=r"r\.sqlite: .*--db"):
        Answers(tmp_path / "r.sqlite")
    assert (tmp_path / "r.sqlite").read_text() == text
