"""Learners over several ranks, in real processes: the same bits as in one, whoever is stopped or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from common.stopping import Stop
from tests.train.runs import equal, status_of
from tests.train.team import run_team, start_team, wait_for_steps
from tests.warm import ROOT, WarmServer
from train.ranks import ALONE, Ranks

LEARNERS = ("topk", "batchtopk", "predictor")  # rank 0 of 2 has the first and the last


def argv(store: Path, out: str, *more: str) -> list[str]:
    variants = [word for name in LEARNERS for word in ("--variant", name)]
    return [
        *("train", "fit", "--cache", str(store), "--out", out, *variants, "--d-sae", "64", "--k", "4"),
        *("--steps", "60", "--batch-size", "256", "--log-every", "3", "--checkpoint-every", "3"),
        *("--eval-tokens", "256", "--final-eval-tokens", "256", "--device", "cpu", *more),
    ]


@pytest.fixture(scope="module")
def straight(shared_store: Path, warm: WarmServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process, never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    assert warm.run(argv(shared_store, "r"), folder).code == 0
    return folder / "r"


def assert_same(run: Path, straight: Path) -> None:
    for name in LEARNERS:
        assert equal(run / name, straight / name), name


def test_learners_over_two_ranks_end_with_the_bits_of_one_process(
    shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path
) -> None:
    first, second = run_team(warm, argv(shared_store, "r", "--json"), tmp_path)
    assert_same(tmp_path / "r", straight)
    record = json.loads(first.out)
    assert (record["state"], list(record["learners"])) == ("finished", list(LEARNERS))
    assert second.out == ""
    assert second.err == ""
    status, alone = status_of(tmp_path / "r"), status_of(straight)
    assert (status["state"], status["reason"], status["step"]) == ("finished", "3 of 3 learners finished", 60)
    assert status["learners"] == alone["learners"]
    kept = {path.relative_to(tmp_path / "r") for path in (tmp_path / "r").rglob("*")}
    assert kept == {path.relative_to(straight) for path in straight.rglob("*")}
    again = run_team(warm, argv(shared_store, "r"), tmp_path)
    assert "finished already" in again[0].err
    assert again[1].err == ""


def test_a_killed_rank_ends_the_others_and_the_same_command_goes_on(
    shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path
) -> None:
    for killed, learner in ((1, "batchtopk"), (0, "topk")):
        team = start_team(warm, argv(shared_store, "r"), tmp_path)
        wait_for_steps(tmp_path / "r" / learner, 9)
        team.children[killed].signal(signal.SIGKILL)
        left = team.wait()[1 - killed]
        assert left.code == 75, left.err
        assert "Traceback" not in left.err
        if "the loss of another rank" in left.err:  # noticed between steps
            assert "train resume r" in left.err
        else:  # or by what ranks do together before the first: they are at step 9 from before
            assert "another rank ended, so this one cannot go on" in left.err
            assert "The same command goes on from the newest checkpoints" in left.err
    run_team(warm, argv(shared_store, "r"), tmp_path)
    assert_same(tmp_path / "r", straight)


def test_a_signal_stops_all_ranks_and_any_number_of_them_goes_on(
    shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path
) -> None:
    team = start_team(warm, argv(shared_store, "r"), tmp_path)
    wait_for_steps(tmp_path / "r" / "batchtopk", 9)
    team.signal(signal.SIGTERM)
    team.signal(signal.SIGTERM)  # a launcher passes on what reached them already
    for ended in team.wait():
        assert ended.code == 75, ended.err
        assert "Traceback" not in ended.err
    status = status_of(tmp_path / "r")
    assert status["state"] == "interrupted"
    for name, facts in status["learners"].items():
        assert facts["state"] == "interrupted"
        assert (tmp_path / "r" / name / "checkpoints" / f"step-{facts['step']:08d}" / "manifest.json").exists()
    alone = warm.start(["train", "resume", "r"], tmp_path)
    wait_for_steps(tmp_path / "r" / "batchtopk", 6)
    alone.signal(signal.SIGTERM)
    assert alone.wait().code == 75
    run_team(warm, ["train", "resume", "r"], tmp_path, n_ranks=3)
    assert_same(tmp_path / "r", straight)


def test_a_signal_to_one_rank_stops_all(shared_store: Path, tmp_path: Path, warm: WarmServer) -> None:
    team = start_team(warm, argv(shared_store, "r"), tmp_path)
    wait_for_steps(tmp_path / "r" / "batchtopk", 9)
    team.children[1].signal(signal.SIGTERM)
    first, second = team.wait()
    assert (first.code, second.code) == (75, 75), first.err + second.err
    assert "stopped by a signal to another rank at step" in first.err
    assert "stopped by SIGTERM at step" in second.err
    assert status_of(tmp_path / "r")["state"] == "interrupted"


def test_a_mistake_is_told_once_and_ends_all_ranks(shared_store: Path, tmp_path: Path, warm: WarmServer) -> None:
    (tmp_path / "file").touch()
    for more, code, said in (
        (("--set", "topk.kk=3"), 2, "ConfigError: --set topk.kk=3: unknown setting 'kk'"),
        (("--out", "file"), 2, "file is a file, not a folder"),
        (("--steps", "100k"), 4, "DataError: "),
    ):
        first, second = start_team(warm, argv(shared_store, "r", *more), tmp_path).wait()
        assert (first.code, second.code) == (code, code), first.err + second.err
        assert said in first.err
        assert len(first.err.splitlines()) == 1
        assert second.err == ""
    assert not (tmp_path / "r").exists()


def test_two_runs_of_ranks_do_not_share_a_folder(shared_store: Path, tmp_path: Path, warm: WarmServer) -> None:
    team = start_team(warm, argv(shared_store, "r"), tmp_path)
    wait_for_steps(tmp_path / "r" / "batchtopk", 3)
    other = warm.run(["train", "resume", "r"], tmp_path)
    assert other.code == 3
    assert "another process is writing this run" in other.err
    assert [ended.code for ended in team.wait()] == [0, 0]


@pytest.mark.slow
def test_torchrun_starts_ranks_and_passes_a_signal_on(
    shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *argv(shared_store, "r")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **streams) as launcher:
        wait_for_steps(tmp_path / "r" / "batchtopk", 9)
        launcher.send_signal(signal.SIGTERM)
        told = launcher.communicate(timeout=60)[1]
    assert launcher.returncode != 0
    assert told.count("Interrupted: stopped by") == 2, told
    assert status_of(tmp_path / "r")["state"] == "interrupted"
    run_team(warm, ["train", "resume", "r"], tmp_path)
    assert_same(tmp_path / "r", straight)


def test_a_process_alone_waits_for_nobody() -> None:
    stop = Stop()
    assert ALONE.stop_of_all(stop) is stop
    assert ALONE.gather(3) == [3]
    assert ALONE.own(["a", "b"]) == ["a", "b"]
    assert ALONE.device(torch.device("cuda")) == torch.device("cuda")
    with pytest.raises(ConfigError, match=r"^no$"):
        ALONE.together(refusing)


def refusing() -> None:
    raise ConfigError("no")


@pytest.mark.parametrize(("n_ranks", "expected"), [(2, ["ace", "bd"]), (3, ["ad", "be", "c"]), (6, [*"abcde", ""])])
def test_learners_are_dealt_to_ranks_like_cards(n_ranks: int, expected: list[str]) -> None:
    assert ["".join(Ranks(rank, n_ranks).own("abcde")) for rank in range(n_ranks)] == expected
