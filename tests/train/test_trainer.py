"""Runs through the library: what is recorded, what is refused, what learners share."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.config import build
from common.errors import ConfigError, Interrupted, StoreError, TrainingError
from common.layout import acts_array
from common.stopping import Stop
from common.store import Store
from harvest.run import harvest
from tests.conftest import HOOK, harvest_config
from train.config import FitConfig
from train.data.batch import Batch
from train.learner import Learner
from train.optim import normalise_rows_
from train.preflight import rehearse
from train.record import Status
from train.run import Run, scaled_batches
from train.saes import REGISTRY, load_sae, make_sae
from train.saes.base import Output
from train.schedule import Clock, default_lr
from train.trainer import Outcome, Pace, fit

VARIANTS = list(REGISTRY)


def learner(variant: str, name: str = "", **more: Any) -> dict[str, Any]:
    common = {key: more.pop(key) for key in ("lr", "seed", "grad_clip") if key in more}
    known = REGISTRY[variant].Config.model_fields
    options = {key: value for key, value in ({"d_sae": 32, "k": 4} | more).items() if key in known}
    return {"name": name or variant, "variant": variant, "options": options, **common}


def config(store: Path, out: Path, *learners: dict[str, Any], **more: Any) -> FitConfig:
    values = {"cache": store, "out": out, "steps": 40, "batch_size": 256, "log_every": 5, "checkpoint_every": 10}
    return build(FitConfig, values | {"eval_tokens": 256, "device": "cpu", "learner": learners} | more, "test")


def run(store: Path, out: Path, *learners: dict[str, Any], **more: Any) -> Outcome:
    return fit(config(store, out, *learners, **more), Stop())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae" / "weights.safetensors")


def equal(one: Path, other: Path) -> bool:
    """Whether two learners ended with the same bits: the SAE and the last checkpoint."""
    ours, theirs = weights(one), weights(other)
    last = [sorted((folder / "checkpoints").glob("step-*"))[-1] for folder in (one, other)]
    pairs = [(ours, theirs)]
    pairs += [
        (load_file(last[0] / f"{name}.safetensors"), load_file(last[1] / f"{name}.safetensors"))
        for name in ("weights", "optimizer", "sums")
    ]
    return last[0].name == last[1].name and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs
    )


def status_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "status.json").read_text()))


@pytest.fixture
def own_store(shared_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_store, tmp_path / "own.zarr"))


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


def test_a_finished_run_does_nothing_and_says_so(
    shared_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(shared_store, tmp_path / "r", learner("topk"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}
    capsys.readouterr()
    again = run(shared_store, tmp_path / "r", learner("topk"))
    assert "finished already, nothing to do" in capsys.readouterr().err
    assert again.learners == first.learners
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")} == before


def test_a_finished_run_says_nothing_of_another_store(shared_store: Path, own_store: Path, tmp_path: Path) -> None:
    first = run(shared_store, tmp_path / "r", learner("topk"))
    moved = run(own_store, tmp_path / "r", learner("topk"))
    assert moved.learners == first.learners
    metadata = json.loads((own_store / "zarr.json").read_text())
    metadata["attributes"]["granary"]["id"] = "another"
    (own_store / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="trained on another store than"):
        run(own_store, tmp_path / "r", learner("topk"))


def test_a_start_that_fails_after_a_learner_diverged_can_be_made_again(shared_store: Path, tmp_path: Path) -> None:
    learners = (learner("standard", "wild", l1=1e39), learner("topk"))
    rehearsed = rehearse

    def fail(one: Learner, *rest: Any) -> str | None:
        if one.name == "topk":
            raise StoreError("no space left")
        return rehearsed(one, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.prepare.rehearse", fail)
        with pytest.raises(StoreError, match="no space left"):
            run(shared_store, tmp_path / "r", *learners)
    outcome = run(shared_store, tmp_path / "r", *learners)
    assert {name: result["state"] for name, result in outcome.learners.items()} == {
        "wild": "diverged",
        "topk": "finished",
    }


def test_mixing_is_told_as_at_most_ideal(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.prepare.mixing", lambda *_: 1.009)  # of two samples, by chance
    run(shared_store, tmp_path / "r", learner("topk"))
    assert json.loads((tmp_path / "r" / "data.json").read_text())["mixing"] == 1.0
    assert "mix documents at 100.0% of" in capsys.readouterr().err


def test_another_run_in_the_folder_is_refused_with_the_difference(shared_store: Path, tmp_path: Path) -> None:
    run(shared_store, tmp_path / "r", learner("topk"))
    with pytest.raises(ConfigError, match=r"another run is there.*n_steps: 40 → 41.*seed: 0 → 1"):
        run(shared_store, tmp_path / "r", learner("topk"), steps=41, seed=1)
    with pytest.raises(ConfigError, match=r"topk\.options\.k: 4 → 5"):
        run(shared_store, tmp_path / "r", learner("topk", k=5))
    with pytest.raises(ConfigError, match="topk: in the run, not asked for"):
        run(shared_store, tmp_path / "r", learner("standard"))


def test_a_folder_that_is_no_run_is_refused(shared_store: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something that is not a run"):
        run(shared_store, tmp_path, learner("topk"))


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


def test_a_learner_that_fails_does_not_keep_the_next_ones_from_their_turn(shared_store: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch, "topk", 25)
        outcome = run(shared_store, tmp_path / "r", learner("topk"), learner("standard"), at_once=1)
    assert outcome.learners["topk"]["state"] == "failed"
    assert outcome.learners["standard"]["state"] == "finished"


def test_an_interrupted_run_says_of_each_learner_where_it_stands(shared_store: Path, tmp_path: Path) -> None:
    stop = Stop()
    taken = Learner.train_step

    def step_and_stop(self: Learner, batch: Batch, batch_tokens: int) -> None:
        taken(self, batch, batch_tokens)
        if self.name == "standard" and self.step == 7:
            stop.signal_name = "SIGTERM"

    learners = (learner("topk"), learner("standard"), learner("batchtopk"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "train_step", step_and_stop)
        with pytest.raises(Interrupted, match="at step 7 of 40"):
            fit(config(shared_store, tmp_path / "r", *learners, at_once=1), stop)
    states = {name: (facts["state"], facts["step"]) for name, facts in status_of(tmp_path / "r")["learners"].items()}
    assert states == {"topk": ("finished", 40), "standard": ("interrupted", 7), "batchtopk": ("waiting", 0)}
    outcome = run(shared_store, tmp_path / "r", *learners, at_once=1)
    assert {result["state"] for result in outcome.learners.values()} == {"finished"}
    run(shared_store, tmp_path / "straight", *learners)
    assert all(equal(tmp_path / "r" / entry["name"], tmp_path / "straight" / entry["name"]) for entry in learners)


def test_a_run_stopped_around_its_landmarks_ends_with_the_same_bits(shared_store: Path, tmp_path: Path) -> None:
    changing = [name for name in REGISTRY if make_sae(name, {}, 16, 0, "test").landmarks(40)]
    assert changing
    learners = [learner(name, d_sae=64) for name in changing]
    run(shared_store, tmp_path / "straight", *learners)
    taken = Learner.train_step
    for stop_at in (1, 4, 5, 21):
        stop = Stop()

        def step_and_stop(self: Learner, batch: Batch, batch_tokens: int, at: int = stop_at, stop: Stop = stop) -> None:
            taken(self, batch, batch_tokens)
            if self.step == at:
                stop.signal_name = "SIGTERM"

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "train_step", step_and_stop)
            with pytest.raises(Interrupted):
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


def breaking(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """Make the step of one learner fail, as it does when memory runs out."""
    train_step = Learner.train_step

    def fail(self: Learner, batch: Batch, batch_tokens: int) -> None:
        if self.name == name and self.step == step:
            raise torch.OutOfMemoryError("out of memory\nand more")
        train_step(self, batch, batch_tokens)

    monkeypatch.setattr(Learner, "train_step", fail)


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
    taken = Learner.train_step
    for at_once in (2, 1):
        stop = Stop()

        def step_and_stop(
            self: Learner, batch: Batch, batch_tokens: int, stop: Stop = stop, taken: Any = taken
        ) -> None:
            taken(self, batch, batch_tokens)
            if self.name == "topk" and self.step in (12, 15):
                stop.signal_name = "SIGTERM"

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "train_step", step_and_stop)
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


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(shared_store: Path, tmp_path: Path) -> None:
    run(shared_store, tmp_path / "a", learner("topk"))
    run(shared_store, tmp_path / "b", learner("topk", lr=1e-3), seed=1)
    (tmp_path / "a" / "topk" / "result.json").unlink()
    shutil.rmtree(tmp_path / "a" / "topk" / "checkpoints")
    shutil.copytree(tmp_path / "b" / "topk" / "checkpoints", tmp_path / "a" / "topk" / "checkpoints")
    with pytest.raises(StoreError, match=r"belongs to another run.*learner\.lr: 0\.001 → None.*seed: 1 → 0"):
        run(shared_store, tmp_path / "a", learner("topk"))


def test_the_logging_interval_does_not_decide_who_collapsed(shared_store: Path, tmp_path: Path) -> None:
    # a penalty this strong silences every latent within the first steps; a fifth of 60 steps is 12 in a row
    for every in (1, 7, 60):
        mute = learner("standard", "mute", l1=30.0)
        outcome = run(shared_store, tmp_path / str(every), mute, learner("topk"), steps=60, log_every=every)
        assert outcome.learners["mute"]["state"] == "diverged"
        assert "steps in a row" in outcome.learners["mute"]["reason"]


def test_a_file_in_the_way_of_the_folder_is_refused(shared_store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="file is a file, not a folder"):
            run(shared_store, out, learner("topk"))


def test_status_is_there_while_the_run_prepares(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("train.trainer.prepare", lambda _: seen.append(status_of(tmp_path / "r")) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(shared_store, tmp_path / "r", learner("topk"))
    assert (seen[0]["state"], seen[0]["step"]) == ("running", 0)


def test_no_learner_is_refused(shared_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no learner: name one with --variant"):
        run(shared_store, tmp_path / "r")


def test_nan_in_a_chunk_is_told_before_step_0(own_store: Path, tmp_path: Path) -> None:
    store = Store.open(own_store)
    for chunk in range(store.n_chunks):  # every chunk, with a journal that agrees
        data = np.array(store.map_chunk(acts_array(HOOK), chunk))
        data[0] = np.nan
        store.commit([(acts_array(HOOK), chunk, data, store.journal.entries[acts_array(HOOK), chunk].extra)])
    with pytest.raises(StoreError, match=r"first batch holds values that are not finite\. Run: harvest verify"):
        run(own_store, tmp_path / "r", learner("topk"))


def flip(path: Path) -> bytes:
    """Change one byte; what the file was before."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[1000] ^= 0x10
    path.write_bytes(changed)
    return before


