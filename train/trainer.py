"""A run: learners stepped together on one stream of batches. Names no variant.

    prepare    store -> data plan -> exact number of steps -> rehearsal of every learner
    train      learners fresh or from their checkpoints; step by step; metrics, checkpoints, signals, monitors
    finish     calibrate, fold, evaluate, save: `sae/` and `result.json` of each learner

As many learners as fit in memory are trained at once, the others after them on the very same batches.
Every way out leaves a recorded state with a reason.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.console import Progress, say
from common.device import resolve_device
from common.errors import ConfigError, GranaryError, Interrupted, TrainingError
from common.files import exclusive, write_json
from common.stopping import Stop
from common.store import Store
from train.config import FitConfig, LearnerConfig
from train.data.batch import Batch
from train.data.plan import DataPlan, plan_data, with_windows
from train.data.reader import Batches
from train.evaluate.heldout import evaluate_heldout
from train.finish import conclude, finish, finished_outcome
from train.folders import blamed
from train.learner import Learner
from train.monitors import ALARM_SHARE, ALARM_STEPS, alarms, dense_alarm, verdict
from train.preflight import learners_at_once
from train.prepare import (
    bring,
    load_plan,
    make_run,
    prepare,
    refuse_unsharded,
    refuse_unsplit,
    settle_learners,
    stand_together,
    windows_of,
)
from train.ranks import ALONE, RankLost, Ranks
from train.run import (
    Outcome,
    Run,
    alone,
    end_learner,
    note_alarms,
    note_ending,
    note_status,
    record_end,
    refuse_when_stopped,
    save_learner,
    scaled_batches,
)
from train.schedule import Clock

HEARTBEAT_S = 5.0


def fit(config: FitConfig, stop: Stop, ranks: Ranks = ALONE) -> Outcome:
    """Train, or go on with, the run that `config` describes.

    Of several ranks each calls this with the same `config`, and each gets the outcome of them all.

    Raises:
        DataError: the store does not hold what was asked for; nothing is written.
        StoreError: the store is missing, damaged, or not the one the run began with.
        ConfigError: settings that do not fit, or another run in this folder.
        Interrupted: a signal; everything is checkpointed.
        TrainingError: every learner diverged or failed.
    """
    started = time.monotonic()
    ranks = ranks.sharing(config.shared_by())
    folder = config.run_folder()
    done = ranks.first_does(lambda: look_at(config, folder))
    if done is not None:
        return done
    device = ranks.together(lambda: ranks.device(resolve_device(config.device)))
    plan = ranks.first_does(lambda: make_plan(config, folder, ranks))
    ranks = ranks.linked(device)
    store = ranks.together(lambda: Store.open(config.cache))  # after the plan: it may have grown until then
    saes = settle_learners(config, store)
    with contextlib.closing(Batches(store, plan, device)) as batches:
        run = ranks.together(lambda: make_run(config, store, batches, saes, device, stop, ranks))
        with holding(folder, ranks):
            return carry_out(run, started)


def look_at(config: FitConfig, folder: Path) -> Outcome | None:
    """The outcome of a run that is finished already, if it is.

    Raises:
        ConfigError: the run folder cannot be one.
        StoreError: its files are of another form than a run's.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out {folder}: {path} is a file, not a folder. Choose another --out.")
    store = Store.open(config.cache)
    with blamed(folder):
        done = finished_outcome(config, store)
    if done is not None:
        say(f"{folder}: finished already, nothing to do. Another --out starts another run.")
    return done


def make_plan(config: FitConfig, folder: Path, ranks: Ranks) -> DataPlan:
    """The data plan of the run in `folder`, or of a new one.

    Raises:
        ConfigError: settings that do not fit the store, or ranks among which batches cannot be split.
    """
    store = Store.open(config.cache)
    saes = settle_learners(config, store)
    windows = windows_of(saes)
    if ranks.in_step:
        refuse = refuse_unsplit if ranks.mode == "batch" else refuse_unsharded
        refuse(config, saes, ranks.size)
    plan = load_plan(folder, store) or plan_data(store, config.data(), config.seed, windows)
    return with_windows(store, plan, windows)


@contextlib.contextmanager
def holding(folder: Path, ranks: Ranks) -> Iterator[None]:
    """The run folder held against other runs, by rank 0 first and then by all ranks.

    Raises:
        StoreError: another process writes there.
    """
    with contextlib.ExitStack() as held:

        def hold() -> None:
            let_in = held.enter_context(exclusive(folder, "run", joining=not ranks.first))
            if ranks.size > 1:
                let_in()

        ranks.first_does(hold)
        if not ranks.first:
            hold()
        yield


