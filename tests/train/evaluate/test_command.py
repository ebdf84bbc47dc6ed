"""`train eval`: what it writes beside a learner, and what a person sees."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import build
from common.console import Progress
from common.files import read_json
from common.stopping import Stop
from common.store import Store
from tests.train.evaluate.test_subject import subject_on
from tests.train.runs import learner, run
from train.commands.evaluate import print_suite
from train.config import EvalConfig
from train.evaluate import METRICS
from train.evaluate.command import evaluate_runs, teller


def test_each_suite_leaves_its_file_and_the_last_line_counts_them(
    shared_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    run(shared_store, out, learner("topk"), learner("gated"), steps=3, held_out=0.2, checkpoint_every=3, log_every=3)
    capsys.readouterr()
    config = build(EvalConfig, {"suite": "heldout,core", "device": "cpu", "batches": "1,1"}, "test")
    results = evaluate_runs([out], config, Stop())
    assert [(result["learner"], result["suite"]) for result in results] == [
        ("gated", "heldout"),
        ("gated", "core"),
        ("topk", "heldout"),
        ("topk", "core"),
    ]
    for result in results:
        assert list(result["metrics"]) == list(METRICS[result["suite"]])
        assert read_json(out / result["learner"] / "eval" / f"{result['suite']}.json") == result
    assert sorted(file.name for file in (out / "topk" / "eval").iterdir()) == [
        "core.json",
        "core_mask.npy",
        "core_tokens.npy",
        "heldout.json",
    ]
    assert results[1]["metrics"]["ce_loss_without_sae"] == results[3]["metrics"]["ce_loss_without_sae"]
    assert capsys.readouterr().err == "eval 100 % · results: 4\n"


def test_a_long_suite_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("common.console.LINE_EVERY_S", 0.0)
    progress = Progress("eval", 4)
    tell = teller(progress, 1, "heldout of topk")
    tell(8192)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("eval  25 % · heldout of topk")
    assert second.startswith("eval  25 % · heldout of topk · 8,192 tokens")


def test_a_pass_over_the_held_out_documents_tells_its_tokens(store: Store) -> None:
    told: list[int] = []
    subject = dataclasses.replace(subject_on(store), tell=told.append)
    tokens = np.cumsum([batch.n_valid for batch in subject.held_out()])
    assert told == tokens.tolist()


def result(name: str, run: str = "runs/a", **more: Any) -> dict[str, Any]:
    return {"learner": name, "run": run, "metrics": {"l0": 12.5, "score": None}, "reasons": {}} | more


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(("│", "┃"))]
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]


def test_a_table_has_a_row_for_each_metric_and_a_column_for_each_learner(capsys: pytest.CaptureFixture[str]) -> None:
    gone, why = "no model here", {"score": "no model here"}
    print_suite("core", [result("topk", reasons=why), result("gated", reasons=why | {"l0": "dead"})])
    shown = capsys.readouterr()
    assert cells(shown.out) == [["metric", "topk", "gated"], ["l0", "12.5", "12.5"], ["score", "–", "–"]]
    assert shown.err == f"– score: {gone}\n– l0: dead\n"


def test_a_reason_of_many_metrics_names_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    print_suite("core", [result("topk", reasons=dict.fromkeys("abcde", "gone"))])
    assert capsys.readouterr().err == "– a, b, c and 2 more: gone\n"


def test_learners_of_several_runs_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    print_suite("core", [result("topk"), result("topk", "runs/b")])
    assert cells(capsys.readouterr().out)[0] == ["metric", "a/topk", "b/topk"]


def test_many_learners_are_several_tables(capsys: pytest.CaptureFixture[str]) -> None:
    print_suite("core", [result(f"l{number}") for number in range(11)])
    rows = cells(capsys.readouterr().out)
    assert [row for row in rows if row[0] == "metric"] == [
        ["metric", *(f"l{number}" for number in range(8))],
        ["metric", "l8", "l9", "l10"],
    ]