def test_a_damaged_store_leaves_a_folder_that_can_go_on_once_repaired(
    own_store: Path, tmp_path: Path, shared_store: Path
) -> None:
    path = Store.open(own_store).chunk_path(acts_array(HOOK), 5)
    before = flip(path)
    with pytest.raises(StoreError, match="chunk 5: checksum"):
        run(own_store, tmp_path / "r", learner("topk"), learner("standard"))
    assert status_of(tmp_path / "r")["state"] == "failed"
    path.write_bytes(before)
    run(own_store, tmp_path / "r", learner("topk"), learner("standard"))
    run(shared_store, tmp_path / "straight", learner("topk"), learner("standard"))
    assert equal(tmp_path / "r" / "topk", tmp_path / "straight" / "topk")
    assert equal(tmp_path / "r" / "standard", tmp_path / "straight" / "standard")


def test_a_chunk_found_damaged_on_the_way_keeps_the_steps_taken(
    own_store: Path, tmp_path: Path, shared_store: Path
) -> None:
    settings: dict[str, Any] = {"pool_tokens": 4096, "steps": 80}
    straight = run(shared_store, tmp_path / "straight", learner("topk"), **settings)
    from train.data.reader import plan_data

    built = config(shared_store, tmp_path, learner("topk"), **settings)
    last = plan_data(Store.open(shared_store), built.data(), 0, {1}).order(1).pool_members(0, 6)[0]
    path = Store.open(own_store).chunk_path(acts_array(HOOK), last)
    before = flip(path)
    with pytest.raises(StoreError, match=f"chunk {last}: checksum"):
        run(own_store, tmp_path / "r", learner("topk"), **settings)
    status = status_of(tmp_path / "r")
    assert status["state"] == "failed"
    assert f"chunk {last}" in status["reason"]
    assert status["step"] > 30
    path.write_bytes(before)
    again = run(own_store, tmp_path / "r", learner("topk"), **settings)
    assert again.learners["topk"]["final_loss"] == straight.learners["topk"]["final_loss"]
    assert equal(tmp_path / "r" / "topk", tmp_path / "straight" / "topk")


