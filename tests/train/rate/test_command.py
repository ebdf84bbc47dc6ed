"""`train rate` from its start to a Ctrl-C."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from common.stopping import Stop
from tests.train.rate.made import learner
from train.rate.answers import Answers
from train.rate.command import rate, summary


def test_it_serves_until_it_is_stopped_and_says_what_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, stop, db = learner(tmp_path / "r" / "topk"), Stop(), tmp_path / "ratings.sqlite"
    Answers(db).store("ada", "r/topk", 0, 4, "")
    threading.Timer(0.5, lambda: setattr(stop, "signal_name", "SIGINT")).start()
    rate([folder], "ada", db, "127.0.0.1", 0, 50, 0, stop)
    said = capsys.readouterr().err
    assert "6 latents of 1 learners, rater ada: http://127.0.0.1:" in said
    assert "1 of 6 answered by ada" in said
    assert [(row.learner, row.score) for row in summary([folder], db)] == [("r/topk", 4.0), ("all", 4.0)]
