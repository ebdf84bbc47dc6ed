"""Evaluation suites. `SUITES` is the only list of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_file, write_json
from train.evaluate.core import CORE_METRICS, core
from train.evaluate.cost import COST_METRICS, cost
from train.evaluate.heldout import HELDOUT_METRICS, heldout
from train.evaluate.hierarchy import HIERARCHY_METRICS, hierarchy
from train.evaluate.interp import INTERP_METRICS, interp
from train.evaluate.latents import LATENTS_METRICS, latents
from train.evaluate.probe import PROBE_METRICS, probe
from train.evaluate.subject import Evaluation, Subject
from train.evaluate.temporal import TEMPORAL_METRICS, temporal

SUITES: dict[str, Callable[[Subject], Evaluation]] = {
    "heldout": heldout,
    "core": core,
    "latents": latents,
    "temporal": temporal,
    "cost": cost,
    "hierarchy": hierarchy,
    "probe": probe,
    "interp": interp,
}
METRICS: dict[str, dict[str, str]] = {
    "heldout": HELDOUT_METRICS,
    "core": CORE_METRICS,
    "latents": LATENTS_METRICS,
    "temporal": TEMPORAL_METRICS,
    "cost": COST_METRICS,
    "hierarchy": HIERARCHY_METRICS,
    "probe": PROBE_METRICS,
    "interp": INTERP_METRICS,
}


def write_evaluation(learner: Path, suite: str, found: Evaluation, max_tokens: int | None = None) -> dict[str, Any]:
    """`eval/<suite>.json` in a learner's folder, or `eval/<suite>-<max_tokens>.json`; what was written.

    Arrays lie beside it, named as it is with `_<array>.npy` at the end, and are written first.
    """
    result = {
        "learner": learner.name,
        "run": str(learner.parent),
        "suite": suite,
        "metrics": found.metrics,
        "reasons": found.reasons,
        **found.more,
    }
    name = suite if max_tokens is None else f"{suite}-{max_tokens}"
    for array, values in found.arrays.items():
        file = io.BytesIO()
        np.save(file, values, allow_pickle=False)
        write_file(learner / "eval" / f"{name}_{array}.npy", file.getvalue())
    write_json(learner / "eval" / f"{name}.json", result)
    return result
