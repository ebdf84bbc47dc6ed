"""What a run is, and what it leaves: its learners, their results, its status."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.console import say
from common.errors import GranaryError, Interrupted, TrainingError
from common.files import read_json, write_json
from common.stopping import Stop
from common.store import Store
from train.checkpoint import checkpoints, prune, save_checkpoint, step_of
from train.collective import Shared, shared_step
from train.config import FitConfig, LearnerConfig
from train.data.batch import Batch
from train.data.plan import DataPlan
from train.data.reader import Batches
from train.learner import Learner
from train.preflight import Amount
from train.ranks import Ranks
from train.record import Metrics, Status
from train.saes.base import SAEConfig

LOOK_TOKENS = 200_000
RUN_FILE, DATA_FILE, STATUS_FILE, RESULT_FILE = "run.toml", "data.json", "status.json", "result.json"


@dataclass(frozen=True)
class Outcome:
    """What a run came to, for `--json` and for tests.

    Attributes:
        seconds: wall time this time, per stage: prepare, train, finish.
        tokens_per_s: tokens per second of the training stage, this time; None if no step was left.
        bytes: activations read.
        wait_share: share of the training stage spent waiting for data, this time.
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
class Sitting:
    """What was done this time, all rounds of learners together.

    Attributes:
        seconds: wall time per stage.
        steps: batches that were stepped on.
        waited_s: time of the training stage spent waiting for data.
    """

    seconds: dict[str, float] = field(default_factory=lambda: {"prepare": 0.0, "train": 0.0, "finish": 0.0})
    steps: int = 0
    waited_s: float = 0.0


@dataclass
class Run:
    """A run that is ready to be trained.

    Attributes:
        ranks: this process among those that train the run.
        saes: settled settings of every learner's variant, by the learner's name.
        mine: names of the learners that this process trains.
        learners: those in memory now, stepped together; the others wait for their turn or have ended.
        failed: learners that failed this time; they are not tried again before the next.
        start: input scale and first b_dec of the learners of a window length, once known.
    """

    config: FitConfig
    ranks: Ranks
    folder: Path
    store: Store
    plan: DataPlan
    batches: Batches
    amount: Amount
    saes: dict[str, SAEConfig]
    mine: frozenset[str]
    d_in: int
    device: torch.device
    precision: torch.dtype
    status: Status
    stop: Stop
    identity: dict[str, Any]
    log_every: int
    checkpoint_every: int
    learners: list[Learner] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    start: dict[int, tuple[float, Tensor]] = field(default_factory=dict)
    sitting: Sitting = field(default_factory=Sitting)
    sample: dict[int, list[Batch]] = field(default_factory=dict)

    @property
    def active(self) -> list[Learner]:
        return [learner for learner in self.learners if learner.state == "running"]

    def folder_of(self, name: str) -> Path:
        return self.folder / name

    def metrics_of(self, learner: Learner) -> Metrics:
        return Metrics(self.folder_of(learner.name) / "metrics.jsonl")

    def result(self, name: str) -> dict[str, Any] | None:
        """The learner's result.json, or None while it has none."""
        path = self.folder_of(name) / RESULT_FILE
        return dict(read_json(path)) if path.exists() else None

    def ended(self, name: str) -> bool:
        """Whether a learner came to its end. One that failed did not: what was missing may be there now."""
        return bool((self.result(name) or {}).get("state", "failed") != "failed")

    def waiting(self) -> list[LearnerConfig]:
        """Learners of this process that have not ended, and did not fail this time."""

        def left() -> list[LearnerConfig]:
            mine = [learner for learner in self.config.learner if learner.name in self.mine]
            return [learner for learner in mine if not self.ended(learner.name) and learner.name not in self.failed]

        return self.ranks.first_does(left) if self.ranks.in_step else left()

    def rows(self, step: int, window: int, reuse: bool = False) -> Batch:
        """Batch number `step`, or this rank's rows of it; see `Batches.batch`."""
        n_windows = self.config.batch_size // window
        if not (self.ranks.in_step and self.ranks.mode == "batch"):
            return self.batches.batch(step, n_windows, window, reuse)
        return self.batches.share(step, n_windows, window, self.ranks.rank, self.ranks.size, reuse)

    def sharing(self) -> AbstractContextManager[None]:
        """The scope of a step on `rows`."""
        ranks = self.ranks
        of: Literal["rows", "latents"] = "rows" if ranks.mode == "batch" else "latents"
        return shared_step(Shared(ranks.rank, ranks.size, ranks.data, of) if ranks.in_step else None)

    def say(self, message: str) -> None:
        """A line for the person at the terminal, by the process that writes."""
        if self.ranks.writes:
            say(message)


def identity_with(run: Run, learner: LearnerConfig) -> dict[str, Any]:
    """What decides every bit of one learner."""
    return run.identity | {"learner": learner.model_dump(mode="json")}


