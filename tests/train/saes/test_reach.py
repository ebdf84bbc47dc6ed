"""f A by pairs of a kept code and an upper latent, against the dense product."""

from __future__ import annotations

import torch
from torch import Tensor

from train.saes import composition
from train.saes.kept import Kept
from train.saes.places import Places
from train.saes.reach import Reach

N, LOWER, UPPER, START = 20, 30, 12, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def hierarchy() -> Kept:
    """Five candidates of each upper latent; some lower ones are nobody's."""
    candidates = random(UPPER, LOWER).topk(5).indices
    return composition.kept(random(UPPER, 5, seed=1), candidates, LOWER)


def some_codes() -> tuple[Tensor, Places]:
    """A fifth of them, on one token none."""
    codes = random(N, LOWER, seed=2) * (random(N, LOWER, seed=3) < 0.2)
    codes[4] = 0.0
    return codes, Places.numbered(codes.flatten().nonzero().squeeze(-1), N, LOWER)


def test_what_kept_codes_add_is_the_dense_product() -> None:
    (codes, kept), A, u = some_codes(), hierarchy(), random(N, START + UPPER + 1, seed=4)
    expected = u.clone()
    expected[:, START : START + UPPER] += codes @ A.dense()[0].t()
    Reach.of(kept, A.places).add_to_(u, START, codes[kept.row, kept.column], A.values)
    assert torch.allclose(u, expected, atol=1e-6)


def test_sums_at_some_places_and_their_gradients_are_those_of_the_dense_product() -> None:
    (codes, kept), A = some_codes(), hierarchy()
    columns = random(N, UPPER, seed=5).topk(4).indices  # in no order
    places = Places(torch.arange(0, 4 * N + 1, 4), columns.flatten(), UPPER)
    back = random(4 * N, seed=6)
    values, weights = codes[kept.row, kept.column].requires_grad_(), A.values.clone().requires_grad_()
    sums = Reach.of(kept, A.places).at(places).sums(values, weights)
    ours = torch.autograd.grad((sums * back).sum(), (values, weights))

    f, dense = codes.requires_grad_(), A.dense()[0].requires_grad_()
    product = f @ dense.t()
    theirs = torch.autograd.grad((product[places.row, places.column] * back).sum(), (f, dense))
    assert torch.allclose(sums, product[places.row, places.column], atol=1e-6)
    assert torch.allclose(ours[0], theirs[0][kept.row, kept.column], atol=1e-6)
    assert torch.allclose(ours[1], theirs[1][A.places.row, A.places.column], atol=1e-6)


def test_no_code_reaches_nothing() -> None:
    A, places = hierarchy(), Places(torch.arange(N + 1), torch.zeros(N, dtype=torch.int64), UPPER)
    nothing = Places(torch.zeros(N + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), LOWER)
    reach = Reach.of(nothing, A.places)
    assert torch.equal(reach.at(places).sums(torch.zeros(0), A.values), torch.zeros(N))
