"""A comparison as text, and the L0s that a person gives for it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.console import format_cell
from common.errors import ConfigError
from common.files import finite, write_file


def numbers(text: str) -> list[float]:
    """`16,32` as numbers.

    Raises:
        ConfigError: something else.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(value > 0 and math.isfinite(value) for value in values):
        raise ConfigError(f"--l0 {text}: numbers above 0 are needed, such as 16,32,64.")
    return values


def to_csv(records: Sequence[dict[str, Any]]) -> str:
    """Comma-separated values with a heading; what is not known is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def to_markdown(records: Sequence[dict[str, Any]]) -> str:
    """A table for a page: intervals beside their means."""
    lines = [
        "| learners | L0 | measured | seeds | EV | EV − baseline | paired | verdict | NMSE | dead | dense | speed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in records:
        cells = [
            f"`{row['name']}`",
            format_cell(row["l0"]),
            format_cell(row["measured_l0"]),
            str(row["seeds"]),
            with_interval(row["explained_variance"], row["interval"], sign=""),
            with_interval(row["difference"], row["difference_interval"], sign="+"),
            str(row["paired_seeds"]),
            row["verdict"] or "–",
            f"{row['nmse']:.4f}",
            f"{row['dead_share']:.3f}",
            f"{row['dense_share']:.3f}",
            "–" if row["speed"] is None else f"{row['speed']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_json(records: Sequence[dict[str, Any]]) -> str:
    """A list of objects."""
    return json.dumps(finite(list(records)), indent=2, allow_nan=False) + "\n"


FORMS = {".json": to_json, ".csv": to_csv, ".md": to_markdown}


def check_table_file(path: Path) -> None:
    """Refuse a file that no table can be written to.

    Raises:
        ConfigError: another ending, or a folder.
    """
    if path.suffix not in FORMS:
        raise ConfigError(f"--out {path}: its ending says in which form: {', '.join(FORMS)}.")
    if path.is_dir():
        raise ConfigError(f"--out {path}: a folder. Name a file in it.")


def write_table(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """The table in the form that the file's ending says."""
    write_file(path, FORMS[path.suffix](records).encode())


def with_interval(value: float | None, interval: float | None, sign: str) -> str:
    """`.941 ± .002`, to four digits."""
    if value is None:
        return "–"
    return f"{value:{sign}.4f}" + (f" ± {interval:.4f}" if interval is not None else "")
