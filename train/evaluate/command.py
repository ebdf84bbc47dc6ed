"""`train eval`: suites over the learners of runs, results beside each learner. A run is never changed by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.console import Progress
from common.device import resolve_device
from common.errors import ConfigError, StoreError, nearest
from common.files import read_json
from common.stopping import Stop
from common.store import Store
from train.config import EvalConfig
from train.data.reader import Batches
from train.evaluate import SUITES, write_evaluation
from train.evaluate.subject import Models, Subject
from train.folders import learner_folders
from train.prepare import load_plan
from train.saes import load_sae
from train.settings import saved_config


def evaluate_runs(runs: list[Path], config: EvalConfig, stop: Stop) -> list[dict[str, Any]]:
    """Evaluate every trained learner of `runs` (run or learner folders) with each suite.

    Written as `eval/<suite>.json`; as `eval/<suite>-<tokens>.json` when `max_tokens` limits it.

    Raises:
        ConfigError: unknown suite.
        StoreError: no trained SAE there, or the store is gone or changed.
        Interrupted: asked to stop; what was evaluated before is written.
    """
    for name in config.suites():
        if name not in SUITES:
            raise ConfigError(f"--suite {name}: no such suite.{nearest(name, SUITES)}")
    models = Models(resolve_device(config.device))
    results: list[dict[str, Any]] = []
    folders = learner_folders(runs)
    progress = Progress("eval", len(folders) * len(config.suites()))
    for folder in folders:
        with subject_of(folder, config, models, stop) as subject:
            for name in config.suites():
                told = teller(progress, len(results), f"{name} of {folder.name}")
                found = SUITES[name](replace(subject, tell=told))
                results.append(write_evaluation(folder, name, found, config.max_tokens))
    progress.close(len(results), f"results: {len(results)}")
    return results


def teller(progress: Progress, done: int, what: str) -> Callable[[int], None]:
    """Draws `eval 25 % · heldout of topk · 8,192 tokens`; once at the start too."""

    def tell(tokens: int) -> None:
        progress.update(done, f"{what} · {tokens:,} tokens")

    progress.update(done, what)
    return tell


@contextmanager
def subject_of(folder: Path, config: EvalConfig, models: Models, stop: Stop) -> Iterator[Subject]:
    """One learner, ready to be looked at, with its store open.

    Raises:
        StoreError: no SAE or data plan there, or the store is gone or changed.
    """
    store = Store.open(saved_config(folder.parent, config.cache).cache)
    plan = load_plan(folder.parent, store)
    if plan is None:
        raise StoreError(f"{folder.parent}: no data plan here (no data.json), so its held-out documents are not known.")
    sae = load_sae(folder, str(models.device))
    batches = Batches(store, plan, models.device)
    try:
        facts = read_json(folder / "sae" / "config.json")
        yield Subject(folder, sae, facts, batches, config, models.device, models, stop)
    finally:
        batches.close()
