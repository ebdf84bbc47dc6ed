"""`train eval`: suites over the learners of runs, results beside each learner. A run is never changed by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import parse_count
from common.device import resolve_device
from common.errors import ConfigError, Interrupted, StoreError, nearest
from common.stopping import Stop
from common.store import Store
from train.data.batch import Batch
from train.data.reader import Batches
from train.evaluate import SUITES, write_evaluation
from train.prepare import load_plan
from train.saes import load_sae
from train.settings import saved_config


def evaluate_runs(
    runs: list[Path], suites: str, max_tokens: str | None, cache: Path | None, device: str, stop: Stop
) -> list[dict[str, Any]]:
    """Evaluate every trained learner of `runs` (run or learner folders) with each suite.

    Written as `eval/<suite>.json`; as `eval/<suite>-<tokens>.json` when `max_tokens` limits it.

    Raises:
        ConfigError: unknown suite, or a number that is none.
        StoreError: no trained SAE there, or the store is gone or changed.
        Interrupted: asked to stop; what was evaluated before is written.
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
        results += [evaluate_learner(folder, name, limit, cache, device, stop) for name in names]
    return results


def learner_folders(runs: list[Path]) -> list[Path]:
    """The learner folders that hold a trained SAE.

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


def evaluate_learner(
    folder: Path, suite: str, max_tokens: int | None, cache: Path | None, device: str, stop: Stop
) -> dict[str, Any]:
    """One suite on one learner."""
    run = folder.parent
    config = saved_config(run, cache)
    store = Store.open(config.cache)
    plan = load_plan(run, store)
    if plan is None:
        raise StoreError(f"{run}: no data plan here (no data.json), so its held-out documents are not known.")
    chosen = resolve_device(device)
    sae = load_sae(folder, str(chosen))
    batches = Batches(store, plan, chosen)
    try:
        metrics = SUITES[suite](sae, until_stopped(batches.held_out(sae.window, max_tokens), stop))
    finally:
        batches.close()
    return write_evaluation(folder, suite, metrics, max_tokens)


def until_stopped(batches: Iterator[Batch], stop: Stop) -> Iterator[Batch]:
    """The batches, as long as nobody asks to stop.

    Raises:
        Interrupted: somebody has.
    """
    for batch in batches:
        if stop.asked:
            raise Interrupted(f"stopped by {stop.signal_name} in an evaluation. Run the same command again.")
        yield batch
