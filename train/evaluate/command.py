"""`train eval`: suites over the learners of runs, results beside each learner. A run is never changed by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.config import parse_count
from common.errors import ConfigError, StoreError, nearest
from common.files import write_json
from common.store import Store
from train.data.reader import Batches
from train.evaluate import SUITES
from train.saes import load_sae
from train.settings import saved_config
from train.trainer import load_plan, resolve_device


def evaluate_runs(
    runs: list[Path], suites: str, max_tokens: str | None, cache: Path | None, device: str
) -> list[dict[str, Any]]:
    """Evaluate every trained learner of `runs` (run or learner folders) with each suite; writes `eval/<suite>.json`.

    Raises:
        ConfigError: unknown suite, or a number that is none.
        StoreError: no trained SAE there, or the store is gone or changed.
    """
    names = suites.split(",")
    for name in names:
        if name not in SUITES:
            raise ConfigError(f"--suite {name}: no such suite.{nearest(name, SUITES)}")
    limit = parse_count(max_tokens) if max_tokens is not None else None
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"--max-tokens {max_tokens}: not a number of tokens.")
    results = []
    for folder in learner_folders(runs):
        results += [evaluate_learner(folder, name, limit, cache, device) for name in names]
    return results


def learner_folders(runs: list[Path]) -> list[Path]:
    """The learner folders that hold a trained SAE.

    Raises:
        StoreError: a path with none.
    """
    folders = []
    for run in runs:
        found = [run] if (run / "sae").is_dir() else sorted(path.parent for path in run.glob("*/sae"))
        if not found:
            raise StoreError(f"{run}: no finished learner here. If the run was stopped: train resume {run}")
        folders += found
    return folders


def evaluate_learner(
    folder: Path, suite: str, max_tokens: int | None, cache: Path | None, device: str
) -> dict[str, Any]:
    """One suite on one learner."""
    run = folder.parent
    config = saved_config(run, cache)
    store = Store.open(config.cache)
    plan = load_plan(run, store)
    assert plan is not None
    chosen = resolve_device(device)
    sae = load_sae(folder, str(chosen))
    batches = Batches(store, plan, chosen)
    try:
        metrics = SUITES[suite](sae, batches.held_out(sae.window, max_tokens))
    finally:
        batches.close()
    result = {"learner": folder.name, "run": str(run), "suite": suite, "metrics": metrics}
    write_json(folder / "eval" / f"{suite}.json", result)
    return result
