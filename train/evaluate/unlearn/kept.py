"""What is computed of a sweep, one line a setting, so that a stopped command goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.files import fingerprint, write_file
from train.record import read_lines


class Kept:
    """Values by name in a .jsonl file; begun anew when `identity`, which is all they depend on, has changed."""

    def __init__(self, path: Path, identity: Any) -> None:
        self.path = path
        head = {"identity": fingerprint(identity)}
        lines = read_lines(path) if path.exists() else []
        lines = lines if lines[:1] == [head] else [head]
        self.values: dict[str, Any] = {line["name"]: line["value"] for line in lines[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())  # drops a torn last line

    def add(self, name: str, value: Any) -> None:
        """Keep a value: floats come back as the same bits."""
        self.values[name] = value
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name, "value": value}, allow_nan=False) + "\n")
