"""The run with a latent for each letter, and texts for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train.evaluate.unlearn.bigrams import COMMON, FORGOTTEN, OTHER, make_run, write_texts


@pytest.fixture(scope="package")
def letters_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only read: the run is `run`, texts are in `forget`, `retain` and `third`."""
    folder = tmp_path_factory.mktemp("letters")
    make_run(folder)
    write_texts(folder, "forget", (FORGOTTEN, COMMON))
    write_texts(folder, "retain", (COMMON, OTHER))
    write_texts(folder, "third", (OTHER, FORGOTTEN), 6)
    return folder


@pytest.fixture
def letters_run(letters_folder: Path, tmp_path: Path) -> Path:
    """A copy of its own, with no results in it."""
    return Path(shutil.copytree(letters_folder / "run", tmp_path / "run"))
