"""A run: learners stepped together on one stream of batches. Names no variant.

    prepare    store -> data plan -> exact number of steps -> learners, fresh or from their checkpoints -> rehearsal
    train      step by step; metrics, checkpoints, signals, monitors
    finish     calibrate, fold, evaluate, save: `sae/` and `result.json` of each learner

Every way out leaves a recorded state with a reason.
"""

from __future__ import annotations

import functools
import re
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch

from common.checks import difference
from common.config import build, read_toml
from common.console import Progress, format_seconds, say
from common.device import resolve_device
from common.errors import ConfigError, GranaryError, Interrupted, StoreError, TrainingError
from common.files import exclusive, read_json, write_file, write_json
from common.stopping import Stop
from common.store import Store
from train.checkpoint import newest_whole, prune, save_checkpoint
from train.config import DataConfig, FitConfig
from train.data.batch import Batch
from train.data.mixing import mixing
from train.data.reader import Batches, DataPlan, digest_of, plan_data, with_windows
from train.evaluate import write_evaluation
from train.evaluate.heldout import evaluate_heldout
from train.learner import Learner
from train.monitors import verdict
from train.preflight import Amount, rehearse, resolve_steps, starting_point
from train.record import Metrics, Status
from train.saes import make_sae, save_sae
from train.schedule import Clock

HEARTBEAT_S = 5.0
BEFORE_START = re.compile(r"\.lock|status\.json.*|run\.toml.*|data\.json\.aside|\.rehearsal-.*")  # a start cut short
LOOK_TOKENS = 200_000
NOT_DECISIVE = {"cache", "out", "device", "precision", "log_every", "checkpoint_every", "keep_every", "eval_tokens"}
RUN_FILE, DATA_FILE, STATUS_FILE, RESULT_FILE = "run.toml", "data.json", "status.json", "result.json"


@dataclass(frozen=True)
class Outcome:
    """What a run came to, for `--json` and for tests.

    Attributes:
        seconds: wall time this time, per stage: prepare, train, finish.
        tokens_per_s: tokens per second of the training stage, this time; None if no step was left.
        bytes: activations read.
        wait_share: share of the training stage spent waiting for data.
        learners: name to result.json.
    """

    path: str
    state: str
    reason: str
    steps: int
    tokens: int
    seconds: dict[str, float]
    tokens_per_s: float | None
    bytes: int
    wait_share: float
    learners: dict[str, dict[str, Any]]


@dataclass
class Run:
    """A run that is ready to be trained."""

    config: FitConfig
    folder: Path
    store: Store
    plan: DataPlan
    batches: Batches
    amount: Amount
    learners: list[Learner]
    status: Status
    stop: Stop
    identity: dict[str, Any]
    log_every: int
    checkpoint_every: int
    prepared: bool = False
    wait_share: float = 0.0
    sample: dict[int, list[Batch]] = field(default_factory=dict)

    @property
    def active(self) -> list[Learner]:
        return [learner for learner in self.learners if learner.state == "running"]

    def folder_of(self, learner: Learner) -> Path:
        return self.folder / learner.name

    def metrics_of(self, learner: Learner) -> Metrics:
        return Metrics(self.folder_of(learner) / "metrics.jsonl")


