"""The studies in docs/examples: each with the model swapped for the built-in one and a few steps, to its end."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from common.config import build, read_toml
from common.stopping import Stop
from harvest import cli as harvest_cli
from harvest.config import HarvestConfig
from harvest.run import harvest
from tests.warm import ROOT
from train.settings import fit_config
from train.trainer import fit

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.toml"))


def harvest_commands(file: Path) -> list[list[str]]:
    """The `harvest run` lines of an example's head, as arguments."""
    lines = re.findall(r"# harvest run (.*)", file.read_text())
    return [shlex.split(line) for line in lines]


def harvest_config(arguments: list[str]) -> HarvestConfig:
    command = harvest_cli.cli.commands["run"]  # type: ignore[attr-defined]
    values = dict(command.make_context("run", arguments).params)
    given = {key: value for key, value in values.items() if key in HarvestConfig.model_fields and value is not None}
    return build(HarvestConfig, given, " ".join(arguments))


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What any of the harvest commands gives with the built-in model and a few tokens."""
    out = tmp_path_factory.mktemp("examples") / "store.zarr"
    values = harvest_config(harvest_commands(EXAMPLES[0])[0]).model_dump()
    swapped = {"model": "demo", "layer": (2,), "corpus": "stdlib", "tokens": 20_480, "out": out, "device": "cpu"}
    harvest(HarvestConfig(**values | swapped), Stop())
    return out


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_says_how_to_harvest_the_store_it_trains_on(file: Path) -> None:
    commands = harvest_commands(file)
    assert commands
    stores = {str(harvest_config(arguments).out) for arguments in commands}
    assert str(read_toml(file)["cache"]) in stores
    assert f"train fit --config docs/examples/{file.name}" in file.read_text()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_trains_every_learner_to_its_end(file: Path, demo_store: Path, tmp_path: Path) -> None:
    flags = {"cache": demo_store, "out": tmp_path / "run", "steps": "2", "batch_size": "512", "device": "cpu"}
    flags |= {"final_eval_tokens": "512", "eval_tokens": "256"}
    outcome = fit(fit_config(file, flags, (), {"d_sae": "512"}, ()), Stop())
    ends = {name: result["state"] for name, result in outcome.learners.items()}
    assert set(ends.values()) == {"finished"}, ends
    assert all(result["training_steps"] == 2 for result in outcome.learners.values())
