"""A run: learners stepped together on one stream of batches. Names no variant.

    prepare    store -> data plan -> exact number of steps -> rehearsal of every learner
    train      learners fresh or from their checkpoints; step by step; metrics, checkpoints, signals, monitors
    finish     calibrate, fold, evaluate, save: `sae/` and `result.json` of each learner

As many learners as fit in memory are trained at once, the others after them on the very same batches.
Every way out leaves a recorded state with a reason.
"""

from __future__ import annotations

import functools
import time
import traceback
from typing import Any

from common.console import Progress, say
from common.device import resolve_device
from common.errors import ConfigError, GranaryError, Interrupted, TrainingError
from common.files import exclusive, write_json
from common.stopping import Stop
from common.store import Store
from train.checkpoint import prune
from train.config import FitConfig
from train.data.batch import Batch
from train.data.reader import Batches, plan_data, with_windows
from train.evaluate.heldout import evaluate_heldout
from train.finish import conclude, finish, finished_outcome
from train.learner import Learner
from train.monitors import ALARM_SHARE, ALARM_STEPS, alarms, dense_alarm, verdict
from train.preflight import learners_at_once, resolve_precision, resolve_steps
from train.prepare import bring, identity_of, load_plan, prepare, refuse_other_run
from train.record import Status
from train.run import (
    STATUS_FILE,
    Outcome,
    Run,
    end_learner,
    note_alarms,
    note_status,
    record_end,
    refuse_when_stopped,
    save_learner,
    scaled_batches,
)
from train.saes import settle_config
from train.schedule import Clock

HEARTBEAT_S = 5.0


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
    if not config.learner:
        raise ConfigError("no learner: name one with --variant, or [[learner]] in a TOML file. See: train variants")
    d_in = store.d_model(store.hook(config.hook))
    saes = {
        learner.name: settle_config(learner.variant, learner.options, d_in, store.context, f"learner '{learner.name}'")
        for learner in config.learner
    }
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
                saes=saes,
                d_in=d_in,
                device=device,
                precision=precision,
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
    seconds = {"prepare": 0.0, "train": 0.0, "finish": 0.0}
    steps_now = 0
    try:
        run.status.write()
        prepare(run)
        note_status(run)
        seconds["prepare"] = time.monotonic() - started
        at_once = learners_at_once(run.config, list(run.saes.values()), run.d_in, run.device)
        while waiting := [learner for learner in run.waiting() if learner.name not in run.failed]:
            refuse_when_stopped(run)
            begun = time.monotonic()
            run.learners = []  # those that ended make room first
            run.learners = [bring(run, config) for config in waiting[:at_once]]
            note_status(run)
            steps_now += run.amount.n_steps - min(learner.step for learner in run.learners)
            train(run)
            trained = time.monotonic()
            finish(run)
            run.failed |= {learner.name for learner in run.learners if learner.state == "failed"}
            seconds["train"] += trained - begun
            seconds["finish"] += time.monotonic() - trained
        return conclude(run, {stage: round(value, 3) for stage, value in seconds.items()}, steps_now)
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
        train_step(run, step)
        step += 1
        elapsed = time.monotonic() - started
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
            before = time.monotonic()
            learner.train_step(by_window[window], run.config.batch_size)
            learner.seconds += time.monotonic() - before
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
        if reason is not None and learner.sae.trained:
            end_learner(run, learner, "diverged", reason)
        elif learner.sae.trained:
            note_alarms(learner, alarms(metrics, getattr(learner.sae.config, "k", None), run.amount.n_steps))
    note_status(run)
    return lines


def checkpoint(run: Run, step: int) -> None:
    """Save every running learner that is at `step`, the best one known by its held-out explained variance."""
    for learner in run.active:
        if learner.step != step:
            continue
        folder = run.folder_of(learner.name) / "checkpoints"
        look = quick_look(run, learner) if step else {}
        ev = look.get("explained_variance")
        if learner.sae.trained and step > min(ALARM_SHARE * run.amount.n_steps, ALARM_STEPS):
            note_alarms(learner, dense_alarm(look.get("always_share", 0.0)))
        if learner.best_step is None or (ev is not None and (learner.best_ev is None or ev > learner.best_ev)):
            learner.best_ev, learner.best_step = ev, step
        save_learner(run, learner)
        write_json(folder / "best.json", {"step": learner.best_step, "heldout_explained_variance": learner.best_ev})
        prune(folder, learner.best_step, run.config.keep_every)


def quick_look(run: Run, learner: Learner) -> dict[str, float]:
    """Figures on a few held-out tokens, none where nothing is held out; the learner is not changed by it."""
    if not run.config.held_out:
        return {}
    window = learner.sae.window
    if window not in run.sample:
        run.sample[window] = list(run.batches.held_out(window, run.config.eval_tokens))
    return evaluate_heldout(learner.sae, run.sample[window])


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
