"""What a person sees: one progress line, tables, `--json` records, one-line errors with exit codes."""

from __future__ import annotations

import io
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from common.errors import GranaryError, StoreError
from common.files import finite
from common.stopping import Stop

LINE_EVERY_S = 10.0
DRAW_EVERY_S = 0.2
RECENT_S, LEAST_MARKS = 30.0, 10
MARK_EVERY_S = 1.0


def run_command(command: click.Command, stop: Stop) -> None:
    """Run a click command and leave with its exit code; users' errors are one line, bugs keep their traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a ? for what a Latin-1 terminal or log cannot write
    try:
        sys.exit(command.main(standalone_mode=False, obj=stop))
    except GranaryError as error:
        if not error.told_elsewhere:
            click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a file that cannot be had is the user's to settle; an error without one is a bug
        if error.filename is None:
            raise
        click.echo(f"StoreError: {error.filename}: {error.strerror}", err=True)
        sys.exit(StoreError.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(75)


def say(message: str) -> None:
    """A line for the person at the terminal (stderr: stdout is for results)."""
    click.echo(message, err=True)


def emit_json(value: Any) -> None:
    click.echo(json.dumps(finite(value), allow_nan=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout: text to the left, numbers to the right."""
    drawn = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for index, column in enumerate(columns):
        numeric = all(row[index] is None or isinstance(row[index], int | float) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(format_cell(cell) for cell in row))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(drawn)


def format_cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(size: float) -> str:
    """`1.5 GB`, in powers of ten as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


class Progress:
    """One line that is rewritten on a terminal, and a plain line every ten seconds elsewhere.

    Attributes:
        marks: when so much was done, oldest first; what is left is reckoned from the last half minute, for an average
            since the start says little once other work comes or goes.
    """

    def __init__(self, label: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.label, self.total, self.shown = label, total, shown
        self.started = time.monotonic()
        self.marks = deque([(self.started, done)])
        self.live = sys.stderr.isatty()
        self.next_draw = self.started if self.live else self.started + LINE_EVERY_S

    def rate(self, done: int) -> float:
        """How much is done per second lately: over the last half minute, or ten marks where they go back further."""
        now = time.monotonic()
        while len(self.marks) > LEAST_MARKS and now - self.marks[1][0] >= RECENT_S:
            self.marks.popleft()
        then, before = self.marks[0]
        if now - self.marks[-1][0] >= MARK_EVERY_S and done > self.marks[-1][1]:
            self.marks.append((now, done))
        return (done - before) / max(now - then, 1e-9)

    def update(self, done: int, detail: str) -> None:
        """Draw `label 42 % · detail · ETA`, if it is time to; the end is for `close` to draw."""
        now = time.monotonic()
        if now < self.next_draw or done >= self.total:
            return
        self.next_draw = now + (DRAW_EVERY_S if self.live else LINE_EVERY_S)
        self.draw(done, detail)

    def draw(self, done: int, detail: str) -> None:
        if not self.shown:
            return
        rate = self.rate(done)
        left = f" · {format_seconds((self.total - done) / rate)} left" if rate > 0 and done < self.total else ""
        line = f"{self.label} {100 * done / max(self.total, 1):3.0f} % · {detail}{left}"
        sys.stderr.write(f"\r\x1b[2K{line}" if self.live else f"{line}\n")
        sys.stderr.flush()

    def close(self, done: int, detail: str) -> None:
        """The last line, always drawn."""
        self.draw(done, detail)
        if self.live and self.shown:
            sys.stderr.write("\n")
            sys.stderr.flush()
