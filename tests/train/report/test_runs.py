"""What is read of runs, the unfinished and the damaged ones too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, StoreError
from common.files import read_json, write_json
from tests.train.report.made import BATCH, CORE, EVALS, STEPS, evaluation, made_learner, made_run
from tests.train.runs import learner, run
from train.report.runs import Record, read_records


def records_of(*paths: Path) -> dict[str, Record]:
    return {record.name: record for record in read_records(paths)}


def test_a_real_run_is_read_as_its_files_say(shared_store: Path, tmp_path: Path) -> None:
    wild = learner("standard", "wild", lr=1e30)
    out = run(shared_store, tmp_path / "r", learner("topk"), wild, steps=20, final_eval_tokens=512).path
    found = records_of(Path(out))
    result = read_json(tmp_path / "r" / "topk" / "result.json")
    topk = found["topk"]
    assert (topk.state, topk.steps, topk.asked, topk.aim) == ("finished", 20, 20, 4)
    assert (topk.final_loss, topk.seconds, topk.metrics) == (result["final_loss"], result["seconds"], result["metrics"])
    assert topk.tokens_per_s == result["tokens_seen"] / result["seconds"]
    assert [line["step"] for line in topk.lines] == [5, 10, 15, 20]
    assert topk.figure("heldout", "explained_variance") == (result["metrics"]["explained_variance"], "")
    assert topk.source.endswith("blocks.1.hook_resid_post")
    assert found["wild"].ending.startswith("diverged: ")
    assert found["wild"].figure("heldout", "l0") == (None, found["wild"].ending)


def test_learners_that_run_or_wait_are_read_as_far_as_they_came(tmp_path: Path) -> None:
    begun, waiting = made_learner("a", state="running", steps=20), made_learner("b", state="waiting", steps=0)
    made_run(tmp_path, begun, waiting, made_learner("c"), state="running")
    (tmp_path / "c" / "config.json").unlink()  # not begun
    found = records_of(tmp_path)
    assert [(record.state, record.steps, record.asked) for record in found.values()] == [
        ("running", 20, STEPS), ("waiting", 0, STEPS)
    ]  # fmt: skip
    assert found["a"].final_loss == found["a"].lines[-1]["loss"]
    assert found["a"].tokens == 20 * BATCH
    assert found["b"].final_loss is None
    assert found["a"].figure("core", "l0") == (None, "not finished yet")


def test_a_run_that_fell_silent_was_killed(tmp_path: Path) -> None:
    made_run(tmp_path, made_learner("a", state="running"), state="running")
    status = read_json(tmp_path / "status.json")
    write_json(tmp_path / "status.json", status | {"heartbeat": 0.0})
    assert records_of(tmp_path)["a"].ending == "killed: not heard of since 1970-01-01 00:00 UTC"


def test_a_figure_that_is_not_there_has_its_reason(tmp_path: Path) -> None:
    core = evaluation({"l0": 3.5, "ce_loss_score": None})
    record = records_of(made_run(tmp_path, made_learner("a", evals={"core": core})))["a"]
    assert record.figure("core", "l0") == (3.5, "")
    assert record.figure("core", "ce_loss_score") == (None, "made so")
    assert record.figure("core", "other") == (None, "eval/core.json does not have other")
    assert record.figure("temporal", "l0") == (
        None, f"no eval/temporal.json: train eval {tmp_path} --suite temporal"
    )  # fmt: skip


def test_of_several_results_the_one_of_the_most_tokens_counts(tmp_path: Path) -> None:
    few, many, other = (evaluation({"l0": l0}) for l0 in (1.0, 2.0, 3.0))
    evals = {"core-100": few, "core-2000": many, "unlearn-saebench": other, "temporal-50": few, "temporal": many}
    found = records_of(made_run(tmp_path, made_learner("a", evals=evals)))["a"].evaluations
    assert {suite: result["metrics"]["l0"] for suite, result in found.items()} == {
        "core": 2.0, "unlearn-saebench": 3.0, "temporal": 2.0
    }  # fmt: skip


def test_a_learner_folder_is_that_learner_alone(tmp_path: Path) -> None:
    made_run(tmp_path, made_learner("a"), made_learner("b"))
    assert list(records_of(tmp_path / "b")) == ["b"]
    with pytest.raises(ConfigError, match="b: named twice"):
        records_of(tmp_path, tmp_path / "b")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("status.json", "{", r"status\.json: not valid JSON"),
        ("data.json", "[]", r"data\.json: not a file of a run: no 'identity' in it"),
        ("a/config.json", '{"variant": "topk"}', "no 'options, seed' in it"),
        ("a/config.json", '{"variant": "topk", "options": 3, "seed": 0}', "not what a run leaves"),
        ("a/result.json", '"x"', "no 'state, training_steps' in it"),
        ("a/eval/core.json", "", r"core\.json: not valid JSON"),
        ("a/eval/core.json", '{"metrics": [1]}', r"core\.json: metrics is no object"),
        ("a/metrics.jsonl", "1\n", r"metrics\.jsonl: not a file of a run: a line has no step"),
        ("a/metrics.jsonl", b"\xff\xfe\n", r"metrics\.jsonl: not what a run leaves"),
        ("a/result.json", '{"state": "finished", "training_steps": 1, "final_loss": "x"}', "not what a run leaves"),
        ("run.toml", "= 3", r"run\.toml: not valid TOML"),
        ("run.toml", "learner = 3", "not what a run leaves"),
    ],
)
def test_damaged_and_foreign_files_are_one_error(tmp_path: Path, file: str, text: str | bytes, message: str) -> None:
    made_run(tmp_path, made_learner("a", evals=EVALS))
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StoreError, match=message):
        records_of(tmp_path)


def test_learners_that_were_copied_into_a_run_are_read_too(tmp_path: Path) -> None:
    other = made_run(tmp_path / "other", made_learner("early"))
    run = made_run(tmp_path / "r", made_learner("later"), made_learner("gone"))
    shutil.copytree(other / "early", run / "early")
    shutil.rmtree(run / "gone")
    assert list(records_of(run)) == ["later", "early"]


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    made_run(tmp_path, made_learner("a"))
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 50, "lo')
    assert [line["step"] for line in records_of(tmp_path)["a"].lines] == [10, 20, 30, 40]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no run here \(no run\.toml\)"):
        records_of(tmp_path)


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"a": 1}, "eval_result_details is no list"),
        ([{"feature_density": None}], "eval_result_details has a row without feature_density"),
        ([7], "has a row without feature_density"),
    ],
)
def test_a_table_of_other_rows_is_refused(tmp_path: Path, details: Any, message: str) -> None:
    evals = {"core": json.loads(json.dumps(CORE)) | {"eval_result_details": details}}
    record = records_of(made_run(tmp_path, made_learner("a", evals=evals)))["a"]
    with pytest.raises(StoreError, match=message):
        record.densities()
