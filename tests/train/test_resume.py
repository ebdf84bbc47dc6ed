"""Kills and signals at any moment: the same command goes on, and ends with the same bits."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.stopping import Stop
from harvest.run import harvest
from tests.conftest import harvest_config
from tests.train.runs import equal
from tests.warm import Child, Ended, WarmServer, wait_for
from train.saes import REGISTRY

VARIANTS = list(REGISTRY)
KILLS = 20
SPEED = ("tokens_per_s", "wait_share")


def fit_argv(store: Path, out: str, *more: str) -> list[str]:
    """All variants at once; logs and checkpoints every few steps, so that kills land in all of them."""
    variants = [word for variant in VARIANTS for word in ("--variant", variant)]
    return [
        *("train", "fit", "--cache", str(store), "--out", out, *variants, "--d-sae", "32", "--k", "4"),
        *("--steps", "60", "--batch-size", "256", "--log-every", "3", "--checkpoint-every", "7"),
        *("--pool-tokens", "4096", "--eval-tokens", "256", *more),
    ]


@pytest.fixture(scope="module")
def straight(shared_store: Path, warm: WarmServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    assert warm.run(fit_argv(shared_store, "r"), folder).code == 0
    return folder / "r"


def metrics_of(run: Path, variant: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / variant / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEED} for line in lines]


def status_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "status.json").read_text()))


def assert_same(run: Path, straight: Path) -> None:
    """Every tensor, every metric and the last loss of every variant are those of the run never stopped."""
    for variant in VARIANTS:
        assert equal(run / variant, straight / variant), variant
        assert metrics_of(run, variant) == metrics_of(straight, variant), variant
        ours, theirs = (json.loads((folder / variant / "result.json").read_text()) for folder in (run, straight))
        for key in ("final_loss", "training_steps", "tokens_seen", "metrics", "state"):
            assert ours[key] == theirs[key], f"{variant} {key}"


def hears_signals(child: Child) -> bool:
    """Whether the child's SIGTERM handler is set."""
    for line in Path(f"/proc/{child.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def ask_to_stop(child: Child) -> Ended:
    child.signal(signal.SIGTERM)
    return child.wait()


def assert_interrupted(ended: Ended, run: Path) -> None:
    assert ended.code == 75, ended.err
    assert "Traceback" not in ended.err
    assert "train resume" in ended.err
    status = status_of(run)
    assert status["state"] == "interrupted"
    assert "SIGTERM" in status["reason"]


def resume(warm: WarmServer, folder: Path, straight: Path) -> None:
    ended = warm.run(["train", "resume", "r"], folder)
    assert ended.code == 0, ended.err
    assert_same(folder / "r", straight)
    assert status_of(folder / "r")["state"] == "finished"


@pytest.mark.slow
def test_random_kills_change_no_bit(shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path) -> None:
    draw = random.Random(0)
    started = time.monotonic()
    assert warm.run(fit_argv(shared_store, "timed"), tmp_path).code == 0
    whole_s = time.monotonic() - started
    landed, rounds = 0, 0
    while landed < KILLS:
        rounds += 1
        argv = fit_argv(shared_store, f"r{rounds}")
        finished = False
        while not finished and landed < KILLS:
            child = warm.start(argv, tmp_path)
            time.sleep(draw.uniform(0.02, 0.8 * whole_s))
            ended = child.kill()
            assert ended.code in (0, -signal.SIGKILL), ended.err
            finished = ended.code == 0
            landed += not finished
        ended = warm.run(argv, tmp_path)
        assert ended.code == 0, ended.err
        assert_same(tmp_path / f"r{rounds}", straight)
        assert not list((tmp_path / f"r{rounds}").glob(".rehearsal-*"))


@pytest.mark.slow
def test_kills_just_after_each_file_appears_change_no_bit(
    shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path
) -> None:
    first, last = VARIANTS[0], VARIANTS[-1]
    for number, moment in enumerate(
        (
            "run.toml",
            "data.json",
            f"{first}/config.json",
            f"{first}/checkpoints/step-00000007.aside",
            f"{last}/checkpoints/step-00000014",
            f"{first}/checkpoints/step-00000060",
            f"{first}/sae",
            f"{first}/result.json",
            f"{last}/eval/heldout.json",
        )
    ):
        out = tmp_path / f"r{number}"
        child = warm.start(fit_argv(shared_store, out.name), tmp_path)
        while not (out / moment).exists() and alive(child):
            pass  # as close to the moment as can be
        child.kill()
        ended = warm.run(fit_argv(shared_store, out.name), tmp_path)
        assert ended.code == 0, f"{moment}: {ended.err}"
        assert_same(out, straight)


def alive(child: Child) -> bool:
    """Whether the child still runs: neither ended nor reaped."""
    stat = Path(f"/proc/{child.pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_signal_while_loading_is_heard(shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path) -> None:
    child = warm.start(fit_argv(shared_store, "r"), tmp_path)
    wait_for(lambda: hears_signals(child))
    ended = ask_to_stop(child)
    assert_interrupted(ended, tmp_path / "r")
    resume(warm, tmp_path, straight)


def test_a_signal_in_a_step_is_heard(shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path) -> None:
    child = warm.start(fit_argv(shared_store, "r", "--checkpoint-every", "1000"), tmp_path)
    wait_for((tmp_path / "r" / VARIANTS[-1] / "metrics.jsonl").exists)
    assert_interrupted(ask_to_stop(child), tmp_path / "r")
    step = status_of(tmp_path / "r")["step"]
    assert 0 < step < 60
    for variant in VARIANTS:
        assert (tmp_path / "r" / variant / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    resume(warm, tmp_path, straight)


def test_a_signal_in_a_checkpoint_or_evaluation_is_heard(
    shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path
) -> None:
    child = warm.start(fit_argv(shared_store, "r", "--checkpoint-every", "1"), tmp_path)  # nearly all of the time
    wait_for((tmp_path / "r" / VARIANTS[0] / "checkpoints" / "step-00000002").exists)
    assert_interrupted(ask_to_stop(child), tmp_path / "r")
    resume(warm, tmp_path, straight)


def test_a_signal_in_finishing_is_heard(shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path) -> None:
    child = warm.start(fit_argv(shared_store, "r"), tmp_path)
    while not (tmp_path / "r" / VARIANTS[0] / "checkpoints" / "step-00000060").exists():
        assert alive(child)
    ended = ask_to_stop(child)
    assert_interrupted(ended, tmp_path / "r")
    resume(warm, tmp_path, straight)


@pytest.fixture
def slow_child(shared_store: Path, tmp_path: Path, warm: WarmServer) -> Iterator[Child]:
    """A run whose steps take a good part of a second."""
    argv = ["train", "fit", "--cache", str(shared_store), "--out", "r", "--variant", VARIANTS[0], "--d-sae", "16k"]
    child = warm.start([*argv, "--steps", "30", "--passes", "99", "--batch-size", "8192", "--log-every", "1"], tmp_path)
    yield child
    if alive(child):
        child.kill()


def test_a_second_signal_leaves_at_once(tmp_path: Path, slow_child: Child) -> None:
    wait_for((tmp_path / "r" / VARIANTS[0] / "metrics.jsonl").exists)
    slow_child.signal(signal.SIGTERM)
    wait_for(lambda: "once more to leave at once" in slow_child.err_so_far())
    slow_child.signal(signal.SIGTERM)
    ended = slow_child.wait()
    assert ended.code == 75
    assert "train resume" not in ended.err  # it did not stay to record the end
    assert status_of(tmp_path / "r")["state"] == "running"


def test_every_run_folder_can_be_moved(shared_store: Path, tmp_path: Path, warm: WarmServer, straight: Path) -> None:
    child = warm.start(fit_argv(shared_store, "elsewhere"), tmp_path)
    wait_for((tmp_path / "elsewhere" / VARIANTS[-1] / "metrics.jsonl").exists)
    child.kill()
    shutil.move(tmp_path / "elsewhere", tmp_path / "r")
    resume(warm, tmp_path, straight)


def test_a_store_that_grows_changes_nothing_for_the_runs_on_it(
    tiny_model: Path, texts: Path, tmp_path: Path, warm: WarmServer
) -> None:
    """30,016 tokens end in a short chunk; extending fills it up between a stop and a resume."""
    out = tmp_path / "grows.zarr"
    harvest(harvest_config(tiny_model, texts, out), Stop())
    argv = fit_argv(out, "straight")
    assert warm.run(argv, tmp_path).code == 0
    child = warm.start(fit_argv(out, "stopped"), tmp_path)
    wait_for(lambda: any(tmp_path.glob("stopped/*/checkpoints/step-*0")))
    child.signal(signal.SIGTERM)
    assert child.wait().code == 75
    harvest(harvest_config(tiny_model, texts, out, tokens=40_000), Stop())
    ended = warm.run(["train", "resume", "stopped"], tmp_path)
    assert ended.code == 0, ended.err
    assert_same(tmp_path / "stopped", tmp_path / "straight")
    assert warm.run(["train", "eval", "straight"], tmp_path).code == 0