def fit(config: FitConfig, stop: Stop) -> Outcome:
    """Train, or go on with, the run that `config` describes.

    Raises:
        DataError: the store does not hold what was asked for; nothing is written.
        StoreError: the store is missing, damaged, or not the one the run began with.
        ConfigError: settings that do not fit, or another run in this folder.
        Interrupted: a signal; everything is checkpointed.
        TrainingError: every learner diverged or failed.
    """
    started = time.monotonic()
    store = Store.open(config.cache)
    folder = config.run_folder()
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out {folder}: {path} is a file, not a folder. Choose another --out.")
    done = finished_outcome(config, folder)
    if done is not None:
        say(f"{folder}: finished already, nothing to do. Another --out starts another run.")
        return done
    device = resolve_device(config.device)
    saes = {
        learner.name: make_sae(
            learner.variant,
            learner.options,
            store.d_model(store.hook(config.hook)),
            learner.seed if learner.seed is not None else config.seed,
            f"learner '{learner.name}'",
            store.context,
        )
        for learner in config.learner
    }
    if not saes:
        raise ConfigError("no learner: name one with --variant, or [[learner]] in a TOML file. See: train variants")
    windows = {sae.window for sae in saes.values()}
    plan = load_plan(folder, store) or plan_data(store, config.data(), config.seed, windows)
    plan = with_windows(store, plan, windows)
    batches = Batches(store, plan, device)
    try:
        amount = min(
            (resolve_steps(config, batches.windows_per_pass(window), window, store.path) for window in windows),
            key=lambda amount: amount.n_steps,
        )
        precision = resolve_precision(config.precision, device)
        learners = [
            Learner(learner, saes[learner.name], amount.n_steps, device, precision) for learner in config.learner
        ]
        identity = identity_of(config, store, plan, amount, precision)
        refuse_other_run(folder, config, identity)
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder, "run"):
            run = Run(
                config=config,
                folder=folder,
                store=store,
                plan=plan,
                batches=batches,
                amount=amount,
                learners=learners,
                status=Status(folder / STATUS_FILE, amount.n_steps),
                stop=stop,
                identity=identity,
                log_every=config.log_every or min(max(amount.n_steps // 100, 1), 100),
                checkpoint_every=config.checkpoint_every or min(max(amount.n_steps // 10, 100), 5000),
            )
            return carry_out(run, started)
    finally:
        batches.close()


def carry_out(run: Run, started: float) -> Outcome:
    """Prepare, train and finish; whatever happens is recorded."""
    try:
        run.status.write()
        prepare(run)
        prepared = time.monotonic()
        begun = min((learner.step for learner in run.active), default=run.amount.n_steps)
        train(run)
        trained = time.monotonic()
        results = finish(run)
        seconds = {
            "prepare": round(prepared - started, 3),
            "train": round(trained - prepared, 3),
            "finish": round(time.monotonic() - trained, 3),
        }
        return conclude(run, results, seconds, run.amount.n_steps - begun)
    except Interrupted as interrupted:
        record_end(run, "interrupted", str(interrupted))
        raise
    except TrainingError:
        raise  # recorded already, learner by learner
    except GranaryError as error:
        record_end(run, "failed", f"{type(error).__name__}: {error}")
        raise
    except BaseException as error:
        run.status.write(state="failed", reason=f"{type(error).__name__}: {error}")
        raise


# ---- prepare -------------------------------------------------------------------------------------------------


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def identity_of(
    config: FitConfig, store: Store, plan: DataPlan, amount: Amount, precision: torch.dtype
) -> dict[str, Any]:
    """What decides every bit of the run, learners apart."""
    return {
        "store": store.id,
        "hook": plan.hook,
        "data": plan.digest,
        "data_settings": config.data().model_dump(mode="json"),
        "n_steps": amount.n_steps,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "precision": str(precision).removeprefix("torch."),
    }


def refuse_other_run(folder: Path, config: FitConfig, identity: dict[str, Any]) -> None:
    """A run folder belongs to one run; learners may be added to it, and keep their settings.

    Raises:
        ConfigError: another run lies there; the message is the difference.
    """
    if not (folder / DATA_FILE).exists():
        if folder.exists() and not all(BEFORE_START.fullmatch(path.name) for path in folder.iterdir()):
            raise ConfigError(f"--out {folder}: the folder holds something that is not a run. Choose another --out.")
        return
    lines = difference(read_json(folder / DATA_FILE)["identity"], identity)
    stored = {learner["name"]: learner for learner in read_toml(folder / RUN_FILE)["learner"]}
    for learner in config.learner:
        if learner.name in stored:
            lines += difference(stored[learner.name], plain(learner.model_dump(mode="json")), f"{learner.name}.")
    missing = set(stored) - {learner.name for learner in config.learner}
    lines += [f"{name}: in the run, not asked for" for name in sorted(missing)]
    if lines:
        raise ConfigError(
            f"--out {folder}: another run is there (stored → asked): {'; '.join(lines)}. "
            "Choose another --out, or give the same settings to go on with it."
        )


def plain(value: Any) -> Any:
    """Without None at any depth, which TOML cannot say."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if inner is not None}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def load_plan(folder: Path, store: Store) -> DataPlan | None:
    """The data plan that a run began with, or None for a new run.

    Raises:
        StoreError: the store's chunks are not what they were.
    """
    if not (folder / DATA_FILE).exists():
        return None
    values = read_json(folder / DATA_FILE)["plan"]
    chunks = tuple(values["chunks"])
    if values["store_id"] != store.id:
        raise StoreError(
            f"{folder}: it was trained on another store than {store.path}. "
            "Name that one with --cache, or start another run with --out."
        )
    store = store.as_of(values["n_sequences"])
    gone = set(chunks) - set(store.usable_chunks(values["hook"]))
    if gone:
        raise StoreError(
            f"{store.path}: chunk {min(gone)}, which the run in {folder} reads, is not there. "
            f"Run: harvest verify {store.path} --repair"
        )
    if digest_of(store, values["hook"], chunks) != values["digest"]:
        raise StoreError(
            f"{store.path}: its data changed since the run in {folder} began, so it cannot go on exactly. "
            "Start another run with --out."
        )
    return DataPlan(
        **values
        | {
            "chunks": chunks,
            "windows": {int(window): tuple(counts) for window, counts in values["windows"].items()},
            "config": build(DataConfig, values["config"], str(folder / DATA_FILE)),
        }
    )


def write_plan(run: Run) -> None:
    """`run.toml`, the resolved settings, and `data.json`, the data plan."""
    settings = plain(run.config.model_dump(mode="json"))
    write_file(run.folder / RUN_FILE, tomli_w.dumps(settings).encode())
    plan = asdict(run.plan) | {"config": run.plan.config.model_dump(mode="json")}
    window = min(run.plan.windows)
    mixed = mixing(run.batches, max(run.config.batch_size // window, 1), window)
    say(f"{run.folder}: batches mix documents at {mixed:.1%} of an ideal shuffle's entropy")
    write_json(run.folder / DATA_FILE, {"identity": run.identity, "plan": plan, "mixing": mixed})


def prepare(run: Run) -> None:
    """Bring every learner to where it was, or rehearse and start it."""
    fresh = [learner for learner in run.learners if not restore(run, learner)]
    if fresh:
        scale, b_dec = starting_point(run.batches, run.plan)
        for learner in fresh:
            learner.sae.start(scale, b_dec.to(learner.device))
            for leftover in run.folder.glob(".rehearsal-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if not run.stop.asked:
                reason = rehearse(learner, run.batches, run.config, run.folder)
                if reason is not None:
                    end_learner(run, learner, "diverged", reason)
    write_plan(run)
    for learner in run.learners:
        folder = run.folder_of(learner)
        folder.mkdir(exist_ok=True)
        write_json(folder / "config.json", learner.config.model_dump(mode="json") | learner.sae.describe())
        run.metrics_of(learner).keep_until(learner.step)
    run.prepared = True
    note_status(run)


def restore(run: Run, learner: Learner) -> bool:
    """Load the learner's newest whole checkpoint, or the end that its result records; False if it is new.

    One that failed is tried again: what was missing (memory, say) may be there now.

    Raises:
        StoreError: checkpoints are there, but none is whole, or they belong to another run.
    """
    folder = run.folder_of(learner)
    result: dict[str, Any] = read_json(folder / RESULT_FILE) if (folder / RESULT_FILE).exists() else {}
    if result.get("state", "failed") != "failed":
        learner.state, learner.reason, learner.step = result["state"], result["reason"], result["training_steps"]
        return True
    found, skipped = newest_whole(folder / "checkpoints")
    for line in skipped:
        say(f"{learner.name}: {line}")
    if found is None:
        if skipped:
            raise StoreError(f"{folder}/checkpoints: no whole checkpoint is left. Remove {run.folder} to start again.")
        return False
    lines = difference(found.facts["identity"], identity_with(run, learner))
    if lines:
        raise StoreError(
            f"{found.path}: it belongs to another run (stored → asked): {'; '.join(lines)}. "
            f"Remove {folder} to train this learner anew."
        )
    learner.restore(found.tensors, found.facts)
    say(f"{learner.name}: going on from step {learner.step:,} of {run.amount.n_steps:,}")
    return True


# ---- train ---------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Step until every learner is done.

    Raises:
        Interrupted: asked to stop; every learner is checkpointed first.
    """
    n_steps = run.amount.n_steps
    step = min((learner.step for learner in run.active), default=n_steps)
    progress = Progress("train", n_steps, step)
    started, beat, first = time.monotonic(), time.monotonic(), step
    waited_s = run.batches.waited_s
    lines: dict[str, dict[str, Any]] = {}
    while step < n_steps and run.active:
        if run.stop.asked:
            break
        before = time.monotonic()
        train_step(run, step)
        step += 1
        elapsed = time.monotonic() - started
        for learner in run.active:
            learner.seconds += time.monotonic() - before
        rate = (step - first) * run.config.batch_size / elapsed
        run.wait_share = round(min((run.batches.waited_s - waited_s) / max(elapsed, 1e-9), 1.0), 4)
        if step % run.log_every == 0 or step == n_steps:
            lines |= log(run, step, rate)
        if step % run.checkpoint_every == 0 and step < n_steps:
            checkpoint(run, step)
        if time.monotonic() - beat > HEARTBEAT_S:
            beat = time.monotonic()
            note_status(run)
        progress.update(step, describe(run, lines, rate, elapsed))
    checkpoint(run, step)
    note_status(run)
    if step < n_steps and run.stop.asked:
        raise Interrupted(
            f"stopped by {run.stop.signal_name} at step {step:,} of {n_steps:,}. Go on with: train resume {run.folder}"
        )
    if step > first:
        elapsed = time.monotonic() - started
        rate = (step - first) * run.config.batch_size / elapsed
        progress.close(step, describe(run, lines, rate, elapsed))


def train_step(run: Run, step: int) -> None:
    """Batch number `step` to every learner that is there; one that breaks ends alone."""
    by_window: dict[int, Batch] = {}
    for learner in run.active:
        if learner.step != step:
            continue
        window = learner.sae.window
        try:
            if learner.at_landmark():
                learner.revise(functools.partial(scaled_batches, run, learner), run.config.batch_size)
            if window not in by_window:
                batch = run.batches.batch(step, run.config.batch_size // window, window, reuse=True)
                by_window[window] = batch.with_x(batch.x.float())
            learner.train_step(by_window[window], run.config.batch_size)
        except RuntimeError as error:
            say(traceback.format_exc())
            first = str(error).splitlines()[0] if str(error) else ""
            end_learner(run, learner, "failed", f"{type(error).__name__} at step {step}: {first}")


def log(run: Run, step: int, rate: float) -> dict[str, dict[str, Any]]:
    """Write each learner's metrics line, and end those that are beyond hope."""
    lines = {}
    for learner in run.active:
        if learner.step != step or "steps" not in learner.sums.values:
            continue  # behind, or restored at this very step with its line already written
        metrics = learner.read_metrics()
        clock = Clock(step - 1, run.amount.n_steps, run.config.batch_size)  # the step these metrics end with
        metrics |= {
            "tokens": step * run.config.batch_size,
            "lr": learner.lr(clock),
            "tokens_per_s": round(rate, 1),
            "wait_share": run.wait_share,
        }
        run.metrics_of(learner).append(metrics)
        lines[learner.name] = metrics
        reason = verdict(metrics, learner.judged_ev, int(learner.quiet_steps[1]), run.amount.n_steps)
        if reason is not None:
            end_learner(run, learner, "diverged", reason)
    note_status(run)
    return lines


def end_learner(run: Run, learner: Learner, state: str, reason: str) -> None:
    """Take a learner out of the run, with its result written."""
    learner.state, learner.reason = state, reason
    say(f"{learner.name}: {state}: {reason}")
    write_json(run.folder_of(learner) / RESULT_FILE, result_of(run, learner, {}))


def checkpoint(run: Run, step: int) -> None:
    """Save every running learner that is at `step`, the best one known by its held-out explained variance."""
    for learner in run.active:
        if learner.step != step:
            continue
        folder = run.folder_of(learner) / "checkpoints"
        ev = quick_ev(run, learner) if step else None
        if learner.best_step is None or (ev is not None and (learner.best_ev is None or ev > learner.best_ev)):
            learner.best_ev, learner.best_step = ev, step
        save_learner(run, learner)
        write_json(folder / "best.json", {"step": learner.best_step, "heldout_explained_variance": learner.best_ev})
        prune(folder, learner.best_step, run.config.keep_every)


def save_learner(run: Run, learner: Learner) -> None:
    """A checkpoint of one learner where it stands."""
    folder = run.folder_of(learner) / "checkpoints"
    save_checkpoint(folder, learner.step, learner.tensors(), learner.facts(), identity_with(run, learner))


def identity_with(run: Run, learner: Learner) -> dict[str, Any]:
    """What decides every bit of one learner."""
    return run.identity | {"learner": learner.config.model_dump(mode="json")}


def quick_ev(run: Run, learner: Learner) -> float | None:
    """Explained variance on a few held-out tokens; the learner is not changed by it."""
    if not run.config.held_out:
        return None
    window = learner.sae.window
    if window not in run.sample:
        run.sample[window] = list(run.batches.held_out(window, run.config.eval_tokens))
    return float(evaluate_heldout(learner.sae, run.sample[window])["explained_variance"])


def describe(run: Run, lines: dict[str, dict[str, Any]], rate: float, elapsed: float) -> str:
    """`topk loss 0.12 L0 32 EV 0.91 · 21,000 tok/s · 0.02 GB/s · waited 1 %`."""
    parts = [
        f"{name} loss {line['loss']:.4f} L0 {line['l0']:.1f} EV {line['explained_variance'] or 0:.3f}"
        for name, line in list(lines.items())[:3]
    ]
    if len(lines) > 3:
        parts.append(f"+{len(lines) - 3} more")
    speed = f"{rate:,.0f} tok/s · {run.batches.read_bytes / max(elapsed, 1e-9) / 1e9:.3f} GB/s"
    return " · ".join([*parts, speed, f"waited {run.wait_share:.0%}"])


# ---- finish --------------------------------------------------------------------------------------------------


def finish(run: Run) -> dict[str, dict[str, Any]]:
    """Calibrate, fold, evaluate and save each learner that came to the end; the results of all.

    Raises:
        Interrupted: asked to stop; the last checkpoints are whole and the same command goes on from them.
    """
    for learner in run.active:
        settled = learner.sae.calibrate(functools.partial(scaled_batches, run, learner))
        learner.sae.fold()
        metrics: dict[str, Any] = {}
        if run.config.held_out:
            held_out = run.batches.held_out(learner.sae.window, run.config.final_eval_tokens)
            metrics = evaluate_heldout(learner.sae, until_stopped(run, held_out))
            write_evaluation(run.folder_of(learner), "heldout", metrics)
        learner.state, learner.reason = "finished", f"took all {learner.step:,} steps"
        save_sae(learner.sae, run.folder_of(learner) / "sae", sae_facts(run, learner))
        write_json(run.folder_of(learner) / RESULT_FILE, result_of(run, learner, metrics | {"calibration": settled}))
    return {learner.name: read_json(run.folder_of(learner) / RESULT_FILE) for learner in run.learners}


def scaled_batches(run: Run, learner: Learner) -> Iterator[Batch]:
    """The first 200k training tokens, or all of fewer, in scaled units: what thresholds and landmarks look at.

    Raises:
        Interrupted: asked to stop.
    """
    window, batch_size = learner.sae.window, run.config.batch_size
    tokens = min(LOOK_TOKENS, run.batches.windows_per_pass(window) * window)
    for step in range(max(tokens // batch_size, 1)):
        until_stopped_check(run)
        batch = run.batches.batch(step, batch_size // window, window)
        yield batch.with_x(batch.x.float() * learner.sae.scale)


def until_stopped(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        until_stopped_check(run)
        yield batch


def until_stopped_check(run: Run) -> None:
    if run.stop.asked:
        raise Interrupted(
            f"stopped by {run.stop.signal_name} after the last step, before the last evaluation. "
            f"Go on with: train resume {run.folder}"
        )


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


def result_of(run: Run, learner: Learner, metrics: dict[str, Any]) -> dict[str, Any]:
    """`result.json`."""
    return {
        "name": learner.name,
        "variant": learner.config.variant,
        "state": learner.state,
        "reason": learner.reason,
        "training_steps": learner.step,
        "requested_steps": run.amount.n_steps,
        "tokens_seen": learner.step * run.config.batch_size,
        "final_loss": learner.final_loss,
        "passes": learner.step / run.amount.n_steps * run.amount.passes,
        "lr": learner.peak_lr,
        "seconds": round(learner.seconds, 3),
        "best_heldout_explained_variance": learner.best_ev,
        "metrics": metrics or None,
    }


def note_status(run: Run) -> None:
    """Write status.json as things stand."""
    step = max((learner.step for learner in run.learners), default=0)
    losses = [loss for learner in run.learners if (loss := learner.final_loss) is not None]
    run.status.write(
        step=step,
        tokens_seen=step * run.config.batch_size,
        last_loss=losses[-1] if losses else None,
        learners={
            learner.name: {"state": learner.state, "reason": learner.reason, "step": learner.step}
            for learner in run.learners
        },
    )


def record_end(run: Run, state: str, reason: str) -> None:
    """Checkpoint what runs, if it can be, and record why the run ended."""
    try:
        for learner in run.active if run.prepared else []:  # before that, weights are not started or not restored
            save_learner(run, learner)
    except GranaryError as error:
        reason = f"{reason} (and no checkpoint could be written: {error})"
    note_status(run)
    run.status.write(state=state, reason=reason)


def conclude(run: Run, results: dict[str, dict[str, Any]], seconds: dict[str, float], steps_now: int) -> Outcome:
    """Record the end of a run whose learners have all ended.

    Raises:
        TrainingError: none of them finished.
    """
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
