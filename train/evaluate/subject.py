"""What a suite is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.errors import ConfigError, Interrupted
from common.models import LanguageModel, Tokenizer, find_model, load_model
from common.stopping import Stop
from common.store import Store
from train.config import EvalConfig
from train.data.batch import Batch
from train.data.reader import Batches, DataPlan
from train.saes.base import SAE


@dataclass(frozen=True)
class Evaluation:
    """The result of one suite on one learner.

    Attributes:
        metrics: the figures that the suite's table in the docs names, in its order; None where one does not apply.
        reasons: why, for each metric that is None.
        more: what else `eval/<suite>.json` says, as JSON values at its top level: curves, latents, settings.
    """

    metrics: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


class Models:
    """Language models, each loaded once for all the learners of a command, at most one held at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: tuple[str, str | None, str | None] | None = None
        self._model: LanguageModel | None = None

    def load(self, name: str, revision: str | None, tokenizer: str | None) -> LanguageModel:
        """The model of this name in float32.

        Raises:
            ConfigError: it is not there, or cannot be loaded.
        """
        key = (name, revision, tokenizer)
        if self._model is None or self._key != key:
            self._model = None
            self._model = load_model(find_model(name, revision), str(self.device), "float32", tokenizer)
            self._key = key
        return self._model


@dataclass(frozen=True)
class Subject:
    """A trained SAE with all that suites may look at.

    Attributes:
        folder: the learner's.
        sae: raw units, on `device`, in evaluation mode.
        facts: `sae/config.json`.
    """

    folder: Path
    sae: SAE
    facts: dict[str, Any]
    batches: Batches
    config: EvalConfig
    device: torch.device
    models: Models
    stop: Stop

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
        for batch in self.batches.held_out(window or self.sae.window, self.config.max_tokens):
            self.refuse_when_stopped()
            yield batch

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
                f"--model {name}: not the model that {self.store.path} was harvested from (other weights). "
                "Name the right folder with --model."
            )
        return model

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the store's tokens; raises as `language_model`."""
        return self.language_model().tokenizer
