"""What `train fit` can be told, by flags, `--set`, or a TOML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from common.config import Count, Seed, Settings
from common.places import LocalPath, Location

Kernels = Literal["auto", "plain", "sparse"]
Precision = Literal["auto", "float32", "bfloat16"]

RESERVED = {  # files and folders of a run
    "run.toml", "data.json", "status.json", "report.html", "sae", "checkpoints", "eval", "plots",
}  # fmt: skip


class DataConfig(Settings):
    """How a store becomes batches."""

    model_config = ConfigDict(allow_inf_nan=False)

    hook: str | None = Field(None, description="Hook to train on; needed when the store has several.")
    held_out: float = Field(0.02, ge=0, lt=1, description="Share of documents kept for evaluation, never trained on.")
    pool_tokens: Count = Field(2**20, gt=0, description="Tokens open at once and shuffled together.")
    max_norm_ratio: float = Field(
        10.0,
        ge=0,
        description="Leave out positions whose norm exceeds this many medians (attention sinks); 0: keep all.",
    )
    within_document: bool = Field(False, description="Windows longer than 1: only those inside one document.")


class LearnerConfig(Settings):
    """One variant being trained: what is common to all variants; the variant's own settings are in `options`."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,  # file systems take 255 bytes
        description="Folder of the learner inside the run: letters, digits, . _ -",
    )
    variant: str = Field(description="A name from `train variants`.")
    options: dict[str, Any] = Field(default_factory=dict, description="The variant's own settings.")
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate; default: 1e-2 · √(500/steps · 1536/d_sae), in [1e-4, 1e-2]."
    )
    seed: Seed | None = Field(None, description="Seed of the initial weights; default: the run's.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first average; the papers of gated and jumprelu take 0.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second average.")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    grad_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    warmup_share: float = Field(0.05, ge=0, le=1, description="Share of the steps (at most 1,000) of linear warm-up.")
    decay_share: float = Field(0.2, ge=0, le=1, description="Share of the steps, at the end, of linear decay to 0.")

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if name.removesuffix(".aside") in RESERVED:
            raise ValueError("a run folder uses this name itself; choose another")
        return name


class FitConfig(DataConfig):
    """One run: a store, how much of it, and the learners."""

    cache: Location = Field(description="The store.")
    steps: Count | None = Field(None, gt=0, description="Steps to take.")
    tokens: Count | None = Field(None, gt=0, description="Tokens to train on, rounded down to whole batches.")
    passes: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="Alone: exactly so many passes over the store. Beside --steps or --tokens: at most so many.",
    )
    batch_size: Count = Field(2048, gt=0, description="Tokens per step.")
    seed: Seed = Field(0, description="Seed of the order of batches, and of the learners' weights unless they say.")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU when there is one.")
    precision: Precision = Field(
        "auto", description="Matrix products; weights, losses and top-k stay float32. auto: bfloat16 on a GPU."
    )
    kernels: Kernels = Field(
        "auto",
        description="Steps of variants that keep k latents. sparse: from the kept ones alone; plain: from all; "
        "auto: sparse on a CPU up to k = d_sae / 8.",
    )
    graphs: bool = Field(
        False, description="On a GPU, record small steps as CUDA graphs and play them again; the same to the bit."
    )
    log_every: Count | None = Field(
        None, gt=0, description="Steps between metrics; default: a hundredth of the run, at most 100."
    )
    checkpoint_every: Count | None = Field(
        None, gt=0, description="Steps between checkpoints; default: a tenth of the run, at least 100, at most 5,000."
    )
    keep_every: Count | None = Field(
        None, gt=0, description="Keep every checkpoint whose step this divides, beside last and best."
    )
    eval_tokens: Count = Field(
        16384, gt=0, description="Held-out tokens looked at with each checkpoint, to find the best."
    )
    final_eval_tokens: Count = Field(200_000, gt=0, description="Held-out tokens for the figures in result.json.")
    at_once: Count | None = Field(
        None,
        gt=0,
        description="Learners trained together, the rest after them on the same batches; default: what memory allows.",
    )
    parallel: Literal["auto", "learners", "batch", "latents"] = Field(
        "auto",
        description="What torchrun's processes share: the learners, the rows of each batch, or the latents of each "
        "learner; auto: the learners, where there are several, else the batch.",
    )
    out: LocalPath | None = Field(None, description="Run folder; default runs/<store>.")
    learner: tuple[LearnerConfig, ...] = Field((), description="The learners; [[learner]] tables in a TOML file.")

    @model_validator(mode="after")
    def _amount(self) -> FitConfig:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give either --steps or --tokens, not both")
        if self.steps is None and self.tokens is None and self.passes is None:
            raise ValueError("say how long: --steps, --tokens or --passes")
        names = [learner.name for learner in self.learner]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two learners are called '{twice.pop()}'")
        return self

    def data(self) -> DataConfig:
        """The data settings alone."""
        return DataConfig(**{name: getattr(self, name) for name in DataConfig.model_fields})

    def shared_by(self) -> Literal["learners", "batch", "latents"]:
        """What several processes share."""
        if self.parallel == "auto":
            return "learners" if len(self.learner) > 1 else "batch"
        return self.parallel

    def run_folder(self) -> Path:
        """Where the run goes: `--out`, or `runs/<store>`."""
        return self.out or Path("runs") / self.cache.stem


