"""Killed at any instant, the same command goes on and the store has the same bytes."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.checks import problems
from common.layout import TOKENS
from common.store import Store
from tests.stores import metadata_files, unequal
from tests.warm import Child, WarmServer, wait_for

KILLS, N_STORES = 28, 4
TOKENISED = 2 * 59  # lines of the journal once every chunk's tokens and documents are there


@pytest.fixture(scope="module")
def command(tiny_model: Path, texts: Path) -> Callable[..., list[str]]:
    """`harvest run` of 59 chunks of 8 sequences at two hooks: 354 commits, some 60 in tokenising."""

    def build(out: Path, *more: str) -> list[str]:
        sizes = ["--tokens", "30000", "--context", "64", "--chunk-sequences", "8", "--batch-size", "8"]
        hooks = ["--layer", "0", "--layer", "1", "--device", "cpu"]
        return ["harvest", "run", "--model", str(tiny_model), "--corpus", str(texts), "--out", str(out)] + (
            hooks + sizes + list(more)
        )

    return build


@pytest.fixture(scope="module")
def straight(warm: WarmServer, command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    ended = warm.run(command(folder / "x.zarr"), folder)
    assert ended.code == 0, ended.err
    return folder / "x.zarr"


def lines(path: Path) -> int:
    journal = path / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def ended_by_itself(child: Child) -> bool:
    """Whether a child only waits to be reaped."""
    return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def start_and_wait(warm: WarmServer, argv: list[str], path: Path, n_lines: int, at_least: int = 0) -> Child:
    """A child that has appended `n_lines` to a journal of `at_least` so many, or has ended."""
    goal = max(lines(path), at_least) + n_lines
    child = warm.start(argv, path.parent)
    wait_for(lambda: lines(path) >= goal or ended_by_itself(child))
    return child


@pytest.mark.slow
def test_harvest_killed_many_times_ends_with_the_same_bytes(
    warm: WarmServer, command: Callable[..., list[str]], straight: Path, tmp_path: Path
) -> None:
    chance = random.Random(0)
    paths = [tmp_path / f"{number}.zarr" for number in range(N_STORES)]
    killed_in = []
    for number, path in enumerate(paths * (KILLS // N_STORES)):
        # loading the model takes most of a short life, so delays count from the first commits of this one; in the
        # second half from the first of the forward stage, which a loaded machine would hardly reach
        past = TOKENISED if number >= KILLS // 2 else 0
        child = start_and_wait(warm, command(path), path, chance.choice([0, 1, 2, 5, 20, 40]), past)
        time.sleep(chance.uniform(0.0, 0.05))
        if child.kill().code == -signal.SIGKILL:
            store = Store.open(path) if (path / "zarr.json").exists() else None
            tokenised = store is not None and len(store.committed(TOKENS)) == store.n_chunks
            killed_in.append("forward" if tokenised else "tokenise")
    assert len(killed_in) >= 20
    assert min(killed_in.count("forward"), killed_in.count("tokenise")) >= 5
    for path in paths:
        ended = warm.run(command(path), tmp_path)
        assert ended.code == 0, ended.err
        assert unequal(path, straight) == []
        assert metadata_files(path) == metadata_files(straight)
        assert Store.open(path).leftovers() == []
        assert list(problems(Store.open(path))) == []


@pytest.mark.parametrize(("name", "n_lines", "stage"), [("SIGTERM", 3, "while tokenising"), ("SIGINT", 200, "after ")])
def test_harvest_stopped_by_a_signal_exits_75_and_goes_on(
    warm: WarmServer,
    command: Callable[..., list[str]],
    straight: Path,
    tmp_path: Path,
    name: str,
    n_lines: int,
    stage: str,
) -> None:
    path = tmp_path / "x.zarr"
    child = start_and_wait(warm, command(path), path, n_lines)
    child.signal(signal.Signals[name])
    ended = child.wait()
    assert ended.code == 75
    assert f"{name}: finishing what is under way; once more to leave at once." in ended.err
    assert f"Interrupted: stopped by {name} {stage}" in ended.err
    assert "the same command goes on." in ended.err
    assert lines(path) < lines(straight)
    assert list(problems(Store.open(path))) == []
    again = warm.run(command(path), tmp_path)
    assert again.code == 0, again.err
    assert unequal(path, straight) == []
    assert metadata_files(path) == metadata_files(straight)


def test_harvest_of_a_store_that_another_process_writes_is_refused(
    warm: WarmServer, command: Callable[..., list[str]], straight: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.zarr"
    first = start_and_wait(warm, command(path), path, 3)
    first.signal(signal.SIGSTOP)
    try:
        second = warm.run(command(path), tmp_path)
        mending = warm.run(["harvest", "verify", str(path)], tmp_path)
    finally:
        first.signal(signal.SIGCONT)
    assert second.code == 3
    assert f"StoreError: {path}: another process is writing this store. Wait for it, or stop it." in second.err
    assert mending.code == 0  # looking is always allowed
    assert first.wait().code == 0
    assert unequal(path, straight) == []
