"""The command: what it prints, what it refuses, and its page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from common.config import build
from common.errors import ConfigError, StoreError
from common.stopping import Stop
from common.store import Store
from tests.test_docs import PAGES, named, section
from tests.train.evaluate.test_subject import subject_on
from train.cli import cli
from train.config import UnlearnConfig
from train.evaluate.unlearn.command import with_texts
from train.evaluate.unlearn.nll import METRICS
from train.evaluate.unlearn.saebench import SAEBENCH_METRICS
from train.saes import make_sae


def call(run: Path, *words: str) -> str:
    result = CliRunner().invoke(cli, ["unlearn", str(run), *words], obj=Stop(), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def texts(folder: Path) -> tuple[str, ...]:
    few = ("--threshold", "0.01", "--latents", "5", "--multiplier", "20", "--absolute", "25", "--device", "cpu")
    return ("--forget", str(folder / "forget"), "--retain", str(folder / "retain"), *few)


def test_command_prints_a_table_or_the_files(letters_run: Path, letters_folder: Path) -> None:
    shown = call(letters_run, *texts(letters_folder))
    assert re.search(r"letters +│ +\d", shown)
    assert "−20 mean" in shown or "−25 raw" in shown
    printed = json.loads(call(letters_run, *texts(letters_folder), "--json"))
    assert printed == [json.loads((letters_run / "letters" / "eval" / "unlearn.json").read_text())]


def test_command_says_why_a_figure_is_missing(letters_run: Path, letters_folder: Path) -> None:
    words = (*texts(letters_folder), "--threshold", "0")
    result = CliRunner().invoke(cli, ["unlearn", str(letters_run), *words], obj=Stop(), catch_exceptions=False)
    assert "– no --also-retain was given" in result.stderr


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("--latents", "0"), ConfigError, "--latents are at least 1"),
        (("--threshold", "-1"), ConfigError, "--threshold, --multiplier and --absolute at least 0"),
        (("--data", "x", "--forget", "y"), ConfigError, "leave out --forget"),
        (("--max-tokens", "many"), ConfigError, "--max-tokens many: a whole number is needed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    words: tuple[str, ...], error: type[Exception], message: str, letters_run: Path
) -> None:
    with pytest.raises(error, match=message):
        CliRunner().invoke(cli, ["unlearn", str(letters_run), *words], obj=Stop(), catch_exceptions=False)


def test_an_sae_that_sees_the_future_is_refused(store: Store) -> None:
    sae = make_sae("multiscale", {"d_sae": 32, "k": 4, "causal": False}, 16, 0, "test")
    config = build(UnlearnConfig, {"forget": "x", "retain": "y"}, "test")
    with pytest.raises(ConfigError, match="sees the future"):
        with_texts(replace(subject_on(store), sae=sae), config, {})


def test_run_without_a_learner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no finished learner here"):
        CliRunner().invoke(cli, ["unlearn", str(tmp_path)], obj=Stop(), catch_exceptions=False)
    with pytest.raises(StoreError, match=r"none: no such folder\.$"):
        CliRunner().invoke(cli, ["unlearn", str(tmp_path / "none")], obj=Stop(), catch_exceptions=False)


def test_page_lists_every_metric() -> None:
    losses, questions = section(PAGES["train"], "train unlearn").split("### On losses\n")[1].split("### On questions")
    assert set(named(losses.split("The file also has")[0])) == set(METRICS)
    assert set(named(questions)) == set(SAEBENCH_METRICS)
