"""`train rate` from its start to a Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.errors import ConfigError, StoreError
from common.stopping import Stop
from tests.train.rate.made import learner
from train.rate.answers import Answers
from train.rate.command import login_name, rate, summary


def test_a_summary_of_no_file_is_an_error_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.sqlite: no such file.*--db"):
        summary([learner(tmp_path / "r" / "topk")], tmp_path / "none.sqlite")
    assert not (tmp_path / "none.sqlite").exists()


def test_where_nobody_is_logged_in_a_name_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987_654_321)
    with pytest.raises(ConfigError, match="--rater NAME"):
        login_name()


def test_serving_loads_nothing_slow(tmp_path: Path) -> None:
    program = """
import sys
from common.errors import ConfigError
from train.cli import cli
try:
    cli.main(["rate", sys.argv[1], "--rater", "ada", "--db", sys.argv[1] + "/r.sqlite", "--host", "no such host"])
except ConfigError:
    print(*sorted({"torch", "scipy", "zarr", "matplotlib"} & set(sys.modules)), "refused")
"""
    folder = learner(tmp_path / "r" / "topk")
    done = subprocess.run(
        [sys.executable, "-c", "import granary\n" + program, folder], capture_output=True, text=True, check=False
    )
    assert done.stdout == "refused\n", done.stderr


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
