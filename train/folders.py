"""Where trained learners lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import StoreError


def learner_folders(runs: Sequence[Path]) -> list[Path]:
    """The learner folders that hold a trained SAE, of run or learner folders.

    Raises:
        StoreError: a path with none.
    """
    folders = []
    for run in runs:
        run = run.resolve() if run.name in ("", "..") else run  # its name and its parent are wanted
        found = [run] if (run / "sae").is_dir() else sorted(path.parent for path in run.glob("*/sae"))
        if not found:
            raise StoreError(f"{run}: no finished learner here. If the run was stopped: train resume {run}")
        folders += found
    return folders