def carry_out(run: Run, started: float) -> Outcome:
    """Prepare, train and finish; whatever happens is recorded."""
    try:
        run.status.write()
        prepare(run)
        note_status(run)
        run.sitting.seconds["prepare"] = time.monotonic() - started
        fit_here = learners_at_once(run.config, list(run.saes.values()), run.d_in, run.device, run.ranks.local_size)
        at_once = min(run.ranks.gather(fit_here))  # ranks in step must take the same ones, however much memory each has
        run.ranks.begin(run.stop)
        while waiting := run.waiting():
            refuse_when_stopped(run)
            take_round(run, waiting[:at_once])
        note_status(run)
        run.ranks.all_done(run.stop, Heartbeat(run).beat)
        return conclude(run)
    except RankLost as lost:
        note_ending(run, "interrupted", str(lost))
        raise
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


def take_round(run: Run, configs: list[LearnerConfig]) -> None:
    """Bring some learners to their place, train them to the last step, and finish them."""
    begun, waited_s = time.monotonic(), run.batches.waited_s
    run.learners = []  # those that ended made room first
    for config in configs:
        with alone(run, config, "before its first step"):
            run.learners.append(bring(run, config))
    stand_together(run)
    note_status(run)
    train(run)
    trained = time.monotonic()
    run.sitting.waited_s += run.batches.waited_s - waited_s
    finish(run)
    run.sitting.seconds["train"] += trained - begun
    run.sitting.seconds["finish"] += time.monotonic() - trained


class Heartbeat:
    """status.json written anew every few seconds."""

    def __init__(self, run: Run) -> None:
        self.run, self.last = run, time.monotonic()

    def beat(self) -> None:
        """Write it, if it is time to."""
        if time.monotonic() - self.last > HEARTBEAT_S:
            self.last = time.monotonic()
            note_status(self.run)


