"""Fixtures of the training tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def own_store(shared_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_store, tmp_path / "own.zarr"))
