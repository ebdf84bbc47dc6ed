"""What tests of figures share."""

from __future__ import annotations

import pytest

from train.report.figures import sheet


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pixels: writing them is what takes time."""
    monkeypatch.setattr(sheet, "DPI", 20)
