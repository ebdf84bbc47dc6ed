"""What a person sees."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import click
import pytest

from common import console
from common.console import Progress, emit_json, format_bytes, format_cell, format_seconds, run_command, table
from common.errors import ConfigError, DataError, GranaryError, Interrupted, StoreError
from common.stopping import Stop


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("a"), 2), (StoreError("b"), 3), (DataError("c"), 4), (Interrupted("d"), 75)],
)
def test_run_command_prints_one_line_and_leaves_with_the_code(
    error: GranaryError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as leaving:
        run_command(command, Stop())
    assert leaving.value.code == code
    assert capsys.readouterr().err == f"{type(error).__name__}: {error}\n"


def test_run_command_leaves_with_2_on_wrong_usage_and_0_when_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    @click.option("--n", type=int)
    @click.pass_obj
    def command(stop: Stop, n: int) -> None:
        assert not stop.asked

    monkeypatch.setattr("sys.argv", ["x", "--n", "many"])
    with pytest.raises(SystemExit) as leaving:
        run_command(command, Stop())
    assert leaving.value.code == 2
    assert "'many' is not a valid integer" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["x", "--n", "3"])
    with pytest.raises(SystemExit) as leaving:
        run_command(command, Stop())
    assert not leaving.value.code


def test_run_command_lets_a_bug_show_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def command() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_command(command, Stop())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_format_seconds_reads_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2e9, "2.0 GB"), (5e15, "5000.0 TB")]
)
def test_format_bytes_reads_well(size: float, text: str) -> None:
    assert format_bytes(size) == text


def test_format_cell_reads_well() -> None:
    cells = [None, 0.123456, 12345.6, 1234567, True, "x"]
    assert [format_cell(cell) for cell in cells] == ["–", "0.1235", "12,346", "1,234,567", "True", "x"]


def test_table_prints_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    table("stores", ("name", "tokens"), [("one", 1000), ("two", 20)])
    out = capsys.readouterr().out
    assert all(text in out for text in ("stores", "name", "one", "1,000", "two", "20"))


def test_emit_json_writes_null_for_nan(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"loss": math.nan, "tokens": 3})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "tokens": 3}


def test_progress_draws_plain_lines_rarely_and_the_last_always(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = Progress("harvest", 200)
    progress.update(10, "too early")
    now[0] += 10.0
    progress.update(50, "5 tok/s")  # 50 in 10 s: the other 150 take 30 s
    now[0] += 1.0
    progress.update(60, "too early again")
    progress.close(200, "done")
    assert capsys.readouterr().err == "harvest  25 % · 5 tok/s · 30 s left\nharvest 100 % · done\n"


def test_what_is_left_follows_the_last_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress, done = Progress("harvest", 10_000), 0
    for seconds, per_second in ((100, 2), (40, 20)):
        for _ in range(seconds):
            now[0] += 1.0
            done += per_second
            progress.rate(done)
    assert progress.rate(done) == 20.0  # (200 + 800) / 140 since the start
    now[0] += 100.0
    assert progress.rate(done) == pytest.approx(9 * 20 / 109)  # falls while nothing is done: ten marks are left
    assert len(progress.marks) < 40


def test_a_rate_of_rare_steps_is_that_of_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = Progress("eval", 10)
    for done in (1, 2, 3):
        now[0] += 60.0
        progress.rate(done)
    now[0] += 45.0
    assert progress.rate(3) == pytest.approx(3 / 225)
    for done in range(4, 24):
        now[0] += 120.0
        rate = progress.rate(done)
    assert rate == pytest.approx(1 / 120)


def test_the_end_is_drawn_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = Progress("harvest", 200)
    now[0] += 11.0
    progress.update(200, "done")
    progress.close(200, "done")
    assert capsys.readouterr().err == "harvest 100 % · done\n"


def test_run_command_names_the_file_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        tmp_path.read_bytes()

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as leaving:
        run_command(command, Stop())
    assert leaving.value.code == 3
    assert capsys.readouterr().err == f"StoreError: {tmp_path}: Is a directory\n"


def test_run_command_writes_what_it_can_where_text_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as ended:
        run_command(click.Command("x", callback=lambda: table("‖x‖", ("a – b",), [("é",)])), Stop())
    assert ended.value.code in (0, None)
    assert b"?x?" in written.getvalue()
    assert b"a ? b" in written.getvalue()
