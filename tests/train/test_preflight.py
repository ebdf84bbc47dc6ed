"""What is refused before step 0."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.config import build
from common.errors import ConfigError, DataError
from common.stopping import Stop
from tests.warm import WarmServer
from train.config import FitConfig
from train.learner import Learner
from train.preflight import learners_at_once, resolve_steps
from train.saes.topk import TopKConfig
from train.trainer import fit

STORE = "c.zarr"


def config(**values: Any) -> FitConfig:
    return build(FitConfig, {"cache": "c.zarr"} | values, "test")


def test_more_steps_than_the_store_holds_are_refused_with_both_numbers_and_the_flags() -> None:
    with pytest.raises(DataError) as caught:
        resolve_steps(config(steps=1000, batch_size=2048), 20_000, 1, STORE)
    for piece in ("1,000 steps", "2,048,000 tokens", "20,000", "9 steps", "--passes 102.4", "--steps 9", "--tokens"):
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"steps": 9}, 9),
        ({"tokens": 5000}, 2),  # rounded down to whole batches
        ({"passes": 1}, 9),
        ({"passes": 3}, 29),  # 60,000 / 2,048 = 29.3
        ({"passes": 0.5}, 4),
        ({"steps": 25, "passes": 3}, 25),
    ],
)
def test_amounts_become_exact_steps(asked: dict[str, Any], expected: int) -> None:
    amount = resolve_steps(config(batch_size=2048, **asked), 20_000, 1, STORE)
    assert amount.n_steps == expected
    assert amount.passes == pytest.approx(expected * 2048 / 20_000)


@pytest.mark.parametrize("asked", [{"passes": 1}, {"passes": 50}, {"steps": 1}, {"tokens": 100}])
def test_less_than_one_step_is_never_a_success(asked: dict[str, Any]) -> None:
    held = 30
    if asked == {"passes": 50}:  # 50 passes over 30 tokens fill 2,048 only with 69 of them
        held = 40
    with pytest.raises(DataError, match="less than one step of --batch-size 2,048"):
        resolve_steps(config(batch_size=2048, **asked), held, 1, STORE)


def test_windows_are_counted_whole() -> None:
    assert resolve_steps(config(passes=1, batch_size=64), 100, 16, STORE).n_steps == 25
    with pytest.raises(ConfigError, match="--batch-size 65: not a multiple of the window of 16 tokens"):
        resolve_steps(config(passes=1, batch_size=65), 100, 16, STORE)


@pytest.mark.parametrize("held", [100, 137, 1000])
def test_the_passes_that_are_suggested_are_accepted(held: int) -> None:
    for asked in range(held + 1, 3 * held, 7):
        with pytest.raises(DataError) as caught:
            resolve_steps(config(steps=asked, batch_size=1), held, 1, STORE)
        found = re.search(r"--passes ([\d.]+)", str(caught.value))
        assert found is not None
        passes = float(found[1])
        assert resolve_steps(config(steps=asked, batch_size=1, passes=passes), held, 1, STORE).n_steps == asked


def test_passes_with_hundredths_are_exact() -> None:
    # 1.15 · 100 is 114.99999999999999 in binary
    assert resolve_steps(config(passes=1.15, batch_size=1), 100, 1, STORE).n_steps == 115


def test_a_run_that_the_store_cannot_feed_writes_nothing(shared_store: Path, tmp_path: Path, warm: WarmServer) -> None:
    argv = ["train", "fit", "--cache", str(shared_store), "--variant", "topk", "--steps", "1000", "--out", "runs/a"]
    ended = warm.run(argv, tmp_path)
    assert ended.code == 4
    assert "2,048,000 tokens asked for" in ended.err
    assert "--passes" in ended.err
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_three_passes_takes_exactly_so_many_steps(shared_store: Path, tmp_path: Path) -> None:
    settings = {
        "cache": shared_store,
        "out": tmp_path / "run",
        "batch_size": 4096,
        "passes": 3,
        "learner": ({"name": "topk", "variant": "topk", "options": {"d_sae": 32, "k": 4}},),
    }
    from common.store import Store
    from train.data.reader import Batches

    built = build(FitConfig, settings, "test")
    reader = Batches.of(Store.open(shared_store), built.data())
    held = reader.windows_per_pass()
    reader.close()
    outcome = fit(built, Stop())
    assert outcome.steps == math.floor(3 * held / 4096)
    assert outcome.learners["topk"]["training_steps"] == outcome.steps
    assert isinstance(outcome.learners["topk"]["final_loss"], float)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        # one learner: 1.5 · 2 · 16 · 1,000 · 4 · 4 = 768,000 bytes; a step: 8 · 100 · 1,000 · 4 = 3,200,000
        (2 * (3_200_000 + 3 * 768_000), 3),
        (2 * (3_200_000 + 3 * 768_000) - 2, 2),
        (1_000, 1),  # at least one is tried
    ],
)
def test_as_many_learners_at_once_as_half_of_the_memory_takes(
    monkeypatch: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    monkeypatch.setattr("train.preflight.psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    saes = [TopKConfig(d_sae=500), TopKConfig(d_sae=1000)]
    built, cpu = config(steps=1, batch_size=100), torch.device("cpu")
    assert learners_at_once(built, saes, 16, cpu) == expected
    assert learners_at_once(built.model_copy(update={"at_once": 7}), saes, 16, cpu) == 7
    for graphs, n in ((False, 40), (True, 32)):  # a stream for each learner whose steps are recorded
        many = built.model_copy(update={"at_once": 40, "graphs": graphs})
        assert learners_at_once(many, saes, 16, torch.device("cuda")) == n


@pytest.mark.parametrize("d_sae", ["1T", "100000T"])
def test_a_dictionary_that_no_memory_holds_is_told_before_step_0(
    shared_store: Path, tmp_path: Path, d_sae: str
) -> None:
    learner = {"name": "topk", "variant": "topk", "options": {"d_sae": d_sae, "k": 4}}
    with pytest.raises(ConfigError, match=r"^learner 'topk': out of memory in the first step\. d_sae 1"):
        fit(config(cache=shared_store, out=tmp_path / "r", steps=2, batch_size=64, learner=(learner,)), Stop())


def test_memory_that_does_not_do_for_one_step_is_told_before_step_0(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Learner, "train_step", fail)
    learner = {"name": "topk", "variant": "topk", "options": {"d_sae": 32, "k": 4}}
    told = (  # 1.5 · 2 · 16 · 32 · 16 bytes, and 8 · 64 · 32 · 4
        r"out of memory in the first step\. d_sae 32 at d_model 16 takes about 24\.6 kB with its gradient and Adam, "
        r"a batch of 64 about 65\.5 kB more\. Lower --d-sae or --batch-size\.$"
    )
    with pytest.raises(ConfigError, match=told):
        fit(config(cache=shared_store, out=tmp_path / "r", steps=2, batch_size=64, learner=(learner,)), Stop())
