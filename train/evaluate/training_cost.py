"""What training costs: as a run recorded it, and a step of it on this machine (evaluation spec §5.8)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.files import read_json
from train.config import FitConfig, LearnerConfig
from train.data.batch import Batch
from train.evaluate.baseline import baseline_of
from train.evaluate.missing import Figures, Missing
from train.evaluate.subject import Subject
from train.evaluate.tensor_memory import peak_bytes
from train.evaluate.timing import Timing, in_turn
from train.learner import Learner
from train.saes.base import SAE
from train.settings import saved_config

N_STEPS = 10_000  # of the run that a step is the end of
STEP_TOKENS = 2048  # of a step: a larger one would take minutes on a CPU


def recorded_speed(subject: Subject) -> Figures:
    """Tokens per second as the run recorded them, and over those of the baseline of the same run."""
    ours = speed_of(subject.folder)
    if isinstance(ours, Missing):
        return dict.fromkeys(("training_tokens_per_s", "training_speed_ratio"), ours)
    figures: Figures = {"training_tokens_per_s": ours}
    baseline = baseline_of(subject)
    if baseline.folder is None:
        return figures | {"training_speed_ratio": Missing(baseline.reason)}
    if baseline.folder.resolve().parent != subject.folder.resolve().parent:
        return figures | {
            "training_speed_ratio": Missing(f"{baseline.folder}: of another run, whose speed does not compare")
        }
    theirs = speed_of(baseline.folder)
    return figures | {"training_speed_ratio": theirs if isinstance(theirs, Missing) else ours / theirs}


def speed_of(folder: Path) -> float | Missing:
    """Tokens per second of a learner's own steps."""
    path = folder / "result.json"
    result = read_json(path) if path.exists() else {}
    if not result.get("tokens_seen") or not result.get("seconds"):
        return Missing(f"{path}: no steps and seconds of training")
    return float(result["tokens_seen"] / result["seconds"])


def batch_of(x: Tensor, shape: tuple[int, int]) -> Batch:
    """Activations as sequences that are a document each."""
    n, length = shape
    pos = torch.arange(length, dtype=torch.int32, device=x.device).expand(n, length)
    return Batch.of(x[: n * length].view(n, length, -1), pos=pos)


@dataclass(frozen=True)
class Step:
    """What a training step costs; `peak` in bytes."""

    timing: Timing
    peak: int
    flat_peak: int


def training_step(subject: Subject, flat: SAE, x: Tensor) -> Step | Missing:
    """A step at the end of the run, when everything is switched on, of fresh weights: no figure depends on them."""
    if not subject.sae.trained:
        return Missing(f"{subject.sae.variant} is a reference: nothing is trained")
    run = saved_config(subject.folder.parent, subject.config.cache)
    tokens = max(min(run.batch_size, STEP_TOKENS) // subject.sae.window, 1) * subject.sae.window
    batch = batch_of(x, (tokens // subject.sae.window, subject.sae.window))
    learners = [learner_like(sae, subject, x, run) for sae in (subject.sae, flat)]
    peaks = [peak_of_steps(learner, batch) for learner in learners]
    ours, theirs = (partial(learner.train_step, batch, tokens) for learner in learners)
    return Step(in_turn(ours, theirs, subject), *peaks)


def learner_like(sae: SAE, subject: Subject, x: Tensor, run: FitConfig) -> Learner:
    """A new learner of an SAE's settings, just before its last steps."""
    from train.preflight import resolve_precision  # not above: it tries an evaluation, and so imports the suites

    fresh = type(sae)(sae.config, sae.d_in)
    fresh.start(1 / float(x.square().sum(-1).mean().sqrt()), torch.zeros(sae.d_in))
    config = LearnerConfig(name="step", variant=sae.variant)
    precision = resolve_precision(run.precision, subject.device)
    learner = Learner(config, fresh, N_STEPS, subject.device, precision)
    learner.step = N_STEPS - 100  # more than are taken
    return learner


def peak_of_steps(learner: Learner, batch: Batch) -> int:
    """Bytes at most at once in two steps: the first makes Adam's averages, the second has them beside its own."""

    def steps() -> None:
        for _ in range(2):
            learner.train_step(batch, batch.n_valid)

    weights = sum(tensor.nbytes for tensor in (*learner.sae.parameters(), *learner.sae.buffers()))
    return weights + peak_bytes(steps, learner.device)
