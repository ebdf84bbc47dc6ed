"""What a run leaves for people and programs: status.json, metrics.jsonl, result.json."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from common.errors import StoreError
from common.files import disk_error, finite, read_json, write_file, write_json


class Status:
    """`status.json`: there at all times, saying what the run is doing and why it ended.

    Args:
        written: by this process; of several on one run, one writes.
    """

    def __init__(self, path: Path, n_steps: int, written: bool = True) -> None:
        self.path, self.written = path, written
        self.values: dict[str, Any] = {
            "state": "running",
            "reason": "",
            "step": 0,
            "steps": n_steps,
            "tokens_seen": 0,
            "last_loss": None,
            "learners": {},
            "pid": os.getpid(),
        }
        try:  # until a run that goes on knows where it stands, what it left is the best answer
            before = read_json(path)
        except StoreError:
            before = {}
        self.values |= {key: before[key] for key in ("step", "tokens_seen", "last_loss", "learners") if key in before}

    def write(self, **values: Any) -> None:
        """Note `values` and the time."""
        self.values |= values
        self.values["heartbeat"] = time.time()
        if self.written:
            write_json(self.path, self.values)


class Metrics:
    """`metrics.jsonl` of one learner: one line per logging interval."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep_until(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run writes again, and a torn last one."""
        if self.path.exists():
            kept = [line for line in read_lines(self.path) if line["step"] <= step]
            write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def append(self, line: dict[str, Any]) -> None:
        """Add one line; infinite and NaN values become null.

        Raises:
            StoreError: the disk is full.
        """
        text = json.dumps(finite(line), allow_nan=False) + "\n"
        try:
            with self.path.open("a") as file:
                file.write(text)
        except OSError as error:
            raise disk_error(error, self.path, len(text)) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file."""
    lines = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return lines
