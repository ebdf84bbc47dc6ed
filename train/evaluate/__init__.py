"""Evaluation suites. `SUITES` is the only list of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.files import write_json
from train.evaluate.heldout import HELDOUT_METRICS, evaluate_heldout

SUITES = {"heldout": evaluate_heldout}
METRICS = {"heldout": HELDOUT_METRICS}


def write_evaluation(
    learner: Path, suite: str, metrics: dict[str, Any], max_tokens: int | None = None
) -> dict[str, Any]:
    """`eval/<suite>.json` in a learner's folder, or `eval/<suite>-<max_tokens>.json`; what was written."""
    result = {"learner": learner.name, "run": str(learner.parent), "suite": suite, "metrics": metrics}
    name = suite if max_tokens is None else f"{suite}-{max_tokens}"
    write_json(learner / "eval" / f"{name}.json", result)
    return result
