"""`train compare` on real runs: what is read, what is left out and said, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from common.config import build
from common.errors import ConfigError, StoreError
from common.files import read_json, write_json
from common.stopping import Stop
from tests.train.report.made import made_learner, made_run
from train.cli import cli
from train.config import FitConfig
from train.report.points import read_points
from train.trainer import fit


def learner(variant: str, k: int, seed: int | None, **more: Any) -> dict[str, Any]:
    return {
        "name": f"{variant}-k{k}-seed{seed}",
        "variant": variant,
        "options": {"d_sae": 32, "k": k},
        "seed": seed,
    } | more


def run(store: Path, out: Path, *learners: dict[str, Any], **more: Any) -> Path:
    values = {"cache": store, "out": out, "steps": 30, "batch_size": 256, "eval_tokens": 256, "device": "cpu"}
    fit(build(FitConfig, values | {"final_eval_tokens": 1024, "learner": learners} | more, "test"), Stop())
    return out


def compare(*words: object) -> Result:
    return CliRunner().invoke(cli, ["compare", *map(str, words)])


@pytest.fixture(scope="module")
def study(shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants at two k and two seeds, and one learner that diverges."""
    learners = [learner(variant, k, seed) for variant in ("batchtopk", "topk") for k in (2, 8) for seed in (0, 1)]
    wild = {"name": "wild", "variant": "standard", "options": {"d_sae": 32}, "lr": 1e3}
    return run(shared_store, tmp_path_factory.mktemp("compare") / "study", *learners, wild)


@pytest.fixture(scope="module")
def larger_batches(shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(shared_store, tmp_path_factory.mktemp("compare") / "large", learner("batchtopk", 2, 0), batch_size=512)


def test_compare_reads_a_run_and_names_what_diverged(study: Path) -> None:
    ended = compare(study, "--l0", "4", "--json")
    rows = {row["name"]: row for row in json.loads(ended.stdout)}
    assert rows.keys() == {"batchtopk", "topk"}
    assert f"{study}/wild: left out: diverged: " in ended.stderr
    topk = rows["topk"]
    assert (topk["l0"], topk["measured_l0"], topk["seeds"], topk["paired_seeds"]) == (4, 4, 2, 2)
    read = {
        (k, seed): read_json(study / f"topk-k{k}-seed{seed}" / "result.json")["metrics"]
        for k in (2, 8)
        for seed in (0, 1)
    }
    by_hand = []
    for seed in (0, 1):
        low, high = read[2, seed], read[8, seed]
        share = math.log(4 / low["l0"]) / math.log(high["l0"] / low["l0"])
        by_hand.append((1 - share) * low["explained_variance"] + share * high["explained_variance"])
    assert topk["explained_variance"] == pytest.approx(sum(by_hand) / 2, rel=1e-9)
    assert topk["verdict"] in ("above", "below", "level")


@pytest.mark.parametrize("form", ["--csv", "--markdown", "--json"])
def test_an_l0_out_of_reach_is_refused_in_every_form(study: Path, form: str) -> None:
    assert isinstance(compare(study, "--l0", "500", form).exception, ConfigError)


@pytest.mark.parametrize(("ending", "form"), [(".json", "--json"), (".csv", "--csv"), (".md", "--markdown")])
def test_a_table_is_written_in_the_form_of_the_files_ending(
    study: Path, tmp_path: Path, ending: str, form: str
) -> None:
    file = tmp_path / "tables" / f"t{ending}"
    printed = compare(study, "--l0", "4", form, "--out", file)
    assert printed.exit_code == 0
    assert file.read_text() == printed.stdout or json.loads(file.read_text()) == json.loads(printed.stdout)


def test_another_ending_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*t\.txt: its ending says in which form: \.json, \.csv, \.md"):
        raise compare(tmp_path / "absent", "--out", tmp_path / "t.txt").exception or AssertionError("compared")
    (tmp_path / "t.md").mkdir()
    with pytest.raises(ConfigError, match="a folder"):
        raise compare(tmp_path / "absent", "--out", tmp_path / "t.md").exception or AssertionError("compared")


def test_learners_of_other_batches_are_another_kind(study: Path, larger_batches: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size: 256 → 512"):
        raise compare(study, larger_batches).exception or AssertionError("compared")
    rows = json.loads(compare(study, larger_batches, "--baseline", "batchtopk-1", "--l0", "2", "--json").stdout)
    assert {row["name"] for row in rows} == {"batchtopk-1", "batchtopk-2", "topk"}


def test_runs_that_differ_in_seed_alone_are_one_kind(shared_store: Path, tmp_path: Path) -> None:
    runs = [run(shared_store, tmp_path / f"{seed}", learner("topk", 4, None), seed=seed) for seed in (3, 4)]
    points = read_points(runs)
    assert [point.seed for point in points] == [3, 4]
    assert points[0].kind == points[1].kind


@pytest.mark.parametrize("key", ["store", "hook"])
def test_learners_of_several_stores_or_hooks_are_refused(study: Path, tmp_path: Path, key: str) -> None:
    other = Path(shutil.copytree(study / "topk-k2-seed0", tmp_path / "other" / "topk")).parent
    facts = read_json(study / "data.json")
    mine = facts["identity"][key]
    facts["identity"][key] = "elsewhere"
    write_json(other / "data.json", facts)
    with pytest.raises(ConfigError, match=rf"{key} {mine}, .*other/topk on {key} elsewhere: their figures do not"):
        read_points([study, other])


def test_learners_without_held_out_figures_are_left_out(
    shared_store: Path, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = run(shared_store, tmp_path / "blind", learner("topk", 4, 0), held_out=0)
    capsys.readouterr()
    assert len(read_points([study, blind])) == 8
    assert "blind/topk-k4-seed0: left out: no held-out figures" in capsys.readouterr().err
    with pytest.raises(StoreError, match=r"no finished learner with held-out figures.*--held-out 0"):
        read_points([blind])


@pytest.mark.parametrize(
    ("file", "value"),
    [("a/result.json", [1]), ("a/result.json", {"state": "finished", "metrics": {"l0": 4.0}}), ("data.json", {})],
)
def test_files_of_another_form_are_one_error(tmp_path: Path, file: str, value: Any) -> None:
    run = made_run(tmp_path, made_learner("a"))
    write_json(run / file, value)
    with pytest.raises(StoreError, match=r"/a: not what a run leaves \(\w+Error"):
        read_points([run])


def test_a_learner_with_a_figure_that_is_null_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path, made_learner("a"), made_learner("b", ev=None))
    assert [point.name for point in read_points([run])] == ["a"]
    assert "b: left out: no held-out explained_variance" in capsys.readouterr().err


def test_a_folder_without_a_learner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no learner here"):
        read_points([tmp_path])


def test_a_learner_that_has_not_ended_is_named(study: Path, tmp_path: Path) -> None:
    begun = Path(shutil.copytree(study / "topk-k2-seed0", tmp_path / "begun"))
    (begun / "result.json").unlink()
    with pytest.raises(StoreError, match="begun: left out: not finished: see train resume"):
        read_points([begun])