class Pace:
    """How fast a round goes, from its first step on."""

    def __init__(self, batches: Batches, step: int, batch_tokens: int) -> None:
        self.batches, self.first, self.batch_tokens = batches, step, batch_tokens
        self.started, self.waited_s, self.read_bytes = time.monotonic(), batches.waited_s, batches.read_bytes

    @property
    def elapsed(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def tokens_per_s(self, step: int) -> float:
        return (step - self.first) * self.batch_tokens / self.elapsed

    def bytes_per_s(self) -> float:
        return (self.batches.read_bytes - self.read_bytes) / self.elapsed

    def wait_share(self) -> float:
        """Share of the time spent waiting for data."""
        return round(min((self.batches.waited_s - self.waited_s) / self.elapsed, 1.0), 4)


def train(run: Run) -> None:
    """Step until every learner is done.

    Raises:
        Interrupted: asked to stop; every learner is checkpointed first.
    """
    n_steps = run.amount.n_steps
    first = step = min((learner.step for learner in run.active), default=n_steps)
    label = f"train, rank 0 of {run.ranks.size}" if run.ranks.size > 1 else "train"
    progress = Progress(label, n_steps, step, shown=run.ranks.first)
    pace, heartbeat = Pace(run.batches, step, run.config.batch_size), Heartbeat(run)
    lines: dict[str, dict[str, Any]] = {}
    while step < n_steps and run.active:
        if run.stop.asked:
            break
        train_step(run, step)
        step += 1
        if step % run.log_every == 0 or step == n_steps:
            lines |= log(run, step, pace)
        if step % run.checkpoint_every == 0 and step < n_steps:
            checkpoint(run, step)
        heartbeat.beat()
        progress.update(step, describe(lines, progress.rate(step) * run.config.batch_size, pace))
    run.sitting.steps += step - first
    if step < n_steps and run.stop.asked:  # saved by `record_end`, not looked at: nothing is to depend on stops
        raise Interrupted(
            f"stopped by {run.stop.signal_name} at step {step:,} of {n_steps:,}. Go on with: train resume {run.folder}"
        )
    checkpoint(run, step)
    note_status(run)
    if step > first:
        progress.close(step, describe(lines, pace.tokens_per_s(step), pace))


def train_step(run: Run, step: int) -> None:
    """Batch number `step` to every learner that is there; one that breaks ends alone."""
    stepping = [learner for learner in run.active if learner.step == step]
    batches: dict[int, Batch] = {}  # held until all are done: the reading thread would be given their memory on a GPU
    try:
        queue_steps(run, stepping, step, batches)
    finally:
        for learner in stepping:
            learner.join()


def queue_steps(run: Run, stepping: list[Learner], step: int, by_window: dict[int, Batch]) -> None:
    """A step of each, on batches by the length of their windows, which are put into `by_window`."""
    for learner in stepping:
        window = learner.sae.window
        with alone(run, learner.config, f"at step {step}"):
            if learner.at_landmark():
                with timed(learner):
                    learner.revise(functools.partial(scaled_batches, run, learner), run.config.batch_size)
            if window not in by_window:
                batch = run.rows(step, window, reuse=True)
                by_window[window] = batch.with_x(batch.x.float())
            with timed(learner), run.sharing():
                learner.queue_step(by_window[window], run.config.batch_size)


@contextlib.contextmanager
def timed(learner: Learner) -> Iterator[None]:
    """Count what is done in here as the learner's own time."""
    before = time.monotonic()
    yield
    learner.seconds += time.monotonic() - before


def log(run: Run, step: int, pace: Pace) -> dict[str, dict[str, Any]]:
    """Write each learner's metrics line, and end those that are beyond hope."""
    lines = {}
    for learner in run.active:
        if learner.step != step or not learner.tally.sums.steps:
            continue  # behind, or restored at this very step with its line already written
        metrics = learner.read_metrics()
        clock = Clock(step - 1, run.amount.n_steps, run.config.batch_size)  # the step these metrics end with
        metrics |= {
            "tokens": step * run.config.batch_size,
            "lr": learner.lr(clock),
            "tokens_per_s": round(pace.tokens_per_s(step), 1),
            "wait_share": pace.wait_share(),
        }
        if run.ranks.writes:
            run.metrics_of(learner).append(metrics)
        lines[learner.name] = metrics
        reason = verdict(metrics, learner.tally.judged_ev, int(learner.tally.quiet_steps[1]), run.amount.n_steps)
        if reason is not None and learner.sae.trained:
            end_learner(run, learner.config, "diverged", reason)
        elif learner.sae.trained:
            note_alarms(run, learner, alarms(metrics, getattr(learner.sae.config, "k", None), run.amount.n_steps))
    note_status(run)
    return lines


def checkpoint(run: Run, step: int) -> None:
    """Look at and save every running learner that is at `step`."""
    for learner in run.active:
        if learner.step == step:
            with alone(run, learner.config, f"at the checkpoint of step {step}"):
                look_and_save(run, learner)


def look_and_save(run: Run, learner: Learner) -> None:
    """A checkpoint of a learner, the best one known by its held-out explained variance."""
    step, folder = learner.step, run.folder_of(learner.name) / "checkpoints"
    look = quick_look(run, learner) if step else {}
    ev = look.get("explained_variance")
    if learner.sae.trained and step > min(ALARM_SHARE * run.amount.n_steps, ALARM_STEPS):
        note_alarms(run, learner, dense_alarm(look.get("always_share", 0.0)))
    if learner.best_step is None or (ev is not None and (learner.best_ev is None or ev > learner.best_ev)):
        learner.best_ev, learner.best_step = ev, step
    save_learner(run, learner)
    if run.ranks.writes:
        write_json(folder / "best.json", {"step": learner.best_step, "heldout_explained_variance": learner.best_ev})


def quick_look(run: Run, learner: Learner) -> dict[str, float]:
    """Figures on a few held-out tokens, none where nothing is held out; the learner is not changed by it."""
    if not run.config.held_out:
        return {}
    window = learner.sae.window
    if window not in run.sample:
        run.sample[window] = list(run.batches.held_out(window, run.config.eval_tokens))
    return evaluate_heldout(learner.whole_sae(), run.sample[window])


def describe(lines: dict[str, dict[str, Any]], tokens_per_s: float, pace: Pace) -> str:
    """`topk loss 0.12 L0 32 EV 0.91 · 21,000 tok/s · 0.02 GB/s · waited 1 %`."""
    parts = [
        f"{name} loss {line['loss']:.4f} L0 {line['l0']:.1f} EV {line['explained_variance'] or 0:.3f}"
        for name, line in list(lines.items())[:3]
    ]
    if len(lines) > 3:
        parts.append(f"+{len(lines) - 3} more")
    speed = f"{tokens_per_s:,.0f} tok/s · {pace.bytes_per_s() / 1e9:.3f} GB/s"
    return " · ".join([*parts, speed, f"waited {pace.wait_share():.0%}"])
