"""The forward stage: values that are not finite, a disk that fills."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.checks import problems
from common.errors import StoreError
from common.layout import TOKENS, acts_array, norms_array
from common.store import Store
from harvest import run
from tests.conftest import HOOK
from tests.harvest.conftest import go, small
from tests.stores import unequal


def test_harvest_of_values_that_are_not_finite_is_an_error(overflowing: Path, texts: Path, tmp_path: Path) -> None:
    config = small(overflowing, texts, tmp_path / "x.zarr", dtype="float16")
    pattern = (
        r"x\.zarr blocks\.1\.hook_resid_post: [\d,]+ values are not finite, first in sequence \d+ "
        r"\(float16 storage\)\. Say --on-nonfinite mask"
    )
    with pytest.raises(StoreError, match=pattern):
        go(config)
    assert Store.open(config.store_path()).committed(acts_array(HOOK)) == []


def test_harvest_masks_values_that_are_not_finite(overflowing: Path, texts: Path, tmp_path: Path) -> None:
    config = small(overflowing, texts, tmp_path / "x.zarr", dtype="float16", on_nonfinite="mask")
    outcome = go(config)
    store = Store.open(config.store_path())
    tokens, acts = store.rows(TOKENS, 0, 50), store.rows(acts_array(HOOK), 0, 50)
    norms = store.rows(norms_array(HOOK), 0, 50)
    bad = np.isnan(norms)
    assert bad[tokens == ord("g")].all()
    assert 0 < bad.sum() < bad.size
    assert (acts[bad] == 0).all()
    assert np.isfinite(acts).all()
    assert outcome.nonfinite >= bad.sum()
    assert store.moments(HOOK).count == (~bad & (tokens != 256)).sum()
    assert list(problems(store)) == []


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a mapped chunk may wait for the collector


def test_harvest_on_a_full_disk_says_so_and_goes_on_with_more_room(
    little_disk: Path, tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "check_room", lambda plan: None)  # the disk fills while the harvest runs
    config = small(tiny_model, texts, little_disk / "x.zarr", tokens=12_800)
    with pytest.raises(StoreError, match=r"no space left on the disk: [\d,]+ bytes to write, [\d,]+ free\."):
        go(config)
    store = Store.open(config.store_path())
    assert store.journal.entries
    assert list(problems(store)) == []
    subprocess.run(["mount", "-o", "remount,size=8m", str(little_disk)], check=True)
    go(config)
    go(small(tiny_model, texts, tmp_path / "straight.zarr", tokens=12_800))
    assert unequal(config.store_path(), tmp_path / "straight.zarr") == []
