"""What a learner counts over its steps, and what of it lives on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from train.config import Kernels, LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import make_sae
from train.saes.base import SAE, Output
from train.saes.kept import Kept
from train.schedule import Clock
from train.sums import Sums, dense_share
from train.tally import Tally, sampled_firing


def batch(step: int, *, valid: Tensor | None = None) -> Batch:
    x = torch.randn(512, 1, 4, generator=torch.Generator().manual_seed(step))
    return Batch.of(x, valid=valid)


@pytest.mark.parametrize("kernels", ["plain", "sparse"])
def test_l0_of_each_group_is_what_its_latents_count(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    sae = make_sae("matryoshka", {"d_sae": 16, "k": 3, "fractions": [0.25, 0.75]}, 4, 0, "test")
    config = LearnerConfig(name="x", variant="matryoshka")
    learner = Learner(config, sae, 10, torch.device("cpu"), torch.float32, kernels)
    counts = torch.zeros(2)
    training_pass = type(sae).training_pass

    def watched(self: SAE, b: Batch, clock: Clock) -> Output:
        output = training_pass(self, b, clock)
        latents = output.latents.dense() if isinstance(output.latents, Kept) else output.latents
        counts[0] += (latents[..., :4] > 0).sum()
        counts[1] += (latents[..., 4:] > 0).sum()
        return output

    monkeypatch.setattr(type(sae), "training_pass", watched)
    for step in range(3):
        learner.train_step(batch(step), 512)
    metrics = learner.read_metrics()
    assert metrics["l0_block_0"] == pytest.approx(counts[0].item() / (3 * 512))
    assert metrics["l0_block_0"] + metrics["l0_block_1"] == pytest.approx(metrics["l0"]) == pytest.approx(3, rel=1e-3)


def test_dense_latents_are_those_active_on_more_than_a_tenth_of_the_valid_tokens() -> None:
    sae = make_sae("topk", {"d_sae": 10, "k": 2}, 4, 0, "test")
    learner = Learner(LearnerConfig(name="x", variant="topk"), sae, 100, torch.device("cpu"), torch.float32)
    valid = torch.ones(512, 1, dtype=torch.bool)
    valid[100:] = False  # 100 of 512 tokens, of which every second one is looked at
    latents = torch.zeros(512, 1, 10)
    latents[:100, 0, 0] = 1.0  # on all
    latents[:10, 0, 1] = 1.0  # on a tenth: not more
    latents[:12, 0, 2] = 1.0  # on 12 %
    first = sampled_firing(latents, batch(0, valid=valid), learner.step)
    assert (float(first["sampled"]), first["firing"][:3].tolist()) == (50, [50, 5, 6])
    assert dense_share(first) == pytest.approx(2 / 10)
    learner.step = 4  # the next sample takes the other tokens
    other = sampled_firing(latents, batch(0, valid=valid), learner.step)
    assert (float(other["sampled"]), other["firing"][:3].tolist()) == (50, [50, 5, 6])
    assert dense_share({}) is None


def test_every_interval_has_a_dense_share() -> None:
    sae = make_sae("batchtopk", {"d_sae": 8, "k": 6}, 4, 0, "test")
    learner = Learner(LearnerConfig(name="x", variant="batchtopk"), sae, 10, torch.device("cpu"), torch.float32)
    for step in range(6):
        learner.train_step(batch(step), 512)
        assert learner.read_metrics()["dense"] > 0.5


def test_sparsity_of_each_level_sums_to_the_penalty() -> None:
    sae = make_sae("tree", {"d_sae": 32, "k": 4, "sparsity": "l1"}, 4, 0, "test")
    learner = Learner(LearnerConfig(name="x", variant="tree"), sae, 10, torch.device("cpu"), torch.float32)
    for step in range(4):
        learner.train_step(batch(step), 512)
    metrics = learner.read_metrics()
    parts = [metrics[f"sparsity_{level}"] for level in ("leaf", "mid", "top")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(metrics["loss_sparsity"], rel=1e-6)


def new_learner() -> Learner:
    sae = make_sae("batchtopk", {"d_sae": 8, "k": 2}, 4, 0, "test")
    return Learner(LearnerConfig(name="x", variant="batchtopk"), sae, 100, torch.device("cpu"), torch.float32)


def test_a_part_that_is_no_more_is_not_in_the_next_line(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = new_learner()
    plain = type(learner.sae).training_pass

    def with_another(self: SAE, one: Batch, clock: Clock) -> Output:
        output = plain(self, one, clock)
        also = {"early": output.total.detach() * 0 + 2.0} if clock.step < 2 else {}
        return Output({**output.parts, **also}, output.latents, output.reconstruction, output.extra)

    monkeypatch.setattr(type(learner.sae), "training_pass", with_another)
    for step in range(2):
        learner.train_step(batch(step), 512)
    assert learner.read_metrics()["loss_early"] == 2.0
    for step in range(2, 4):
        learner.train_step(batch(step), 512)
    assert "part/early" not in learner.tensors()["sums"]
    assert "loss_early" not in learner.read_metrics()


@pytest.mark.parametrize("read_at", [3, 4, 5])
def test_sums_go_on_after_a_stop_before_and_after_a_line(read_at: int) -> None:
    whole, first = new_learner(), new_learner()
    for step in range(10):
        if step == 4:
            saved = copy.deepcopy(first.tensors())
            first, facts = new_learner(), first.facts()
            first.restore(saved, facts)
        for learner in (whole, first):
            learner.train_step(batch(step), 512)
            if step == read_at:
                learner.read_metrics()
    assert whole.read_metrics() == first.read_metrics()
    assert whole.tally.judged_ev == first.tally.judged_ev is not None


def test_restoring_leaves_what_was_read_alone() -> None:
    learner = new_learner()
    learner.train_step(batch(0), 512)
    saved = copy.deepcopy(learner.tensors())
    kept = copy.deepcopy(saved)
    learner.restore(saved, learner.facts())
    learner.train_step(batch(1), 512)
    for name, value in saved["sums"].items():
        assert torch.equal(value, kept["sums"][name]), name


def test_sums_of_a_checkpoint_that_counted_steps_on_the_device() -> None:
    sums = Sums({"steps": torch.tensor(3.0).double(), "tokens": torch.tensor(96.0).double(), "loss": torch.tensor(6.0)})
    sums.count(32, ("loss",))
    assert (sums.steps, sums.tokens) == (4, 128)
    read = sums.read()
    sums.restart()
    assert {name: float(value) for name, value in read.items()} == {"steps": 4, "tokens": 128, "loss": 6}
    assert sums.tensors().keys() == {"steps", "tokens"}


def test_all_of_it_lies_on_the_device() -> None:
    """Ranks send each other what decides a run; between GPUs nothing else can be sent."""
    sae = make_sae("topk", {"d_sae": 16, "k": 3}, 4, 0, "test")
    tensors = Tally(sae, torch.device("meta")).tensors()
    assert {name: value.device.type for name, value in tensors.items()} == dict.fromkeys(
        ("steps", "tokens", "last_loss", "quiet_steps"), "meta"
    )
