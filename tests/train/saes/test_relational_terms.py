"""Gated products of low rank against the arrays they stand for."""

from __future__ import annotations

import pytest
import torch

from tests.train.saes.related import randn
from train.saes.relational_terms import Terms

VALID = torch.tensor([[True, False, True, True], [True, True, True, False]])


def some_terms() -> Terms:
    factors = {
        "attention": (randn(2, 4, 3), randn(3, 5, seed=1)),
        "position": (randn(2, 4, 2, seed=2), randn(2, 5, seed=3)),
    }
    return Terms(randn(2, 4, 1, seed=4).sigmoid(), factors)


@pytest.mark.parametrize("valid", [None, VALID])
def test_the_joined_product_is_the_sum_of_the_terms(valid: torch.Tensor | None) -> None:
    terms = some_terms()
    left, right = terms.joined(valid, 9)
    whole = torch.stack(list(terms.dense().values())).sum(0) * (1 if valid is None else valid[..., None])
    assert torch.allclose((left @ right)[:, :5], whole.flatten(0, 1), atol=1e-6)
    assert right.shape == (5, 9)
    assert (right[:, 5:] == 0).all()


@pytest.mark.parametrize("valid", [None, VALID])
def test_norms_are_those_of_the_arrays(valid: torch.Tensor | None) -> None:
    terms = some_terms()
    for name, term in terms.dense().items():
        expected = (term if valid is None else term[valid]).norm()
        assert float(terms.norms(valid)[name]) == pytest.approx(float(expected), rel=1e-5)
    nothing = Terms(terms.gate, {"attention": (terms.factors["attention"][0], torch.zeros(3, 5))})
    assert float(nothing.norms(valid)["attention"]) == 0
