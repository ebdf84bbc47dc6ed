"""Where trained learners lie, and what is said of folders whose files are of another form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.errors import GranaryError, StoreError

ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # what files of another form lead to


@contextmanager
def blamed(path: Path) -> Iterator[None]:
    """Raises:
    StoreError: files here are of another form than a run's.
    """
    try:
        yield
    except GranaryError:
        raise
    except ODD as error:
        raise StoreError(f"{path}: not what a run leaves ({type(error).__name__}: {error}).") from None


def learner_folders(runs: Sequence[Path]) -> list[Path]:
    """The learner folders that hold a trained SAE, of run or learner folders.

    Raises:
        StoreError: a path with none.
    """
    folders = []
    for run in runs:
        run = run.resolve() if run.name in ("", "..") else run  # its name and its parent are wanted
        found = [run] if (run / "sae").is_dir() else sorted(path.parent for path in run.glob("*/sae"))
        if not run.exists():
            raise StoreError(f"{run}: no such folder.")
        if not found:
            raise StoreError(f"{run}: no finished learner here. If the run was stopped: train resume {run}")
        folders += found
    return folders