class ImportConfig(Settings):
    """One import: the store to look at a published SAE with, and the run that it becomes."""

    model_config = ConfigDict(allow_inf_nan=False)

    cache: Location = Field(description="The store.")
    out: LocalPath = Field(description="Run folder; a new one.")
    name: str | None = Field(None, description="The learner's name; default: that of the folder.")
    hook: str | None = Field(None, description="Hook of the store; default: the SAE's own, or the store's only one.")
    held_out: float = Field(
        0.02, gt=0, lt=1, description="Share of documents to evaluate on: that of the runs it is compared with."
    )
    device: str = Field("auto", description="cpu, cuda, …; auto takes a GPU when there is one.")


class BenchConfig(Settings):
    """Training steps to be timed, on made-up data."""

    variant: tuple[str, ...] = Field(
        ("batchtopk",), min_length=1, description="Variants to time; give it several times."
    )
    d_model: Count = Field(512, gt=0, description="Width of the activations.")
    d_sae: Count = Field(4096, gt=0, description="Latents.")
    k: Count = Field(32, gt=0, description="Latents kept per token, for variants that have k.")
    batch_size: Count = Field(2048, gt=0, description="Tokens per step.")
    steps: Count = Field(20, gt=0, description="Steps to time of each variant, four by four, after four that are not.")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU when there is one.")
    precision: Precision = Field("auto", description="As of `train fit`.")
    kernels: Kernels = Field("auto", description="As of `train fit`.")
    graphs: bool = Field(False, description="As of `train fit`.")

    @field_validator("variant")
    @classmethod
    def _no_twice(cls, variant: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(variant))


