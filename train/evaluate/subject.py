"""What a suite is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError, Interrupted
from common.models import LanguageModel, load_model
from common.sources import ModelSource, find_model
from common.stopping import Stop
from common.store import Store
from common.tokenizers import Tokenizer, load_tokenizer
from train.config import EvalConfig
from train.data.batch import Batch
from train.data.plan import DataPlan
from train.data.reader import Batches
from train.saes.base import SAE


@dataclass(frozen=True)
class Evaluation:
    """The result of one suite on one learner.

    Attributes:
        metrics: the figures that the suite's table in the docs names, in its order; None where one does not apply.
        reasons: why, for each metric that is None.
        more: what else `eval/<suite>.json` says, as JSON values at its top level: curves, latents, settings.
        arrays: what is kept beside it, each as `eval/<suite>_<name>.npy`.
    """

    metrics: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Models:
    """Language models, each loaded once for all the learners of a command, at most one held at a time; tokenizers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: tuple[str | None, ...] | None = None
        self._model: LanguageModel | None = None
        self._sources: dict[tuple[str, str | None], ModelSource] = {}
        self._tokenizers: dict[tuple[str, str | None, str | None], tuple[Tokenizer, str]] = {}

    def load(
        self, name: str, revision: str | None = None, tokenizer: str | None = None, dtype: str = "float32"
    ) -> LanguageModel:
        """The model of this name.

        Raises:
            ConfigError: it is not there, or cannot be loaded.
        """
        key = (name, revision, tokenizer, dtype)
        if self._model is None or self._key != key:
            self._model = None
            self._model = load_model(self._find(name, revision), str(self.device), dtype, tokenizer)
            self._key = key
        return self._model

    def load_tokenizer(
        self, name: str, revision: str | None, vocabulary: int, override: str | None
    ) -> tuple[Tokenizer, str]:
        """The model's tokenizer, or the one named by `override`, with its identity; the model is not loaded.

        Raises:
            ConfigError: it is not there, or cannot be loaded.
        """
        key = (name, revision, override)
        if key not in self._tokenizers:
            tokenizer = load_tokenizer(self._find(name, revision), vocabulary, override)
            self._tokenizers[key] = (tokenizer, tokenizer.identity())
        return self._tokenizers[key]

    def _find(self, name: str, revision: str | None) -> ModelSource:
        """Where a model lies; its files are hashed once."""
        if (name, revision) not in self._sources:
            self._sources[name, revision] = find_model(name, revision)
        return self._sources[name, revision]


@dataclass(frozen=True)
class Subject:
    """A trained SAE with all that suites may look at.

    Attributes:
        folder: the learner's.
        sae: raw units, on `device`, in evaluation mode.
        facts: `sae/config.json`.
        tell: is told how many held-out tokens a pass has gone through.
    """

    folder: Path
    sae: SAE
    facts: dict[str, Any]
    batches: Batches
    config: EvalConfig
    device: torch.device
    models: Models
    stop: Stop
    tell: Callable[[int], None] = lambda tokens: None

    @property
    def store(self) -> Store:
        return self.batches.store

    @property
    def plan(self) -> DataPlan:
        return self.batches.plan

    def held_out(self, window: int | None = None) -> Iterator[Batch]:
        """Held-out documents in the order of the store, `--max-tokens` of them, as windows of the SAE's own length.

        A window holds every position there, special tokens and neighbouring documents too; `valid` marks the held-out
        ones. With `window=store.context` the batches are the store's whole sequences that have a held-out position.

        Raises:
            Interrupted: asked to stop.
        """
        across, tokens = window is not None, 0
        for batch in self.batches.held_out(window or self.sae.window, self.config.max_tokens, across=across):
            self.refuse_when_stopped()
            yield batch
            tokens += batch.n_valid
            self.tell(tokens)

    def refuse_when_stopped(self) -> None:
        """Raises:
        Interrupted: asked to stop.
        """
        if self.stop.asked:
            raise Interrupted(f"stopped by {self.stop.signal_name} in an evaluation. Run the same command again.")

    def language_model(self) -> LanguageModel:
        """The model that the store was harvested from, with its tokenizer.

        Raises:
            ConfigError: it is not there, cannot be loaded, or is another one; a suite notes the message as a reason.
        """
        settings, identity = self.store.header["settings"], self.store.identity["model"]
        name = self.config.model or settings["model"]
        model = self.models.load(name, identity.get("revision"), settings.get("tokenizer"))
        if "weights" in identity and model.source.identity() != identity:
            raise ConfigError(
                f"--model {name}: not the model that {self.store.name} was harvested from (other weights). "
                "Name the right folder with --model."
            )
        return model

    def spliced_model(self) -> LanguageModel:
        """`language_model`, to run on with x̂ in the place of x.

        Raises:
            ConfigError: as there; or as `refuse_future`.
        """
        self.refuse_future()
        return self.language_model()

    def refuse_future(self) -> None:
        """Raise ConfigError if x̂ holds something of the tokens that a model is to predict from it."""
        if self.sae.sees_future:
            raise ConfigError(
                f"{self.folder.name} sees the future (causal = false): its x̂ would tell the model what it predicts."
            )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the store's tokens; the model itself is not loaded.

        Raises:
            ConfigError: it is not there, cannot be loaded, or is another one; a suite notes the message as a reason.
        """
        settings, identity = self.store.header["settings"], self.store.identity
        name, vocabulary = self.config.model or settings["model"], int(self.store.header["vocabulary"])
        revision = identity["model"].get("revision")
        tokenizer, found = self.models.load_tokenizer(name, revision, vocabulary, settings.get("tokenizer"))
        if identity["tokenizer"] != found:
            raise ConfigError(
                f"--model {name}: its tokenizer is not the one that {self.store.name} was harvested with. "
                "Name the right folder with --model."
            )
        return tokenizer
