"""`train plot`: which files it writes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from common.errors import ConfigError, StoreError
from tests.train.report.made import CORE, EVALS, evaluation, made_learner, made_run
from tests.warm import ROOT
from train.cli import cli
from train.report.figures import FIGURES, Written, plot
from train.report.figures.shapes import Row

pytestmark = pytest.mark.usefixtures("small_pictures")


def test_plotting_again_gives_the_same_bytes(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", made_learner("a", evals={"core": CORE}))
    (first,), (second,) = (plot([run], tmp_path / out, ["model_preservation"]) for out in "ab")
    assert first.png.read_bytes() == second.png.read_bytes()
    assert [file.name for file in sorted((tmp_path / "a").iterdir())] == [first.csv.name, first.png.name]


@pytest.mark.parametrize(
    ("folder", "out", "message"),
    [("r", "file", "a file, not a folder"), ("both", None, "say with --out which folder")],
)
def test_places_that_do_not_do_are_refused(tmp_path: Path, folder: str, out: str | None, message: str) -> None:
    runs = [made_run(tmp_path / name, made_learner("a")) for name in ("r", "s")]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message):
        plot(runs if folder == "both" else runs[:1], None if out is None else tmp_path / out)


def test_a_damaged_file_is_one_error_and_nothing_is_written(tmp_path: Path) -> None:
    made_run(tmp_path / "r", made_learner("a"), made_learner("b", evals={"hierarchy": evaluation({})}))
    path = tmp_path / "r" / "b" / "eval" / "hierarchy.json"
    path.write_text(json.dumps(evaluation({}, faithfulness=[{"kept": 1}])))
    ended = CliRunner().invoke(cli, ["plot", str(tmp_path / "r"), "--figure", "faithfulness"])
    assert isinstance(ended.exception, StoreError)
    assert "b/eval/hierarchy.json: faithfulness has a row without ce" in str(ended.exception)
    assert not (tmp_path / "r" / "plots").exists()


@pytest.mark.parametrize(
    ("figure", "odd"),
    [
        ("temporal_consistency", {"temporal": evaluation({}, curve={"lags": 3, "rho": []})}),
        ("temporal_consistency", {"temporal": evaluation({}, groups={"slow": 3})}),
        ("temporal_consistency", {"temporal": EVALS["temporal"] | {"intervals": {"matched_rho_8": ["a", "b"]}}}),
        ("faithfulness", {"hierarchy": EVALS["hierarchy"] | {"faithfulness_model": {"ce": "x"}}}),
    ],
)
def test_what_cannot_be_drawn_is_one_error_that_names_the_learner(
    tmp_path: Path, figure: str, odd: dict[str, Any]
) -> None:
    made_run(tmp_path / "r", made_learner("a"), made_learner("b", evals=odd))
    with pytest.raises(
        StoreError, match=rf"r/b: a result file holds what {figure} cannot be drawn of \(\w+Error"
    ) as raised:
        plot([tmp_path / "r"], None, ["final_metrics", figure])
    assert "r/a" not in str(raised.value)
    assert not (tmp_path / "r" / "plots").exists()


def test_figures_that_are_named_are_drawn_alone(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", made_learner("a"))
    ended = CliRunner().invoke(cli, ["plot", str(run), "--figure", "final_loss_comparison", "--json"])
    assert [row["figure"] for row in json.loads(ended.stdout)] == ["final_loss_comparison"]
    assert len(list((run / "plots").iterdir())) == 2
    with pytest.raises(ConfigError, match=r"--figure fronts: no such figure\. Did you mean 'l0_fronts'"):
        plot([run], None, ["fronts"])


def test_a_run_without_a_learner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no learner has begun"):
        plot([made_run(tmp_path / "r")])


def test_the_page_lists_every_figure_and_what_is_written() -> None:
    page = (ROOT / "docs" / "report.md").read_text().split("\n## train plot\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([a-z0-9_]+)` \|", page, re.M) == list(FIGURES)
    words = set(re.findall(r"`(\w+)`", page))
    assert {field.name for kind in (Row, Written) for field in dataclasses.fields(kind)} <= words