class EvalConfig(Settings):
    """One evaluation: suites, and what they look at."""

    suite: str = Field("heldout", description="Suites, separated by commas.")
    max_tokens: Count | None = Field(None, gt=0, description="Held-out tokens to look at; default: all.")
    cache: Location | None = Field(None, description="Where the store is now, if it has moved.")
    model: str | None = Field(None, description="Where the store's model is now, if it has moved.")
    device: str = Field("auto", description="cpu, cuda, …; auto takes a GPU when there is one.")
    baseline: str | None = Field(
        None,
        description="Suites temporal and cost: what to hold learners against, a learner of their run, or a folder of a "
        "learner or a run; default: the batchtopk of their run with their L0 and seed.",
    )
    latents: Count = Field(1000, gt=0, description="Suite latents: the most latents to describe of each learner.")
    levels: str = Field(
        "1,1,2",
        description="Suite hierarchy: shares of the levels that an SAE without levels is cut into by density, densest "
        "first.",
    )
    judge: str | None = Field(
        None,
        description="Suite interp: a chat endpoint as OpenAI's, up to /v1, that explains latents; held-out text is "
        "sent there, with the key in GRANARY_JUDGE_KEY. Default: none, nothing is sent.",
    )
    judge_model: str | None = Field(None, description="Suite interp: the endpoint's name of the model to ask.")
    judge_latents: Count = Field(100, gt=0, description="Suite interp: the most latents to ask about of each learner.")

    @model_validator(mode="after")
    def _judge_is_whole(self) -> EvalConfig:
        if (self.judge is None) != (self.judge_model is None):
            raise ValueError("--judge and --judge-model go together")
        return self

    corpus: str | None = Field(
        None, description="Suite core: a text to read, as --corpus of harvest run; default: the held-out documents."
    )
    column: str = Field("text", description="With --corpus: the field with the text.")
    split: str = Field("train", description="With --corpus: the hub data set's split; for stdlib, train or heldout.")
    batches: str | None = Field(
        None,
        description="Suite core: reconstruction and sparsity batches of 16 sequences, such as 200,2000; default: 10,1, "
        "or as many as the text has.",
    )
    exclude_special: bool = Field(
        False, description="Suite core: leave special tokens as they are where x̂ replaces x in the model."
    )

    @field_validator("batches")
    @classmethod
    def _two_numbers(cls, batches: str | None) -> str | None:
        if batches is not None and not re.fullmatch(r"0*[1-9]\d*,0*[1-9]\d*", batches):
            raise ValueError("two numbers above 0 are needed, such as 200,2000")
        return batches

    def suites(self) -> list[str]:
        """The suites by name."""
        return [name.strip() for name in self.suite.split(",")]

    def core_batches(self) -> tuple[int, int] | None:
        """Reconstruction and sparsity batches, if they were asked for."""
        if self.batches is None:
            return None
        reconstruction, sparsity = self.batches.split(",")
        return int(reconstruction), int(sparsity)


class UnlearnConfig(Settings):
    """One unlearning evaluation: texts, or SAEBench's files, and the settings that are tried."""

    model_config = ConfigDict(allow_inf_nan=False)

    forget: str | None = Field(
        None, description="Text to forget: local file or folder, hub data set, stdlib, or stdlib:MODULE,MODULE."
    )
    retain: str | None = Field(None, description="Text to keep, likewise; texts that --forget has are left out.")
    also_retain: str | None = Field(None, description="A third text, likewise, on which the same is measured.")
    column: str = Field("text", description="Field with the text, in .jsonl, .parquet and hub data sets.")
    data: LocalPath | None = Field(
        None, description="Folder with SAEBench's files: its protocol, on a Gemma-2-it --model."
    )
    max_tokens: Count = Field(10_000, gt=0, description="Tokens of each half of each text.")
    threshold: tuple[float, ...] = Field(
        (0.001, 0.01, 0.05), description="Latents that fire on this share of the retain text are spared; repeatable."
    )
    latents: tuple[Count, ...] = Field((5, 10, 20, 50), description="Latents to clamp; repeatable.")
    multiplier: tuple[float, ...] = Field(
        (0, 1, 2, 5, 10, 20), description="Clamp to minus so many times a latent's mean activation; repeatable."
    )
    absolute: tuple[float, ...] = Field((25, 50, 100, 200), description="Clamp to minus this, raw units; repeatable.")
    cache: Location | None = Field(None, description="Where the store is now, if it has moved.")
    model: str | None = Field(None, description="Where the store's model is now, or the model that --data is asked of.")
    device: str = Field("auto", description="cpu, cuda, …; auto takes a GPU when there is one.")

    @model_validator(mode="after")
    def _one_protocol(self) -> UnlearnConfig:
        own = {"forget", "retain", "also_retain", "column", "max_tokens"}
        own |= {"threshold", "latents", "multiplier", "absolute"}
        if self.data is not None and own & self.model_fields_set:
            given = sorted(f"--{name.replace('_', '-')}" for name in own & self.model_fields_set)
            raise ValueError(f"--data is SAEBench's protocol, with texts and settings of its own: leave out {given[0]}")
        if min((*self.latents, 1)) < 1 or min((*self.threshold, *self.multiplier, *self.absolute, 0.0)) < 0:
            raise ValueError("--latents are at least 1, --threshold, --multiplier and --absolute at least 0")
        return self
