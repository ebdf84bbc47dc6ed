"""How fast training steps are on this machine, on made-up data without a store, against what they cannot go below.

The floor of a step is the time of its products at the rate at which this machine multiplies, measured beside it on the
encoder's product [batch, d] · [d, d_sae]: 10·d·d_sae operations per token where all codes take part; 2·d·d_sae + 8·d·k
where a step can do with the kept ones, only the encoder's product being of full width (spec performance §4).
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.console import say
from common.device import resolve_device
from common.errors import ConfigError, Interrupted
from common.stopping import Stop
from train.config import BenchConfig, Kernels, LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.preflight import enough_memory, resolve_precision
from train.recording import ALIKE, recorder_for
from train.saes import make_sae, variant_class

CONTEXT = 128  # tokens of a window: a document of the made-up data
CALM = 16  # neighbours that are alike
N_STEPS, STEP = 10_000, 9_000  # of a run so long, where all that ramps up is at work and no landmark is near
LR = 1e-6
SETTLED_ON = 1024  # tokens that a penalised variant's L0 is settled on
ROUND = 4  # steps timed together: what a variant does in every second or fourth step counts with its share


@dataclass(frozen=True)
class Speed:
    """Training steps of one variant.

    Attributes:
        tokens_per_s, step_ms: of the median round of four steps.
        fraction_of_floor: time of its products alone over time of the steps, round by round, the median.
        relative: time of the first variant's steps over this one's, round by round, the median.
        kernels: "sparse" or "plain".
        recorded: whether steps were played again from a CUDA graph.
    """

    variant: str
    tokens_per_s: float
    step_ms: float
    fraction_of_floor: float
    relative: float
    kernels: str
    recorded: bool
    precision: str
    device: str
    d_model: int
    d_sae: int
    k: int
    batch_size: int


def bench(config: BenchConfig, stop: Stop | None = None) -> list[Speed]:
    """Time steps of all variants in turn, four by four, so that they see the machine in the same states.

    Raises:
        ConfigError: no such variant or device, options that do not fit, a batch that is not made of whole windows,
            a variant without training steps, or not enough memory.
        Interrupted: asked to stop.
    """
    if config.batch_size % CONTEXT:
        raise ConfigError(f"--batch-size {config.batch_size}: give a multiple of {CONTEXT}, the window of this data.")
    device = resolve_device(config.device)
    if config.graphs and device.type != "cuda":
        say("--graphs: nothing is recorded, since there is no GPU")
    precision = resolve_precision(config.precision, device)
    with enough_memory(config.d_model, config.d_sae, config.batch_size):
        batch = sentences(config.batch_size, config.d_model).to(device)
        learners = {
            variant: learner_for(variant, config.d_model, config.d_sae, config.k, device, precision, config.kernels)
            for variant in config.variant
        }
        for learner in learners.values():
            learner.recorder = recorder_for(device, config.batch_size * config.d_sae, config.graphs)
        things = {variant: step_of(learner, batch) for variant, learner in learners.items()}
        for learner in learners.values():
            play_in(learner, things[learner.name])
        things["product"] = encoder_product(config, device, precision)
        times = in_turn(things, -(-config.steps // ROUND), device, stop)
    first, product = times[config.variant[0]], times["product"]
    return [
        Speed(
            variant,
            tokens_per_s=round(config.batch_size / statistics.median(times[variant]), 1),
            step_ms=round(1e3 * statistics.median(times[variant]), 3),
            fraction_of_floor=round(products_of(config.d_sae, config.k) * median_ratio(product, times[variant]), 4),
            relative=round(median_ratio(first, times[variant]), 4),
            kernels="sparse" if learner.sae.sparse else "plain",
            recorded=learner.recorder is not None and learner.recorder.replay is not None,
            precision=str(precision).removeprefix("torch."),
            device=name_of(device),
            d_model=config.d_model,
            d_sae=config.d_sae,
            k=config.k,
            batch_size=config.batch_size,
        )
        for variant, learner in learners.items()
    ]


def learner_for(
    variant: str, d_model: int, d_sae: int, k: int, device: torch.device, precision: torch.dtype, kernels: Kernels
) -> Learner:
    """A learner late in a run: of a penalised variant k latents are active, as the end of a run would have it.

    Raises:
        ConfigError: no such variant, one without training steps, or options that do not fit.
    """
    try:
        cls = variant_class(variant)
    except ConfigError as error:
        raise ConfigError(f"--variant: {error}") from None
    if not cls.trained:
        raise ConfigError(f"--variant {variant}: a reference, which takes no training steps.")
    options = {"d_sae": d_sae} | {name: k for name in ("k", "target_l0") if name in cls.Config.model_fields}
    sae = make_sae(variant, options, d_model, 0, f"--variant {variant}", context=CONTEXT)
    sae.start(1.0, torch.zeros(d_model))
    if "target_l0" in options:
        sae.calibrate(lambda: iter([sentences(SETTLED_ON, d_model)]))
    config = LearnerConfig(name=variant, variant=variant, lr=LR)
    learner = Learner(config, sae, N_STEPS, device, precision, kernels)
    learner.step = STEP
    return learner


def sentences(n_tokens: int, d_model: int) -> Batch:
    """Windows of a document each whose neighbours are alike, at unit mean squared norm."""
    generator = torch.Generator().manual_seed(0)
    n = n_tokens // CONTEXT
    slow = torch.randn(n, CONTEXT // CALM, d_model, generator=generator).repeat_interleave(CALM, dim=1)
    x = (slow + torch.randn(n, CONTEXT, d_model, generator=generator)) / (2 * d_model) ** 0.5
    return Batch.of(x, pos=torch.arange(CONTEXT, dtype=torch.int32).expand(n, CONTEXT))


def step_of(learner: Learner, batch: Batch) -> Callable[[], object]:
    """A training step, again and again; after a round the learner is as late in its run as before, and none is dead."""

    def step() -> None:
        learner.train_step(batch, batch.n_valid)
        if learner.step == STEP + ROUND:
            learner.step = STEP
            learner.sae.tokens_silent.zero_()

    return step


def play_in(learner: Learner, step: Callable[[], object]) -> None:
    """Steps until one is recorded, where that is to be."""
    for _ in range(ALIKE + 1 if learner.recorder is not None else 0):
        step()


def encoder_product(config: BenchConfig, device: torch.device, precision: torch.dtype) -> Callable[[], object]:
    """[batch, d] · [d, d_sae], the one product that no step does without."""
    x = torch.randn(config.batch_size, config.d_model, device=device, dtype=precision)
    W = torch.randn(config.d_model, config.d_sae, device=device, dtype=precision)
    return lambda: x @ W


def products_of(d_sae: int, k: int) -> float:
    """Work of a step's products, in encoder products: all but one are over the k codes that are not 0."""
    return 1 + 4 * k / d_sae


def in_turn(
    things: dict[str, Callable[[], object]], rounds: int, device: torch.device, stop: Stop | None
) -> dict[str, list[float]]:
    """Seconds of each thing, A B A B …, each a mean of four and with the device's work; a first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for number in range(1 + rounds):
        for name, thing in things.items():
            if stop is not None and stop.asked:
                raise Interrupted(f"stopped by {stop.signal_name} while timing; nothing is kept of it.")
            before = time.perf_counter()
            for _ in range(ROUND):
                thing()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name].append((time.perf_counter() - before) / ROUND)
    return seconds


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median of a/b, pair by pair."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def name_of(device: torch.device) -> str:
    """The GPU's name, or the processor's kind and how many threads it is used with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}"