def test_no_whole_checkpoint_is_an_error_and_stays_one(shared_store: Path, tmp_path: Path) -> None:
    run(shared_store, tmp_path / "r", learner("topk"))
    (tmp_path / "r" / "topk" / "result.json").unlink()
    for path in (tmp_path / "r" / "topk" / "checkpoints").glob("step-*/weights.safetensors"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(TrainingError, match=f"no whole checkpoint is left. Remove {tmp_path}/r/topk to train"):
            run(shared_store, tmp_path / "r", learner("topk"))
    outcome = run(shared_store, tmp_path / "r", learner("topk"), learner("standard"))
    assert outcome.reason.startswith("1 of 2 learners finished; topk failed: TrainingError before its first step")
    assert outcome.learners["topk"].keys() == outcome.learners["standard"].keys()
    shutil.rmtree(tmp_path / "r" / "topk")  # as the message says
    again = run(shared_store, tmp_path / "r", learner("topk"), learner("standard"))
    assert again.reason == "2 of 2 learners finished"


def test_a_store_of_another_model_under_the_same_path_is_refused(
    tiny_model: Path, texts: Path, own_store: Path, tmp_path: Path
) -> None:
    run(own_store, tmp_path / "r", learner("topk"))
    (tmp_path / "r" / "topk" / "result.json").unlink()  # as if stopped
    shutil.rmtree(own_store)
    model = Path(shutil.copytree(tiny_model, tmp_path / "other-model"))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 1e-3}))
    harvest(harvest_config(model, texts, own_store), Stop())
    with pytest.raises(StoreError, match="trained on another store than"):
        run(own_store, tmp_path / "r", learner("topk"))


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
