"""What a run leaves behind."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from common.errors import StoreError
from train.record import Metrics, Status, read_lines


def test_status_is_whole_at_all_times_and_keeps_what_it_knows(tmp_path: Path) -> None:
    status = Status(tmp_path / "status.json", 100)
    status.write(step=7, last_loss=math.nan)
    status.write(state="interrupted", reason="stopped by SIGTERM")
    values = json.loads((tmp_path / "status.json").read_text())
    assert (values["state"], values["step"], values["steps"], values["pid"]) == ("interrupted", 7, 100, os.getpid())
    assert values["last_loss"] is None
    assert values["heartbeat"] > 1e9
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_status_of_a_run_that_goes_on_keeps_its_place_until_it_knows_better(tmp_path: Path) -> None:
    Status(tmp_path / "status.json", 100).write(state="interrupted", reason="SIGTERM", step=7, tokens_seen=70)
    again = Status(tmp_path / "status.json", 100)
    again.write()
    values = json.loads((tmp_path / "status.json").read_text())
    assert (values["state"], values["reason"], values["step"], values["tokens_seen"]) == ("running", "", 7, 70)


def test_metrics_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        metrics.append({"step": step, "loss": math.inf})
    with metrics.path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [line["step"] for line in read_lines(metrics.path)] == [10, 20, 30]
    metrics.keep_until(20)
    assert metrics.path.read_text() == '{"step": 10, "loss": null}\n{"step": 20, "loss": null}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"metrics\.jsonl: no space left on the disk: 13 bytes to write"):
        Metrics(tmp_path / "metrics.jsonl").append({"step": 10})


def test_metrics_of_a_new_learner_need_no_file(tmp_path: Path) -> None:
    Metrics(tmp_path / "metrics.jsonl").keep_until(0)
    assert not (tmp_path / "metrics.jsonl").exists()
