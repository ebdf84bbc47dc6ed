"""After the last step: calibrate, fold, evaluate and save; and how the whole run came out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from common.config import read_toml
from common.console import format_seconds, say
from common.errors import StoreError, TrainingError
from common.files import read_json, write_json
from common.store import Store
from train.config import FitConfig
from train.data.batch import Batch
from train.data.plan import DataPlan
from train.data.split import median_norm
from train.evaluate import write_evaluation
from train.evaluate.heldout import evaluate_heldout
from train.evaluate.subject import Evaluation
from train.learner import Learner
from train.prepare import plain
from train.run import (
    DATA_FILE,
    RESULT_FILE,
    RUN_FILE,
    STATUS_FILE,
    Outcome,
    Run,
    alone,
    note_ending,
    refuse_when_stopped,
    result_of,
    scaled_batches,
)
from train.saes import save_sae

NOT_DECISIVE = {
    "cache", "out", "device", "precision", "log_every", "checkpoint_every", "keep_every", "eval_tokens", "at_once",
    "parallel", "graphs",
}  # fmt: skip


def finish(run: Run) -> None:
    """Calibrate, fold, evaluate and save each learner that came to the end.

    Raises:
        Interrupted: asked to stop; the last checkpoints are whole and the same command goes on from them.
    """
    for learner in run.active:
        with alone(run, learner.config, "after the last step"):
            finish_learner(run, learner)


def finish_learner(run: Run, learner: Learner) -> None:
    """Leave `sae/`, `eval/heldout.json` and, last, `result.json`, if this process writes them."""
    sae = learner.whole_sae()
    settled = sae.calibrate(functools.partial(scaled_batches, run, learner))
    sae.fold()
    metrics: dict[str, Any] = {}
    folder = run.folder_of(learner.name)
    if run.config.held_out:
        held_out = run.batches.held_out(learner.sae.window, run.config.final_eval_tokens)
        metrics = evaluate_heldout(sae, until_stopped(run, held_out))
    ended = {"state": "finished", "reason": f"took all {learner.step:,} steps"}
    if run.ranks.writes:
        if metrics:
            write_evaluation(folder, "heldout", Evaluation(metrics))
        save_sae(sae, folder / "sae", sae_facts(run, learner))
        write_json(folder / RESULT_FILE, result_of(run, learner, metrics | {"calibration": settled}) | ended)
    learner.state, learner.reason = ended["state"], ended["reason"]  # once it is all on the disk


def until_stopped(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        refuse_when_stopped(run)
        yield batch


def sae_facts(run: Run, learner: Learner) -> dict[str, Any]:
    """Where a trained SAE comes from: what `sae/config.json` says beside the architecture."""
    return store_facts(run.store, run.plan) | {
        "training_steps": learner.step,
        "training_tokens": learner.step * run.config.batch_size,
        "lr": learner.peak_lr,
        "seed": learner.config.seed if learner.config.seed is not None else run.config.seed,
    }


def store_facts(store: Store, plan: DataPlan) -> dict[str, Any]:
    """What an SAE was trained on, so that its `sae/` can be understood without the store."""
    settings, identity = store.header["settings"], store.identity
    return {
        "units": "raw",
        "store": store.id,
        "model": settings["model"],
        "model_identity": identity["model"],
        "hook": plan.hook,
        "context": store.context,
        "bos": bool(identity.get("bos")),
        "corpus": settings.get("corpus"),
        "special_tokens": store.special_tokens,
        "median_norm": median_norm(store.as_of(plan.n_sequences), plan.hook, list(plan.chunks)),
    }


def conclude(run: Run) -> Outcome:
    """Record the end of a run whose learners have all ended, on every rank.

    Raises:
        TrainingError: none of them finished.
    """
    if run.ranks.writes:
        own = {config.name: run.result(config.name) or {} for config in run.config.learner if config.name in run.mine}
    else:
        own = {}
    shares = run.ranks.gather((own, run.sitting, run.batches.read_bytes))
    results = {name: result for found, _, _ in shares for name, result in found.items()}
    run.sitting = max((sitting for _, sitting, _ in shares), key=lambda sitting: sitting.steps)
    in_order = {config.name: results[config.name] for config in run.config.learner}
    return run.ranks.first_does(lambda: summed_up(run, in_order, sum(n_bytes for _, _, n_bytes in shares)))


def summed_up(run: Run, results: dict[str, dict[str, Any]], read_bytes: int) -> Outcome:
    """The outcome of a run from all its learners' results, recorded.

    Raises:
        TrainingError: none of them finished.
    """
    lost = {name: result for name, result in results.items() if result["state"] != "finished"}
    reason = f"{len(results) - len(lost)} of {len(results)} learners finished"
    if lost:
        reason += "; " + "; ".join(f"{name} {result['state']}: {result['reason']}" for name, result in lost.items())
    state = "finished" if len(lost) < len(results) else next(iter(lost.values()))["state"]
    note_ending(run, state, reason)
    seconds = {stage: round(value, 3) for stage, value in run.sitting.seconds.items()}
    train_s, tokens_now = max(run.sitting.seconds["train"], 1e-9), run.sitting.steps * run.config.batch_size
    outcome = Outcome(
        path=str(run.folder),
        state=state,
        reason=reason,
        steps=run.amount.n_steps,
        tokens=run.amount.n_steps * run.config.batch_size,
        seconds=seconds,
        tokens_per_s=round(tokens_now / train_s, 1) if tokens_now else None,
        bytes=read_bytes,
        wait_share=round(run.sitting.waited_s / train_s, 4),
        learners=results,
    )
    if state != "finished":
        raise TrainingError(f"{run.folder}: no learner finished. {reason}")
    if lost:
        say(f"{run.folder}: {reason} ({format_seconds(sum(seconds.values()))})")
    return outcome


def finished_outcome(config: FitConfig, store: Store) -> Outcome | None:
    """The outcome of a run on `store` that came to its end earlier, or None."""
    folder = config.run_folder()
    try:
        status, identity = read_json(folder / STATUS_FILE), read_json(folder / DATA_FILE)["identity"]
    except StoreError:
        return None
    if status["state"] != "finished" or identity["store"] != store.id:
        return None
    results = {}
    for learner in config.learner:
        path = folder / learner.name / RESULT_FILE
        if not path.exists():
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
        tokens=status["steps"] * config.batch_size,
        seconds={"prepare": 0.0, "train": 0.0, "finish": 0.0},
        tokens_per_s=None,
        bytes=0,
        wait_share=0.0,
        learners=results,
    )
