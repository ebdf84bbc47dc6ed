"""Adam on unit rows in one pass, in Triton's interpreter on a CPU, against the four passes it replaces."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from tests.train.saes.test_contract import batch_for, learner_of, new_sae
from train import learner
from train.optim import can_fuse, fused_update_, plain_update_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
row_adam = pytest.importorskip("train.row_adam")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Weights:
    """Two matrices of unit rows and a bias, the second matrix in a group with a rate of its own."""

    def __init__(self, n_rows: int, width: int, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        rows = [random(n_rows, width, seed=1), random(3, width, seed=2)]
        self.rows = [nn.Parameter(matrix / matrix.norm(dim=-1, keepdim=True)) for matrix in rows]
        self.all = [*self.rows, nn.Parameter(random(width, seed=3))]
        groups = [{"params": [self.all[0], self.all[2]], "lr": 0.01}, {"params": [self.all[1]], "lr": 0.003}]
        self.optimizer = torch.optim.Adam(groups, betas=betas, fused=True)

    def step(self, number: int, fused: bool, size: float, largest: float) -> Tensor:
        for place, parameter in enumerate(self.all):
            parameter.grad = size * random(*parameter.shape, seed=10 * number + place)
            parameter.grad[0] *= number % 2  # a row that nothing was written with in every other step
        if fused:
            return fused_update_(self.optimizer, self.rows, largest)
        return plain_update_(self.optimizer, self.rows, self.all, largest)


def assert_alike(one: Weights, other: Weights, atol: float) -> None:
    for number, (mine, theirs) in enumerate(zip(one.all, other.all, strict=True)):
        assert torch.allclose(mine, theirs, atol=atol), number
        ours, stock = one.optimizer.state[mine], other.optimizer.state[theirs]
        assert ours.keys() == stock.keys()
        for name, value in stock.items():
            assert (ours[name].dtype, ours[name].device) == (value.dtype, value.device)
            assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-9), name


@pytest.mark.parametrize(("n_rows", "width"), [(1, 2), (5, 24), (3, 300), (2, 1024)])
@pytest.mark.parametrize("size", [1e-4, 3.0])  # a norm far below the bound, and far above
def test_one_pass_is_the_four_it_replaces(n_rows: int, width: int, size: float) -> None:
    one, other = Weights(n_rows, width), Weights(n_rows, width)
    for number in range(3):
        norm = one.step(number, True, size, largest=1.0)
        expected = other.step(number, False, size, largest=1.0)
        assert (expected > 1.0) == (size > 1)
        assert torch.allclose(norm, expected, rtol=1e-5)
    # float32: a step moves by 0.01 at most, times what four additions in another order leave
    assert_alike(one, other, atol=2e-6)
    assert all(torch.allclose(rows.norm(dim=-1), torch.ones(len(rows), device=DEVICE)) for rows in one.rows)


def test_one_pass_without_a_first_average() -> None:
    one, other = Weights(6, 24, betas=(0.0, 0.999)), Weights(6, 24, betas=(0.0, 0.999))
    for number in range(2):
        one.step(number, True, 1.0, largest=1.0)
        other.step(number, False, 1.0, largest=1.0)
    assert_alike(one, other, atol=2e-6)


def test_a_matrix_without_gradient_stays_as_it_is() -> None:
    weights = Weights(6, 24)
    before = weights.rows[1].detach().clone()
    weights.rows[0].grad = random(6, 24, seed=5)
    fused_update_(weights.optimizer, weights.rows, 1.0)
    assert torch.equal(weights.rows[1], before)
    assert not weights.optimizer.state[weights.rows[1]]


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    weights = Weights(6, 24)
    for parameter in weights.all:
        parameter.grad = torch.full_like(parameter, 0.1)
    weights.rows[0].grad[2, 3] = torch.nan
    assert torch.isnan(fused_update_(weights.optimizer, weights.rows, 1.0))
    assert torch.isnan(weights.rows[0]).any()


def test_only_matrices_on_a_gpu_that_the_kernels_can_hold_are_taken() -> None:
    assert not can_fuse([])
    assert not can_fuse([torch.eye(4)])
    on_gpu = torch.device("meta") if DEVICE == "cpu" else torch.device(DEVICE)
    assert can_fuse([torch.empty(2, row_adam.WIDEST, device=on_gpu)]) == (DEVICE == "cuda")
    assert not can_fuse([torch.empty(2, row_adam.WIDEST + 1, device=on_gpu)])


def test_a_learner_goes_on_either_way_from_a_checkpoint_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    learners = {}
    for fused in (True, False):
        monkeypatch.setattr(learner, "can_fuse", lambda rows, fused=fused: fused)
        learners[fused] = learner_of(new_sae("topk", d_sae=16, k=2), 100)
        assert learners[fused].fused is fused
    for step in range(2):
        for each in learners.values():
            each.train_step(batch_for(each.sae, step), 256)
    state = {fused: deepcopy((each.tensors(), each.facts())) for fused, each in learners.items()}
    learners[True].restore(*state[False])
    learners[False].restore(*state[True])
    for each in learners.values():
        each.train_step(batch_for(each.sae, 2), 256)
    tensors = [each.tensors() for each in learners.values()]
    for file in ("weights", "optimizer"):
        assert tensors[0][file].keys() == tensors[1][file].keys()
        for name, value in tensors[0][file].items():
            assert torch.allclose(value, tensors[1][file][name], atol=1e-5), name
