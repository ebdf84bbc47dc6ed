"""The gated SAE by hand."""

from __future__ import annotations

import pytest
import torch

from train.config import LearnerConfig
from train.data.batch import Batch
from train.optim import make_optimizer
from train.saes import make_sae
from train.saes.gated import Gated
from train.schedule import Clock


def new(d: int = 2, d_sae: int = 3, **options: object) -> Gated:
    sae = make_sae("gated", {"d_sae": d_sae} | options, d, 0, "test")
    assert isinstance(sae, Gated)
    return sae


@torch.no_grad()
def by_hand() -> Gated:
    """π = (1, 2, −1) for x = (1, 2), with b_dec = 0."""
    sae = new(l1=0.5)
    sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]))
    sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    sae.b_enc.copy_(torch.tensor([-2.0, 0.5, 1.5]))  # u = (−1, 2.5, 0.5)
    sae.b_mag.copy_(torch.tensor([0.0, 1.0, 3.0]))
    sae.r.copy_(torch.tensor([0.0, 0.0, 2.0]).log1p())  # e^r = (1, 1, 3)
    return sae


def test_codes_are_the_magnitudes_of_open_gates() -> None:
    # m = ReLU(1·1 + 0, 1·2 + 1, 3·(−1) + 3) = (1, 3, 0); the first gate is closed, the third is open upon nothing
    codes = by_hand().codes(Batch.of(torch.tensor([[[1.0, 2.0]]])))
    assert torch.allclose(codes, torch.tensor([[[0.0, 3.0, 0.0]]]), atol=1e-5)


def test_loss_parts_are_those_of_the_formula() -> None:
    output = by_hand().training_pass(Batch.of(torch.tensor([[[1.0, 2.0]]])), Clock(50, 100, 1))
    parts = {name: float(part.detach()) for name, part in output.parts.items()}
    assert parts["reconstruction"] == pytest.approx(1 + 1, rel=1e-5)  # x̂ = (0, 3)
    assert parts["sparsity"] == pytest.approx(0.5 * 3.0, rel=1e-5)  # ReLU(u) = (0, 2.5, 0.5)
    assert parts["gate"] == pytest.approx(0.7**2 + 0.9**2, rel=1e-5)  # by the gate: 2.5 d_2 + 0.5 d_3 = (0.3, 2.9)


def test_gate_part_leaves_the_decoder_alone_and_the_reconstruction_leaves_the_gate() -> None:
    for part, frozen, moved in (("gate", ("W_dec", "r", "b_mag"), "b_enc"), ("reconstruction", ("b_enc",), "W_dec")):
        sae = by_hand()
        output = sae.training_pass(Batch.of(torch.tensor([[[1.0, 2.0]]])), Clock(50, 100, 1))
        output.parts[part].backward()
        for name in frozen:
            gradient = sae.get_parameter(name).grad
            assert gradient is None or not gradient.any(), f"{part} moves {name}"
        gradient = sae.get_parameter(moved).grad
        assert gradient is not None
        assert gradient.any()


def test_calibration_moves_the_gate_to_the_target_and_no_magnitude() -> None:
    sae = new(16, 64, target_l0=5.0)
    x = torch.randn(400, 1, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_mag.fill_(0.3)
    before = sae.codes(Batch.of(x))
    sae.calibrate(lambda: [Batch.of(x)])
    after = sae.codes(Batch.of(x))
    assert float((after > 0).sum()) / 400 == pytest.approx(5.0, abs=0.01)
    both = (before > 0) & (after > 0)
    assert torch.equal(before[both], after[both])


def test_first_average_of_adam_is_that_of_all_variants() -> None:
    optimizer = make_optimizer(new(), LearnerConfig(name="x", variant="gated"))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