def scaled_batches(run: Run, learner: Learner) -> Iterator[Batch]:
    """The first 200k training tokens, or all of fewer, in scaled units: what thresholds and landmarks look at.

    Raises:
        Interrupted: asked to stop.
    """
    window, batch_size = learner.sae.window, run.config.batch_size
    tokens = min(LOOK_TOKENS, run.batches.windows_per_pass(window) * window)
    for step in range(max(tokens // batch_size, 1)):
        refuse_when_stopped(run)
        batch = run.batches.batch(step, batch_size // window, window)
        yield batch.with_x(batch.x.float() * learner.sae.scale)


def refuse_when_stopped(run: Run) -> None:
    """Nothing, until somebody asks to stop.

    Raises:
        Interrupted: somebody has.
    """
    if run.stop.asked:
        raise Interrupted(f"stopped by {run.stop.signal_name} between steps. Go on with: train resume {run.folder}")


def save_learner(run: Run, learner: Learner) -> None:
    """A checkpoint of one learner where it stands, in place of the oldest that need not be kept."""
    tensors = learner.tensors()  # of every rank that has some of the latents
    if run.ranks.writes:
        folder = run.folder_of(learner.name) / "checkpoints"
        save_checkpoint(folder, learner.step, tensors, learner.facts(), identity_with(run, learner.config))
        prune(folder, learner.best_step, run.config.keep_every)


@contextlib.contextmanager
def alone(run: Run, config: LearnerConfig, where: str) -> Iterator[None]:
    """What breaks in here ends this learner as failed until the next sitting; the others go on.

    Raises:
        GranaryError: what concerns the whole run: a request to stop, a damaged store, a full disk.
        TrainingError: ranks in step; the others cannot go on without this one.
    """
    try:
        yield
    except Interrupted:
        raise  # a RuntimeError too
    except RuntimeError as error:
        if not isinstance(error, GranaryError):
            say(traceback.format_exc())
        first = str(error).splitlines()[0] if str(error) else ""
        end_learner(run, config, "failed", f"{type(error).__name__} {where}: {first}")
        run.failed.add(config.name)
        if run.ranks.in_step:
            reason = f"{config.name} failed on rank {run.ranks.rank} {where}: {first}"
            note_ending(run, "failed", reason)
            raise TrainingError(f"{run.folder}: {reason}") from None


def end_learner(run: Run, config: LearnerConfig, state: str, reason: str) -> None:
    """Take a learner out of the run, with its result written; it need not have come into memory."""
    run.say(f"{config.name}: {state}: {reason}")
    result = blank_result(run, config) | {"state": state, "reason": reason}
    for learner in run.learners:
        if learner.name == config.name:
            learner.state, learner.reason = state, reason
            result = result_of(run, learner, {})
    if run.ranks.writes:
        folder = run.folder_of(config.name)
        folder.mkdir(exist_ok=True)
        write_json(folder / RESULT_FILE, result)


def blank_result(run: Run, config: LearnerConfig) -> dict[str, Any]:
    """`result.json` of a learner that took no step."""
    return {
        "name": config.name,
        "variant": config.variant,
        "state": "waiting",
        "reason": "",
        "alarms": [],
        "training_steps": 0,
        "requested_steps": run.amount.n_steps,
        "tokens_seen": 0,
        "final_loss": None,
        "passes": 0.0,
        "lr": config.lr,
        "seconds": 0.0,
        "best_heldout_explained_variance": None,
        "metrics": None,
    }


def result_of(run: Run, learner: Learner, metrics: dict[str, Any]) -> dict[str, Any]:
    """`result.json`."""
    return blank_result(run, learner.config) | {
        "state": learner.state,
        "reason": learner.reason,
        "alarms": list(learner.alarms.values()),
        "training_steps": learner.step,
        "tokens_seen": learner.step * run.config.batch_size,
        "final_loss": learner.final_loss,
        "passes": learner.step / run.amount.n_steps * run.amount.passes,
        "lr": learner.peak_lr,
        "seconds": round(learner.seconds, 3),
        "best_heldout_explained_variance": learner.best_ev,
        "metrics": metrics or None,
    }


def note_alarms(run: Run, learner: Learner, found: dict[str, str]) -> None:
    """Say what is odd about a learner, each kind once in its run."""
    for kind, text in found.items():
        if kind not in learner.alarms:
            learner.alarms[kind] = f"step {learner.step}: {text}"
            run.say(f"{learner.name}: note: step {learner.step:,}: {text}")


def note_status(run: Run, running: str = "running") -> None:
    """Write status.json as things stand; `running` is what learners that are not done are called.

    Rank 0 writes; the others tell it where their learners stand.
    """
    own = {}
    for learner in run.learners:
        state = running if learner.state == "running" else learner.state
        own[learner.name] = {"state": state, "reason": learner.reason, "step": learner.step}
    run.ranks.tell(own)
    if not run.ranks.first:
        return
    learners = {config.name: standing(run, config.name) for config in run.config.learner}
    learners |= run.ranks.told() | own
    step = max((facts["step"] for facts in learners.values()), default=0)
    losses = [loss for learner in run.learners if (loss := learner.final_loss) is not None]
    known = {"last_loss": losses[-1]} if losses else {}
    run.status.write(learners=learners, step=step, tokens_seen=step * run.config.batch_size, **known)


def standing(run: Run, name: str) -> dict[str, Any]:
    """Where a learner that is not in memory stands: by its result, else by the name of its newest checkpoint."""
    result = run.result(name)
    if result is not None:
        return {"state": result["state"], "reason": result["reason"], "step": result["training_steps"]}
    saved = checkpoints(run.folder_of(name) / "checkpoints")
    return {"state": "waiting", "reason": "", "step": step_of(saved[-1]) if saved else 0}


def record_end(run: Run, state: str, reason: str) -> None:
    """Checkpoint what runs, if it can be, and record why the run ended, once every rank has stopped."""
    try:
        # a rank in step that fails is alone in it: others may be in the middle of a step, and it must not wait for them
        for learner in [] if run.ranks.in_step and state == "failed" else run.active:
            save_learner(run, learner)
    except GranaryError as error:
        reason = f"{reason} (and no checkpoint could be written: {error})"
    note_status(run, running=state)
    if state == "interrupted":
        run.ranks.leave(run.stop)
    note_ending(run, state, reason)


def note_ending(run: Run, state: str, reason: str) -> None:
    """The end of the whole run in status.json."""
    note_status(run, running=state)
    run.status.write(state=state, reason=reason)
