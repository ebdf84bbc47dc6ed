"""What a learner does to its optimizer when its variant changes itself, and what it counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import make_sae


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
