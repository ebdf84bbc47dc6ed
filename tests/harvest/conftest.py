"""Small harvests, and what the tests of the stages share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from common.stopping import Stop
from harvest.config import HarvestConfig
from harvest.run import Outcome, harvest
from tests.conftest import harvest_config


def small(model: Path, texts: Path, out: Path, **more: Any) -> HarvestConfig:
    """1,600 tokens in 50 sequences of 32, chunks of 16: the last one has 2."""
    values = {"tokens": 1600, "context": 32, "chunk_sequences": 16, "batch_size": 8}
    return harvest_config(model, texts, out, **(values | more))


def go(config: HarvestConfig) -> Outcome:
    return harvest(config, Stop())


@pytest.fixture(scope="module")
def finished(tiny_model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished store. Only read."""
    out = tmp_path_factory.mktemp("finished") / "x.zarr"
    go(small(tiny_model, texts, out))
    return out


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model, with the byte `g` embedded as 1e20: far over what float16 holds."""
    folder = tmp_path_factory.mktemp("overflow") / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][ord("g")] = 1e20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
