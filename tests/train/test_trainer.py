"""Runs through the library: what is recorded, what learners share, rounds and speeds."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import Interrupted
from common.stopping import Stop
from tests.conftest import HOOK
from tests.train.runs import VARIANTS, config, equal, learner, run, status_of, weights
from train import trainer
from train.checkpoint import checkpoints
from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.ranks import Ranks
from train.record import Status
from train.run import Run, scaled_batches
from train.saes import REGISTRY, load_sae, make_sae
from train.schedule import default_lr
from train.trainer import Pace, fit, take_round


@contextlib.contextmanager
def stopped_at(step: int) -> Iterator[Stop]:
    """A stop that is asked for right after this step of a learner."""
    stop, taken = Stop(), Learner.queue_step

    def step_and_stop(self: Learner, batch: Batch, batch_tokens: int) -> None:
        taken(self, batch, batch_tokens)
        if self.step == step:
            stop.signal_name = "SIGTERM"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "queue_step", step_and_stop)
        yield stop


def test_a_run_leaves_the_files_and_figures_promised(shared_store: Path, tmp_path: Path) -> None:
    outcome = run(shared_store, tmp_path / "r", *(learner(variant) for variant in VARIANTS))
    assert (outcome.state, outcome.steps, outcome.tokens) == ("finished", 40, 10_240)
    assert (tmp_path / "r" / "run.toml").exists()
    assert status_of(tmp_path / "r")["state"] == "finished"
    for variant in VARIANTS:
        folder = tmp_path / "r" / variant
        result = json.loads((folder / "result.json").read_text())
        assert (result["training_steps"], result["requested_steps"], result["state"]) == (40, 40, "finished")
        assert result["tokens_seen"] == 10_240
        assert isinstance(result["final_loss"], float)
        assert result["lr"] == REGISTRY[variant].lr_scale * default_lr(40, 32)
        assert result["reason"]
        assert result["metrics"]["explained_variance"] > 0 or not REGISTRY[variant].trained
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(5, 45, 5))
        parts = sum(value for key, value in lines[-1].items() if key.startswith("loss_"))
        assert lines[-1]["loss"] == pytest.approx(parts, rel=1e-5)
        assert load_sae(folder).scale.item() == 1.0 or not REGISTRY[variant].foldable
        assert not list(folder.rglob("*.aside"))
        facts = json.loads((folder / "sae" / "config.json").read_text())
        assert (facts["variant"], facts["d_in"], facts["units"], facts["hook"]) == (variant, 16, "raw", HOOK)


def test_learners_together_equal_learners_alone(shared_store: Path, tmp_path: Path) -> None:
    run(shared_store, tmp_path / "all", *(learner(variant) for variant in VARIANTS))
    for variant in VARIANTS:
        run(shared_store, tmp_path / variant, learner(variant))
        assert equal(tmp_path / "all" / variant, tmp_path / variant / variant)


def test_learners_that_follow_one_another_equal_learners_together(shared_store: Path, tmp_path: Path) -> None:
    learners = [learner("topk"), learner("batchtopk"), learner("topk", "other", seed=3)]
    run(shared_store, tmp_path / "together", *learners)
    outcome = run(shared_store, tmp_path / "turns", *learners, at_once=2)
    assert outcome.state == "finished"
    assert outcome.seconds["train"] > 0
    for entry in learners:
        assert equal(tmp_path / "together" / entry["name"], tmp_path / "turns" / entry["name"])


def test_an_interrupted_run_says_of_each_learner_where_it_stands(shared_store: Path, tmp_path: Path) -> None:
    stop = Stop()
    taken = Learner.queue_step

    def step_and_stop(self: Learner, batch: Batch, batch_tokens: int) -> None:
        taken(self, batch, batch_tokens)
        if self.name == "standard" and self.step == 7:
            stop.signal_name = "SIGTERM"

    learners = (learner("topk"), learner("standard"), learner("batchtopk"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "queue_step", step_and_stop)
        with pytest.raises(Interrupted, match="at step 7 of 40"):
            fit(config(shared_store, tmp_path / "r", *learners, at_once=1), stop)
    states = {name: (facts["state"], facts["step"]) for name, facts in status_of(tmp_path / "r")["learners"].items()}
    assert states == {"topk": ("finished", 40), "standard": ("interrupted", 7), "batchtopk": ("waiting", 0)}
    outcome = run(shared_store, tmp_path / "r", *learners, at_once=1)
    assert {result["state"] for result in outcome.learners.values()} == {"finished"}
    run(shared_store, tmp_path / "straight", *learners)
    assert all(equal(tmp_path / "r" / entry["name"], tmp_path / "straight" / entry["name"]) for entry in learners)


def test_stops_leave_the_best_checkpoint_and_the_alarms_as_they_are(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out figures are best, and odd, right where the run is stopped: nobody looks at them there."""
    looks: list[int] = []

    def look(_: Run, one: Learner) -> dict[str, float]:
        looks.append(one.step)
        return {"explained_variance": 1 - abs(one.step - 15) / 100, "always_share": float(one.step == 15)}

    monkeypatch.setattr("train.trainer.quick_look", look)
    run(shared_store, tmp_path / "straight", learner("topk"))
    for stop_at in (15, 16, 17):
        with stopped_at(stop_at) as stop, pytest.raises(Interrupted, match=f"at step {stop_at} of 40"):
            fit(config(shared_store, tmp_path / "r", learner("topk")), stop)
    kept = checkpoints(tmp_path / "r" / "topk" / "checkpoints")
    assert [int(path.name[5:]) for path in kept] == [10, 16, 17]  # the best, and the last two
    run(shared_store, tmp_path / "r", learner("topk"))
    assert looks == [10, 20, 30, 40] * 2
    ours, theirs = (json.loads((tmp_path / name / "topk" / "result.json").read_text()) for name in ("r", "straight"))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert equal(tmp_path / "r" / "topk", tmp_path / "straight" / "topk")


