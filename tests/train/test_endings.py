"""Learners that end early: diverged, failed or odd, each alone and with its reason."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import TrainingError
from tests.train.runs import breaking, equal, learner, run, status_of
from train.data.batch import Batch
from train.optim import normalise_rows_
from train.saes import REGISTRY
from train.saes.base import Output
from train.schedule import Clock


def test_a_diverging_learner_ends_alone(shared_store: Path, tmp_path: Path) -> None:
    wild = learner("standard", "wild", lr=1e3)
    outcome = run(shared_store, tmp_path / "r", wild, learner("topk"), steps=80)
    assert outcome.state == "finished"
    lost, healthy = outcome.learners["wild"], outcome.learners["topk"]
    assert lost["state"] == "diverged"
    assert "lower lr" in lost["reason"] or "not finite" in lost["reason"]
    assert isinstance(lost["final_loss"], float)
    assert lost["training_steps"] < 80
    assert (healthy["state"], healthy["training_steps"]) == ("finished", 80)
    assert "1 of 2 learners finished; wild diverged" in status_of(tmp_path / "r")["reason"]
    run(shared_store, tmp_path / "solo", learner("topk"), steps=80)
    assert equal(tmp_path / "r" / "topk", tmp_path / "solo" / "topk")


def test_a_run_in_which_all_diverge_is_an_error_every_time(shared_store: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"no learner finished\. 0 of 1 learners finished; wild diverged"):
            run(shared_store, tmp_path / "r", learner("standard", "wild", lr=1e3), steps=80)
        assert status_of(tmp_path / "r")["state"] == "diverged"


def test_a_failed_learner_is_tried_again_from_its_newest_checkpoint(
    shared_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learners = (learner("topk"), learner("standard"))
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch, "topk", 25)
        outcome = run(shared_store, tmp_path / "r", *learners)
    assert outcome.learners["topk"]["state"] == "failed"
    assert outcome.learners["topk"]["reason"] == "OutOfMemoryError at step 25: out of memory"
    assert outcome.learners["standard"]["state"] == "finished"
    assert "Traceback" in capsys.readouterr().err
    again = run(shared_store, tmp_path / "r", *learners)
    assert again.reason == "2 of 2 learners finished"
    assert "topk: going on from step 20 of 40" in capsys.readouterr().err
    run(shared_store, tmp_path / "solo", learner("topk"))
    assert equal(tmp_path / "r" / "topk", tmp_path / "solo" / "topk")


@pytest.mark.parametrize(
    ("broken", "where"),
    [
        ("train.trainer.quick_look", "at the checkpoint of step 10"),
        ("train.finish.evaluate_heldout", "after the last step"),
        ("train.trainer.bring", "before its first step"),
    ],
)
def test_what_fails_around_the_steps_of_a_learner_ends_it_alone(
    shared_store: Path, tmp_path: Path, broken: str, where: str
) -> None:
    module, _, name = broken.rpartition(".")
    kept = getattr(importlib.import_module(module), name)

    def fail(*arguments: Any) -> Any:
        if any(getattr(one, "name", "") == "topk" or isinstance(one, REGISTRY["topk"]) for one in arguments):
            raise torch.OutOfMemoryError("out of memory\nand more")
        return kept(*arguments)

    learners = (learner("topk"), learner("standard"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broken, fail)
        outcome = run(shared_store, tmp_path / "r", *learners)
    lost = outcome.learners["topk"]
    assert (lost["state"], lost["reason"]) == ("failed", f"OutOfMemoryError {where}: out of memory")
    assert lost.keys() == outcome.learners["standard"].keys()
    assert outcome.learners["standard"]["state"] == "finished"
    assert run(shared_store, tmp_path / "r", *learners).reason == "2 of 2 learners finished"
    run(shared_store, tmp_path / "solo", learner("topk"))
    assert equal(tmp_path / "r" / "topk", tmp_path / "solo" / "topk")


def test_a_run_in_which_all_failed_is_tried_again(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, "topk", 5)
    with pytest.raises(TrainingError, match="topk failed: OutOfMemoryError at step 5"):
        run(shared_store, tmp_path / "r", learner("topk"))
    monkeypatch.undo()
    assert run(shared_store, tmp_path / "r", learner("topk")).state == "finished"


def test_a_first_loss_that_is_not_finite_ends_one_learner_alone(shared_store: Path, tmp_path: Path) -> None:
    wild = learner("standard", "wild", l1=1e39)  # infinite in float32
    outcome = run(shared_store, tmp_path / "r", wild, learner("topk"))
    lost = outcome.learners["wild"]
    assert (lost["state"], lost["training_steps"], outcome.learners["topk"]["state"]) == ("diverged", 0, "finished")
    assert "the loss of the first step is" in lost["reason"]


def test_the_logging_interval_does_not_decide_who_collapsed(shared_store: Path, tmp_path: Path) -> None:
    # a penalty this strong silences every latent within the first steps; a fifth of 60 steps is 12 in a row
    for every in (1, 7, 60):
        mute = learner("standard", "mute", l1=30.0)
        outcome = run(shared_store, tmp_path / str(every), mute, learner("topk"), steps=60, log_every=every)
        assert outcome.learners["mute"]["state"] == "diverged"
        assert "steps in a row" in outcome.learners["mute"]["reason"]


def test_alarms_are_said_once_and_kept_in_the_result(
    shared_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # a k of 24 at a learning rate that does nothing explains nearly nothing
    outcome = run(shared_store, tmp_path / "r", learner("topk", d_sae=64, k=24, lr=1e-9))
    alarms = outcome.learners["topk"]["alarms"]
    assert sum(alarm.startswith("step 10: explained variance") for alarm in alarms) == 1
    assert capsys.readouterr().err.count("topk: note: step 10: explained variance") == 1


class MeanOverDimensions(REGISTRY["standard"]):  # type: ignore[misc]
    """The failure of the original notes: errors averaged over d while L1 is summed, no warm-up of the penalty.

    Rows of unit norm, as there: free ones would shrink instead of the latents.
    """

    unit_rows = ("W_dec",)

    def start(self, scale: float, b_dec: torch.Tensor) -> None:
        super().start(scale, b_dec)
        normalise_rows_(self.W_dec.data)

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        output = super().training_pass(batch, Clock(clock.n_steps - 1, clock.n_steps, clock.batch_tokens))
        return replace(output, parts=output.parts | {"reconstruction": output.parts["reconstruction"] / self.d_in})


def test_the_failure_of_the_notes_ends_with_a_reason(shared_store: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "standard", MeanOverDimensions)
        # d is 16 here and was 768 there: a λ of .06 was so much too strong
        learners = (learner("standard", l1=0.06 * 768 / 16, lr=3e-3), learner("topk"))
        outcome = run(shared_store, tmp_path / "r", *learners, steps=300, passes=3)
    lost = outcome.learners["standard"]
    assert lost["state"] == "diverged"
    assert "L0 below 1" in lost["reason"]
    assert isinstance(lost["final_loss"], float)
    assert 0 < lost["training_steps"] < 300
    assert outcome.learners["topk"]["state"] == "finished"


def test_a_learner_that_fails_does_not_keep_the_next_ones_from_their_turn(shared_store: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch, "topk", 25)
        outcome = run(shared_store, tmp_path / "r", learner("topk"), learner("standard"), at_once=1)
    assert outcome.learners["topk"]["state"] == "failed"
    assert outcome.learners["standard"]["state"] == "finished"
