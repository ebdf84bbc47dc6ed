"""What a learner does to its optimizer when its variant changes itself, and what it counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.config import Kernels, LearnerConfig
from train.data.batch import Batch
from train.learner import Learner, dense_share
from train.saes import make_sae
from train.saes.base import SAE, Output
from train.saes.kept import Kept
from train.schedule import Clock


def revised(monkeypatch: pytest.MonkeyPatch, masks: dict[str, Tensor]) -> tuple[Learner, dict[str, dict[str, Tensor]]]:
    """A learner after five steps and a revision that names `masks`, and its averages before that."""
    sae = make_sae("batchtopk", {"d_sae": 8, "k": 2}, 4, 0, "test")
    learner = Learner(LearnerConfig(name="x", variant="batchtopk"), sae, 100, torch.device("cpu"), torch.float32)
    for step in range(5):
        x = torch.randn(32, 1, 4, generator=torch.Generator().manual_seed(step)) / 2
        learner.train_step(Batch.of(x), 32)
    before = {
        name: {key: value.clone() for key, value in learner.optimizer.state[sae.get_parameter(name)].items()}
        for name in masks
    }
    monkeypatch.setattr(type(sae), "revise", lambda *_: masks)
    learner.revise(lambda: [], 32)
    return learner, before


def test_revised_entries_start_anew_at_the_size_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    new = torch.arange(8) < 3
    learner, before = revised(monkeypatch, {"W_enc": new, "W_dec": new[:, None]})
    for name, mask in (("W_enc", new.expand(4, 8)), ("W_dec", new[:, None].expand(8, 4))):
        state, old = learner.optimizer.state[learner.sae.get_parameter(name)], before[name]
        assert state["exp_avg"][mask].eq(0).all()
        assert torch.equal(state["exp_avg"][~mask], old["exp_avg"][~mask])
        assert torch.equal(state["exp_avg_sq"][~mask], old["exp_avg_sq"][~mask])
        mean = old["exp_avg_sq"][~mask].mean().item()
        assert mean > 0
        assert state["exp_avg_sq"][mask].tolist() == pytest.approx([mean] * int(mask.sum()), rel=1e-5)


def test_a_tensor_revised_throughout_keeps_its_mean_size(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, before = revised(monkeypatch, {"b_enc": torch.ones(8, dtype=torch.bool)})
    state = learner.optimizer.state[learner.sae.b_enc]
    assert state["exp_avg"].eq(0).all()
    mean = before["b_enc"]["exp_avg_sq"].mean().item()
    assert state["exp_avg_sq"].tolist() == pytest.approx([mean] * 8, rel=1e-5)


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
    first = learner._sample_firing(latents, batch(0, valid=valid))
    assert (float(first["sampled"]), first["firing"][:3].tolist()) == (50, [50, 5, 6])
    assert dense_share(first) == pytest.approx(2 / 10)
    learner.step = 4  # the next sample takes the other tokens
    other = learner._sample_firing(latents, batch(0, valid=valid))
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
