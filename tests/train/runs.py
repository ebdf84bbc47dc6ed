"""Small runs through the library, for the tests of everything that makes one up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.config import build
from common.stopping import Stop
from train.config import FitConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import REGISTRY
from train.trainer import Outcome, fit

VARIANTS = list(REGISTRY)


def learner(variant: str, name: str = "", **more: Any) -> dict[str, Any]:
    common = {key: more.pop(key) for key in ("lr", "seed", "grad_clip") if key in more}
    known = REGISTRY[variant].Config.model_fields
    options = {key: value for key, value in ({"d_sae": 32, "k": 4} | more).items() if key in known}
    return {"name": name or variant, "variant": variant, "options": options, **common}


def config(store: Path, out: Path, *learners: dict[str, Any], **more: Any) -> FitConfig:
    values = {"cache": store, "out": out, "steps": 40, "batch_size": 256, "log_every": 5, "checkpoint_every": 10}
    return build(FitConfig, values | {"eval_tokens": 256, "device": "cpu", "learner": learners} | more, "test")


def run(store: Path, out: Path, *learners: dict[str, Any], **more: Any) -> Outcome:
    return fit(config(store, out, *learners, **more), Stop())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae" / "weights.safetensors")


def equal(one: Path, other: Path) -> bool:
    """Whether two learners ended with the same bits: the SAE and the last checkpoint."""
    ours, theirs = weights(one), weights(other)
    last = [sorted((folder / "checkpoints").glob("step-*"))[-1] for folder in (one, other)]
    pairs = [(ours, theirs)]
    pairs += [
        (load_file(last[0] / f"{name}.safetensors"), load_file(last[1] / f"{name}.safetensors"))
        for name in ("weights", "optimizer", "sums")
    ]
    return last[0].name == last[1].name and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs
    )


def status_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "status.json").read_text()))


def breaking(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """Make the step of one learner fail, as it does when memory runs out."""
    queue_step = Learner.queue_step

    def fail(self: Learner, batch: Batch, batch_tokens: int) -> None:
        if self.name == name and self.step == step:
            raise torch.OutOfMemoryError("out of memory\nand more")
        queue_step(self, batch, batch_tokens)

    monkeypatch.setattr(Learner, "queue_step", fail)
