"""Before step 0: everything that would fail later fails now, with both numbers and the flag that decides."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import psutil
import torch
from torch import Tensor

from common.console import format_bytes
from common.errors import ConfigError, DataError, GranaryError, StoreError
from train.checkpoint import newest_whole, save_checkpoint
from train.config import FitConfig
from train.data.batch import Batch
from train.data.reader import Batches
from train.evaluate.heldout import evaluate_heldout
from train.learner import Learner
from train.recording import STREAMS
from train.saes.base import SAEConfig
from train.saes.parts import geometric_median

FLOAT32_BYTES = 4
NO_MEMORY = re.compile("allocate memory|[Ss]torage size calculation overflowed")  # how a CPU says it
REHEARSED_LANDMARKS = 2  # steps at which a variant changes itself are tried too
START_TOKENS = 16384  # for the geometric median; at least 10k (spec §0.3)


@dataclass(frozen=True)
class Amount:
    """How long a run is.

    Attributes:
        n_steps: exactly this many.
        passes: over the training tokens.
    """

    n_steps: int
    passes: float


def resolve_steps(config: FitConfig, windows_per_pass: int, window: int, store: str) -> Amount:
    """Turn --steps, --tokens or --passes into an exact number of steps, and refuse what the store does not hold.

    Raises:
        ConfigError: the batch is no whole number of windows.
        DataError: more steps than the passes allow, or less than one step.
    """
    batch = config.batch_size
    if batch % window:
        raise ConfigError(f"--batch-size {batch:,}: not a multiple of the window of {window} tokens.")
    n_windows = batch // window
    per_pass = windows_per_pass / n_windows
    held = windows_per_pass * window
    allowed = config.passes if config.passes is not None else 1.0
    most = math.floor(Fraction(str(allowed)) * windows_per_pass / n_windows)  # 1.15 · 100 is 115
    if config.steps is not None:
        asked = config.steps
    elif config.tokens is not None:
        asked = config.tokens // batch
    else:
        asked = most
    if config.tokens is not None and asked < 1:
        raise DataError(
            f"--tokens {config.tokens:,}: less than one step of --batch-size {batch:,}. Ask for more, or lower it."
        )
    if most < 1:
        raise DataError(
            f"{store}: it holds {held:,} training tokens, less than one step of --batch-size {batch:,} in {allowed:g} "
            f"pass{'es' if allowed != 1 else ''}. Lower --batch-size, or harvest more (harvest run --tokens)."
        )
    if asked > most:
        needed = math.ceil(Fraction(100 * asked * n_windows, windows_per_pass)) / 100
        raise DataError(
            f"{store}: {asked:,} steps x {batch:,} = {asked * batch:,} tokens asked for, but it holds {held:,} "
            f"training tokens, {most:,} steps in {allowed:g} pass{'es' if allowed != 1 else ''}. "
            f"Say --passes {needed:.12g} to go over them again, --steps {most}, or harvest more (harvest run --tokens)."
        )
    return Amount(asked, asked / per_pass)


def starting_point(batches: Batches, window: int) -> tuple[float, Tensor]:
    """Input scale 1/√E‖x‖² over the training tokens, and the geometric median of a fixed sample, scaled.

    The sample is the first tokens of the batch order of this window length, looked at and not consumed.
    """
    scale = 1 / math.sqrt(batches.plan.mean_squared_norm)
    n_windows = min(START_TOKENS // window, batches.windows_per_pass(window))
    batch = batches.batch(0, max(n_windows, 1), window)
    return scale, geometric_median(batch.x[batch.valid].float() * scale)


def rehearse(
    learner: Learner,
    batches: Batches,
    config: FitConfig,
    folder: Path,
    rows: Batch,
    sharing: Callable[[], AbstractContextManager[None]],
) -> str | None:
    """One step, one evaluation, one checkpoint saved and loaded, in a scratch folder beside the run.

    Args:
        learner: made for this; it is of no use afterwards.
        rows: the first batch, or this rank's rows of it; `sharing` is the scope of a step on them.

    Returns:
        Why this learner has diverged in its first step, or None.

    Raises:
        StoreError: the data itself is not finite.
    """
    window = learner.sae.window
    if not bool(torch.isfinite(batches.batch(0, config.batch_size // window, window).x).all()):
        raise StoreError(
            f"{batches.store.name}: the first batch holds values that are not finite. "
            f"Run: harvest verify {batches.store.name}"
        )
    batch = rows.with_x(rows.x.float())
    loss = math.nan
    for step in (0, *[later for later in learner.sae.landmarks(learner.n_steps) if later][:REHEARSED_LANDMARKS]):
        learner.step = step
        if learner.at_landmark():
            learner.revise(lambda: [batch.with_x(batch.x * learner.sae.scale)], config.batch_size)
        with sharing():
            learner.train_step(batch, config.batch_size)
        loss = learner.read_metrics()["loss"]
    if not math.isfinite(loss):
        return f"the loss of the first step is {loss}, on data that is finite; look at the learner's settings"
    if config.held_out:
        evaluate_heldout(learner.whole_sae(), batches.held_out(window, max_tokens=256))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".rehearsal-") as scratch:
        save_checkpoint(Path(scratch), 1, learner.tensors(), learner.facts(), {})
        found, skipped = newest_whole(Path(scratch))
        if found is None:
            raise ConfigError(f"a checkpoint does not read back: {'; '.join(skipped)}")
        learner.restore(found.tensors, found.facts)
    return None


@contextlib.contextmanager
def told_of(learner: str) -> Iterator[None]:
    """What fails in here is told with the learner's name."""
    try:
        yield
    except GranaryError as error:
        raise type(error)(f"learner '{learner}': {error}") from None


@contextlib.contextmanager
def enough_memory(d_model: int, d_sae: int, batch_size: int) -> Iterator[None]:
    """
    Raises:
        ConfigError: memory does not do for a first step in here; with what it needs.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(str(error))):
            raise
        learner, step = format_bytes(learner_bytes(d_model, d_sae)), format_bytes(step_bytes(batch_size, d_sae))
        raise ConfigError(
            f"out of memory in the first step. d_sae {d_sae:,} at d_model {d_model:,} takes about {learner} with its "
            f"gradient and Adam, a batch of {batch_size:,} about {step} more. Lower --d-sae or --batch-size."
        ) from None


def learner_bytes(d_in: int, d_sae: int) -> float:
    """What a learner is counted as: 1.5 times two matrices in float32, each with gradient and Adam's two averages."""
    return 1.5 * 2 * d_in * d_sae * 4 * FLOAT32_BYTES


def step_bytes(batch_size: int, d_sae: int) -> float:
    """What the tensors of a step are counted as: eight of [batch, d_sae]."""
    return 8 * batch_size * d_sae * FLOAT32_BYTES


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def learners_at_once(
    config: FitConfig, saes: list[SAEConfig], d_in: int, device: torch.device, n_processes: int = 1
) -> int:
    """How many learners are trained together: what was asked for, or what fits in half of the free memory.

    Of a CPU's memory each of `n_processes` takes its part. A learner whose steps are recorded keeps a step's tensors,
    and needs a stream.
    """
    on_gpu = device.type == "cuda"
    most = STREAMS if on_gpu and config.graphs else sys.maxsize
    if config.at_once is not None:
        return min(config.at_once, most)
    widest = max(sae.d_sae for sae in saes)
    learner, step = learner_bytes(d_in, widest), step_bytes(config.batch_size, widest)
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available / n_processes
    if on_gpu and config.graphs:
        learner += step
    return min(max(int((free / 2 - step) / learner), 1), most)
