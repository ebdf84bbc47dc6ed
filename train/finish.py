"""After the last step: calibrate, fold, evaluate and save; and how the whole run came out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import read_toml
from common.console import format_seconds, say
from common.errors import StoreError, TrainingError
from common.files import read_json, write_json
from train.config import FitConfig
from train.data.batch import Batch
from train.evaluate import write_evaluation
from train.evaluate.heldout import evaluate_heldout
from train.learner import Learner
from train.prepare import plain
from train.run import (
    RESULT_FILE,
    RUN_FILE,
    STATUS_FILE,
    Outcome,
    Run,
    note_status,
    refuse_when_stopped,
    result_of,
    scaled_batches,
)
from train.saes import save_sae

NOT_DECISIVE = {
    "cache", "out", "device", "precision", "log_every", "checkpoint_every", "keep_every", "eval_tokens", "at_once",
}  # fmt: skip


def finish(run: Run) -> None:
    """Calibrate, fold, evaluate and save each learner that came to the end.

    Raises:
        Interrupted: asked to stop; the last checkpoints are whole and the same command goes on from them.
    """
    for learner in run.active:
        settled = learner.sae.calibrate(functools.partial(scaled_batches, run, learner))
        learner.sae.fold()
        metrics: dict[str, Any] = {}
        folder = run.folder_of(learner.name)
        if run.config.held_out:
            held_out = run.batches.held_out(learner.sae.window, run.config.final_eval_tokens)
            metrics = evaluate_heldout(learner.sae, until_stopped(run, held_out))
            write_evaluation(folder, "heldout", metrics)
        learner.state, learner.reason = "finished", f"took all {learner.step:,} steps"
        save_sae(learner.sae, folder / "sae", sae_facts(run, learner))
        write_json(folder / RESULT_FILE, result_of(run, learner, metrics | {"calibration": settled}))


def until_stopped(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        refuse_when_stopped(run)
        yield batch


def sae_facts(run: Run, learner: Learner) -> dict[str, Any]:
    """Where a trained SAE comes from: what `sae/config.json` says beside the architecture."""
    settings = run.store.header["settings"]
    return {
        "units": "raw",
        "store": run.store.id,
        "model": settings["model"],
        "model_identity": run.store.identity["model"],
        "hook": run.plan.hook,
        "context": run.store.context,
        "special_tokens": run.store.special_tokens,
        "training_steps": learner.step,
        "training_tokens": learner.step * run.config.batch_size,
        "lr": learner.peak_lr,
        "seed": learner.config.seed if learner.config.seed is not None else run.config.seed,
    }


def conclude(run: Run, seconds: dict[str, float], steps_now: int) -> Outcome:
    """Record the end of a run whose learners have all ended.

    Args:
        steps_now: steps taken this time, of all groups of learners together.

    Raises:
        TrainingError: none of them finished.
    """
    results = {config.name: run.result(config.name) or {} for config in run.config.learner}
    lost = {name: result for name, result in results.items() if result["state"] != "finished"}
    reason = f"{len(results) - len(lost)} of {len(results)} learners finished"
    if lost:
        reason += "; " + "; ".join(f"{name} {result['state']}: {result['reason']}" for name, result in lost.items())
    state = "finished" if len(lost) < len(results) else next(iter(lost.values()))["state"]
    note_status(run)
    run.status.write(state=state, reason=reason)
    tokens_now = steps_now * run.config.batch_size
    outcome = Outcome(
        path=str(run.folder),
        state=state,
        reason=reason,
        steps=run.amount.n_steps,
        tokens=run.amount.n_steps * run.config.batch_size,
        seconds=seconds,
        tokens_per_s=round(tokens_now / seconds["train"], 1) if steps_now and seconds["train"] else None,
        bytes=run.batches.read_bytes,
        wait_share=run.wait_share,
        learners=results,
    )
    if state != "finished":
        raise TrainingError(f"{run.folder}: no learner finished. {reason}")
    if lost:
        say(f"{run.folder}: {reason} ({format_seconds(sum(seconds.values()))})")
    return outcome


def finished_outcome(config: FitConfig, folder: Path) -> Outcome | None:
    """The outcome of a run that came to its end earlier, or None."""
    try:
        status = read_json(folder / STATUS_FILE)
    except StoreError:
        return None
    results = {}
    for learner in config.learner:
        path = folder / learner.name / RESULT_FILE
        if status["state"] != "finished" or not path.exists():
            return None
        results[learner.name] = read_json(path)
        if results[learner.name]["state"] == "failed":
            return None  # it is tried again
    stored, asked = read_toml(folder / RUN_FILE), plain(config.model_dump(mode="json"))
    if any(stored.get(key) != asked.get(key) for key in stored.keys() | asked.keys() if key not in NOT_DECISIVE):
        return None  # the comparison with all its words comes later
    return Outcome(
        path=str(folder),
        state=status["state"],
        reason=status["reason"],
        steps=status["steps"],
        tokens=status["tokens_seen"],
        seconds={"prepare": 0.0, "train": 0.0, "finish": 0.0},
        tokens_per_s=None,
        bytes=0,
        wait_share=0.0,
        learners=results,
    )
