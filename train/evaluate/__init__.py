"""Evaluation suites. `SUITES` is the only list of them."""

from __future__ import annotations

from train.evaluate.heldout import HELDOUT_METRICS, evaluate_heldout

SUITES = {"heldout": evaluate_heldout}
METRICS = {"heldout": HELDOUT_METRICS}