def test_rounds_are_as_large_as_the_rank_with_the_least_memory_takes(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks in step that took unlike numbers of learners would wait for each other for ever."""
    monkeypatch.setattr("train.trainer.learners_at_once", lambda *_: 3)
    monkeypatch.setattr(Ranks, "gather", lambda _, value: [value, 2] if value == 3 else [value])
    sizes: list[int] = []

    def note(run: Run, configs: list[LearnerConfig]) -> None:
        sizes.append(len(configs))
        take_round(run, configs)

    monkeypatch.setattr("train.trainer.take_round", note)
    run(shared_store, tmp_path / "r", *(learner("topk", name) for name in "abc"), steps=5)
    assert sizes == [2, 1]


def test_a_run_stopped_around_its_landmarks_ends_with_the_same_bits(shared_store: Path, tmp_path: Path) -> None:
    changing = [name for name in REGISTRY if make_sae(name, {}, 16, 0, "test").landmarks(40)]
    assert changing
    learners = [learner(name, d_sae=64) for name in changing]
    run(shared_store, tmp_path / "straight", *learners)
    for stop_at in (1, 4, 5, 21):
        with stopped_at(stop_at) as stop, pytest.raises(Interrupted):
            fit(config(shared_store, tmp_path / "r", *learners), stop)
    run(shared_store, tmp_path / "r", *learners)
    assert all(equal(tmp_path / "r" / entry["name"], tmp_path / "straight" / entry["name"]) for entry in learners)


def test_a_signal_while_a_variant_looks_at_batches_is_an_interruption(shared_store: Path, tmp_path: Path) -> None:
    at = next(step for step in make_sae("compositional", {}, 16, 0, "test").landmarks(40) if step)
    learners = [learner("topk"), learner("compositional", d_sae=64)]
    stop, looked = Stop(), scaled_batches

    def look_and_stop(run: Run, one: Learner) -> Iterator[Batch]:
        for batch in looked(run, one):
            yield batch
            if one.step == at:
                stop.signal_name = "SIGTERM"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.trainer.scaled_batches", look_and_stop)
        with pytest.raises(Interrupted, match="between steps"):
            fit(config(shared_store, tmp_path / "r", *learners), stop)
    states = {name: (facts["state"], facts["step"]) for name, facts in status_of(tmp_path / "r")["learners"].items()}
    assert states == {"topk": ("interrupted", at + 1), "compositional": ("interrupted", at)}
    assert (tmp_path / "r" / "compositional" / "checkpoints" / f"step-{at:08d}").exists()
    run(shared_store, tmp_path / "r", *learners)
    run(shared_store, tmp_path / "straight", *learners)
    assert all(equal(tmp_path / "r" / entry["name"], tmp_path / "straight" / entry["name"]) for entry in learners)


def test_a_late_joiner_gets_the_same_batches(shared_store: Path, tmp_path: Path) -> None:
    run(shared_store, tmp_path / "r", learner("topk"))
    before = (tmp_path / "r" / "topk" / "result.json").read_text()
    outcome = run(shared_store, tmp_path / "r", learner("topk"), learner("batchtopk"))
    assert outcome.learners.keys() == {"topk", "batchtopk"}
    assert (tmp_path / "r" / "topk" / "result.json").read_text() == before
    run(shared_store, tmp_path / "solo", learner("batchtopk"))
    assert equal(tmp_path / "r" / "batchtopk", tmp_path / "solo" / "batchtopk")


def test_pool_size_changes_the_order_and_evaluation_does_not_change_training(
    shared_store: Path, tmp_path: Path
) -> None:
    run(shared_store, tmp_path / "a", learner("topk"), pool_tokens=8192)
    run(shared_store, tmp_path / "b", learner("topk"), pool_tokens=8192, checkpoint_every=7, eval_tokens=2000)
    run(shared_store, tmp_path / "c", learner("topk"), pool_tokens=4096)
    a, b, c = (weights(tmp_path / name / "topk")["W_dec"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_status_never_goes_back_from_the_furthest_learner(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    write = Status.write

    def note(self: Status, **values: Any) -> None:
        write(self, **values)
        seen.append((self.values["step"], self.values["tokens_seen"]))

    monkeypatch.setattr(Status, "write", note)
    learners = (learner("topk"), learner("standard", "wild", lr=1e3))
    outcome = run(shared_store, tmp_path / "r", *learners, steps=80, at_once=1)
    assert outcome.learners["wild"]["training_steps"] < 80
    assert seen == sorted(seen)
    assert seen[-1] == (80, 80 * 256)
    assert run(shared_store, tmp_path / "r", *learners, steps=80, at_once=1).tokens == outcome.tokens == 80 * 256


def test_a_learner_that_waits_stands_at_its_checkpoint(shared_store: Path, tmp_path: Path) -> None:
    learners = (learner("topk"), learner("standard"))
    taken = Learner.queue_step
    for at_once in (2, 1):
        stop = Stop()

        def step_and_stop(
            self: Learner, batch: Batch, batch_tokens: int, stop: Stop = stop, taken: Any = taken
        ) -> None:
            taken(self, batch, batch_tokens)
            if self.name == "topk" and self.step in (12, 15):
                stop.signal_name = "SIGTERM"

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "queue_step", step_and_stop)
            with pytest.raises(Interrupted):
                fit(config(shared_store, tmp_path / "r", *learners, at_once=at_once), stop)
    facts = status_of(tmp_path / "r")["learners"]
    assert (facts["topk"]["state"], facts["topk"]["step"]) == ("interrupted", 15)
    assert (facts["standard"]["state"], facts["standard"]["step"]) == ("waiting", 12)


def test_speeds_count_what_was_done(shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds, the second of a learner that ends after a few steps, each with a second of waiting."""
    paces: list[Pace] = []

    class Noted(Pace):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            paces.append(self)
            self.batches.waited_s += 1.0

    monkeypatch.setattr("train.trainer.Pace", Noted)
    learners = (learner("topk"), learner("standard", "wild", lr=1e3))
    outcome = run(shared_store, tmp_path / "r", *learners, steps=80, at_once=1)
    taken = 80 + outcome.learners["wild"]["training_steps"]
    assert taken < 160
    assert outcome.tokens_per_s == pytest.approx(taken * 256 / outcome.seconds["train"], rel=1e-2)
    assert outcome.wait_share == pytest.approx(2 / outcome.seconds["train"], rel=0.1)
    first, second = paces
    assert first.read_bytes < second.read_bytes  # the first round's are not the second's
    second.started = time.monotonic() - 1e3
    read = second.batches.read_bytes - second.read_bytes
    assert second.bytes_per_s() == pytest.approx(read / 1e3, rel=1e-2)


def test_seconds_count_what_a_variant_does_at_its_landmarks(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revise = Learner.revise
    name = next(name for name in REGISTRY if any(make_sae(name, {}, 16, 0, "test").landmarks(6)))

    def slow(self: Learner, batches: Any, batch_tokens: int) -> None:
        time.sleep(0.3)
        revise(self, batches, batch_tokens)

    monkeypatch.setattr(Learner, "revise", slow)
    n = len(make_sae(name, {"d_sae": 64}, 16, 0, "test").landmarks(6))
    monkeypatch.setattr("train.prepare.rehearse", lambda *_: None)
    outcome = run(shared_store, tmp_path / "r", learner(name, d_sae=64), steps=6)
    assert outcome.learners[name]["seconds"] > 0.3 * n


def test_the_best_checkpoint_is_known_from_the_checkpoint_itself(shared_store: Path, tmp_path: Path) -> None:
    run(shared_store, tmp_path / "r", learner("topk"))
    folder = tmp_path / "r" / "topk"
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert (
        best["heldout_explained_variance"]
        == json.loads((folder / "result.json").read_text())["best_heldout_explained_variance"]
    )
    (folder / "checkpoints" / "best.json").unlink()  # as after a kill before it was written
    (folder / "result.json").unlink()
    run(shared_store, tmp_path / "r", learner("topk"))
    assert json.loads((folder / "checkpoints" / "best.json").read_text()) == best


def test_a_learner_restored_at_a_logging_step_waits_for_one_behind(shared_store: Path, tmp_path: Path) -> None:
    """A kill between two learners' checkpoints: the one ahead has no sums when the other passes its step."""
    learners = (learner("topk"), learner("batchtopk"))
    steps = {"log_every": 5, "checkpoint_every": 10, "keep_every": 10}
    run(shared_store, tmp_path / "straight", *learners, **steps)
    run(shared_store, tmp_path / "torn", *learners, **steps)
    (tmp_path / "torn" / "status.json").unlink()
    for name, newest in (("topk", 20), ("batchtopk", 10)):
        folder = tmp_path / "torn" / name
        (folder / "result.json").unlink()
        shutil.rmtree(folder / "sae")
        for path in (folder / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > newest:
                shutil.rmtree(path)
    run(shared_store, tmp_path / "torn", *learners, **steps)
    for name in ("topk", "batchtopk"):
        assert equal(tmp_path / "torn" / name, tmp_path / "straight" / name), name


def test_a_batch_is_there_until_every_learner_is_done_with_it(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a step may still be queued, and the reading thread takes memory that is free."""
    queue_step, queue_steps, at_joining = Learner.queue_step, trainer.queue_steps, []
    batches: list[weakref.ref[Batch]] = []
    to_join: list[Learner] = []

    def step_queued(self: Learner, batch: Batch, batch_tokens: int) -> None:
        batches.append(weakref.ref(batch))
        queue_step(self, batch, batch_tokens)

    def steps_queued(run: Run, stepping: list[Learner], *args: Any) -> None:
        queue_steps(run, stepping, *args)
        to_join.extend(stepping)

    def joined(self: Learner) -> None:
        if self in to_join:
            to_join.remove(self)
            at_joining.append(batches[-1]() is not None)

    monkeypatch.setattr(Learner, "queue_step", step_queued)
    monkeypatch.setattr(trainer, "queue_steps", steps_queued)
    monkeypatch.setattr(Learner, "join", joined)
    run(shared_store, tmp_path / "r", learner("topk"), learner("standard"), steps=4)
    assert at_joining == [True] * 8
    assert batches[-1]() is None
