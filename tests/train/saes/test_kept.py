"""Kept codes against dense ones: products, gradients, what is chosen, and whole training steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.train.saes.test_contract import N_LATENTS, K, batch_for, learner_of, new_sae, sentences
from train.data.batch import Batch
from train.saes import REGISTRY, kept, penalised
from train.saes.base import KeptConfig
from train.saes.kept import Kept, encode_kept
from train.saes.parts import aux_k_loss, pre_activations
from train.saes.places import Places, keep_top_k
from train.schedule import Clock

N, D, L = 24, 6, 40
every = [name for name, cls in REGISTRY.items() if cls.trained]
trained = pytest.mark.parametrize("variant", every)
keeps_k = pytest.mark.parametrize("variant", [name for name in every if issubclass(REGISTRY[name].Config, KeptConfig)])


@pytest.fixture
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a sixteenth of the codes of these small variants are above 0, and they would go the dense way."""
    monkeypatch.setattr(kept, "FEW", 1.0)
    monkeypatch.setattr(penalised, "MOST", 1.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(tensor: Tensor) -> Tensor:
    """What a backward pass left."""
    assert tensor.grad is not None
    return tensor.grad


def kept_of(dense: Tensor) -> Kept:
    """The entries of [1, N, L] that are not 0."""
    row, column = dense[0].nonzero(as_tuple=True)
    first = torch.searchsorted(row, torch.arange(dense.shape[1] + 1))
    values = dense[0][row, column].detach().requires_grad_()
    return Kept(values, Places(first, column, dense.shape[2]), (1, dense.shape[1], dense.shape[2]))


def some_codes() -> Tensor:
    """A row without any, one with all, the rest with a tenth; some latents have none."""
    codes = random(1, N, L).relu() * (torch.rand(1, N, L, generator=torch.Generator().manual_seed(1)) < 0.1)
    codes[0, 3], codes[0, 5] = 0.0, random(L, seed=2).abs()
    codes[0, :, 7] = 0.0
    return codes


def test_a_product_and_its_gradients_are_the_dense_ones() -> None:
    codes, weight, back = some_codes().requires_grad_(), random(L, D, seed=3).requires_grad_(), random(1, N, D, seed=4)
    expected = codes @ weight
    expected.backward(back)
    kept, same = kept_of(codes), weight.detach().clone().requires_grad_()
    product = kept.times(same)
    product.backward(back)
    assert torch.allclose(product, expected, atol=1e-6)
    assert torch.allclose(gradient(same), gradient(weight), atol=1e-5)
    assert torch.allclose(gradient(kept.values), gradient(codes)[codes > 0], atol=1e-6)
    assert torch.equal(kept.dense(), codes)


def test_products_by_block_are_those_of_each_block() -> None:
    codes, weight, blocks = some_codes(), random(L, D, seed=3), [5, 1, 14, 20]
    kept = kept_of(codes)
    product = kept.times_by_block(weight.requires_grad_(), blocks)
    pairs = zip(codes.split(blocks, -1), weight.split(blocks), strict=True)
    assert torch.allclose(product, torch.stack([part @ rows for part, rows in pairs], dim=2), atol=1e-6)
    assert torch.allclose(product.sum(2), kept.times(weight), atol=1e-5)
    assert torch.autograd.grad(product.sum(), kept.values)[0].shape == kept.values.shape


def test_groups_side_by_side_are_one_dictionary() -> None:
    codes, weight = some_codes(), random(L, D, seed=3)
    codes[..., 5:9] = 0.0  # a group without any
    groups = [kept_of(part) for part in codes.split([5, 4, 11, 20], -1)]
    joined = Kept.joined(groups)
    assert torch.equal(joined.dense(), codes)
    whole = kept_of(codes)
    assert torch.equal(joined.places.first, whole.places.first)
    assert torch.equal(joined.places.column, whole.places.column)  # ascending in each row, as the groups' were
    assert torch.equal(joined.fired(), whole.fired())
    (joined.times(weight) * random(1, N, D, seed=4)).sum().backward()
    (whole.times(weight) * random(1, N, D, seed=4)).sum().backward()
    separate = torch.cat([Kept(gradient(each.values), each.places, each.shape).dense() for each in groups], dim=-1)
    assert torch.equal(separate, Kept(gradient(whole.values), whole.places, whole.shape).dense())


def test_codes_are_found_at_other_places() -> None:
    codes, others = some_codes(), kept_of(random(1, N, L, seed=8).relu()).places
    kept, back = kept_of(codes), random(len(others.column), seed=9)
    found = kept.at(others)
    assert torch.equal(found, codes[0][others.row, others.column])
    assert 0 < int((found > 0).sum()) < len(found)
    (found * back).sum().backward()
    expected = torch.zeros(N, L).index_put((others.row, others.column), back)
    assert torch.equal(gradient(kept.values), expected[kept.places.row, kept.places.column])
    assert kept_of(torch.zeros(1, N, L)).at(others).abs().sum() == 0


def test_sums_over_a_tokens_codes_and_their_way_back_are_the_dense_ones() -> None:
    codes, of_tokens = some_codes().requires_grad_(), random(N, seed=3).requires_grad_()
    ((codes.sum(-1)[0] * of_tokens).square() + (codes[0] * of_tokens[:, None]).sum(-1)).sum().backward()
    kept, same = kept_of(codes), of_tokens.detach().clone().requires_grad_()
    assert torch.equal(kept.spread(same), same[kept.places.row])
    ((kept.sums() * same).square().sum() + (kept.values * kept.spread(same)).sum()).backward()
    assert torch.allclose(gradient(same), gradient(of_tokens), rtol=1e-5)
    assert torch.allclose(gradient(kept.values), gradient(codes)[codes > 0], rtol=1e-5)


def test_codes_are_counted_by_latent() -> None:
    codes = some_codes()
    kept = kept_of(codes)
    kept.values.data[0] = 0.0  # kept, but not active
    assert torch.equal(kept.fired(), (kept.dense() > 0).sum((0, 1)))


def test_encoding_and_its_gradients_are_the_dense_ones() -> None:
    x, W_enc, b_enc, b_dec = random(2, N // 2, D), random(D, L, seed=1), random(L, seed=2) / 3, random(D, seed=3) / 3
    valid = torch.rand(2, N // 2, generator=torch.Generator().manual_seed(5)) < 0.8
    dead = torch.zeros(L, dtype=torch.bool)
    dead[[2, 11, 30, 31, 32]] = True
    back, back_dead = random(2, N // 2, L, seed=6), random(2, N // 2, L, seed=7)

    ours = W_enc.clone().requires_grad_(), b_enc.clone().requires_grad_(), b_dec.clone().requires_grad_()
    kept, of_dead = encode_kept(x, *ours, valid, lambda u: keep_top_k(u, 8), dead)
    assert of_dead is not None
    ((kept.dense() * back).sum() + (of_dead.dense() * back_dead).sum()).backward()

    theirs = [value.clone().requires_grad_() for value in (W_enc, b_enc, b_dec)]
    u = torch.relu(pre_activations(x, *theirs)) * valid[..., None]
    codes = torch.zeros_like(u).scatter(-1, u.topk(8).indices, u.topk(8).values)
    among = torch.where(dead, u, -torch.inf).topk(D // 2)
    codes_of_dead = torch.zeros_like(u).scatter(-1, among.indices, among.values)
    ((codes * back).sum() + (codes_of_dead * back_dead).sum()).backward()

    assert torch.allclose(kept.dense(), codes, atol=1e-6)
    assert torch.allclose(of_dead.dense(), codes_of_dead, atol=1e-6)
    for mine, plain in zip(ours, theirs, strict=True):
        assert torch.allclose(gradient(mine), gradient(plain), atol=1e-5)


def test_without_dead_latents_none_are_encoded() -> None:
    kept, of_dead = encode_kept(
        random(1, N, D), random(D, L, seed=1), torch.zeros(L), torch.zeros(D), None, lambda u: keep_top_k(u, 8)
    )
    assert kept.values.shape == (8 * N,)
    assert of_dead is None


def test_aux_k_is_the_share_of_the_residuals_spread() -> None:
    u, W_dec, residual = random(1, N, L).relu(), random(L, D, seed=1), random(1, N, D, seed=2)
    silent = torch.zeros(L, dtype=torch.bool)
    silent[::3] = True
    valid = torch.ones(1, N, dtype=torch.bool)
    estimate = torch.zeros(1, N, L)
    masked = torch.where(silent, u, -1.0)
    estimate.scatter_(-1, masked.topk(D // 2).indices, masked.topk(D // 2).values)
    error = (residual - estimate @ W_dec).square().sum()
    expected = float(error / (residual - residual.mean(1)).square().sum())
    assert float(aux_k_loss(residual, u, silent, W_dec, valid)) == pytest.approx(expected, rel=1e-5)
    assert float(aux_k_loss(residual, u, silent & False, W_dec, valid)) == 0


@trained
@pytest.mark.parametrize("some_invalid", [False, True])
def test_sparse_steps_are_plain_steps(variant: str, some_invalid: bool, request: pytest.FixtureRequest) -> None:
    if not issubclass(REGISTRY[variant].Config, KeptConfig):
        request.getfixturevalue("always_sparse")
    learners = [learner_of(new_sae(variant), 60) for _ in range(2)]
    for learner, sparse in zip(learners, (False, True), strict=True):
        learner.sae.sparse = sparse
        learner.sae.tokens_silent[:20] = 10**9  # AuxK has something to do from the first step on
    for step in range(30):
        batch = batch_for(learners[0].sae, step)
        if some_invalid:
            valid = torch.rand(batch.valid.shape, generator=torch.Generator().manual_seed(step)) < 0.7
            batch = Batch.of(batch.x, doc=batch.doc, pos=batch.pos, valid=valid)
        for learner in learners:
            learner.train_step(batch, 256)
    by_all, by_kept = (learner.sae.state_dict() for learner in learners)
    for name, value in by_all.items():
        assert torch.allclose(by_kept[name].float(), value.float(), atol=2e-3), name
    figures = [learner.read_metrics() for learner in learners]
    for name, value in figures[0].items():
        if value is not None and name != "dense":  # of all tokens here, of a sample there
            assert figures[1][name] == pytest.approx(value, rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("topk", {"k": 100}),  # more than are positive
        ("batchtopk", {"k": 2, "d_sae": 8}),  # fewer latents than AuxK may take
        ("standard", {}),
        ("panneal", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("jumprelu", {"penalty": "target", "target_l0": 8.0, "bandwidth": 0.1}),
        ("jumprelu", {"penalty": "tanh"}),
        ("contrastive", {}),
        ("contrastive", {"sparsity": "joint", "head": "learned"}),
        ("contrastive", {"sparsity": "l1"}),
        ("relational", {}),
        ("relational", {"joint": True, "memory": "lags", "gated": True}),
        ("multiscale", {}),
        ("multiscale", {"sparsity": "joint", "convolution": "mixture"}),
        ("tree", {}),
        ("tree", {"swap": 0.5, "gate": "hard"}),
        ("tree", {"swap": 0.5, "orientation": "top_down", "no_dec_skip": True}),
        ("tree", {"sparsity": "joint", "nesting": (0.0, 0.0, 1.0)}),
        ("compositional", {"pretrain": 0.0}),
        ("compositional", {"pretrain": 0.0, "sparsity": "joint", "agreement": 0.1}),
        ("compositional", {"pretrain": 0.0, "decoder": "residual", "encoder": "comp_only"}),
    ],
)
def test_a_code_that_is_0_passes_no_gradient_that_matters(
    variant: str, options: dict[str, object], always_sparse: None
) -> None:
    gradients = []
    for sparse in (False, True):
        sae = new_sae(variant, **options)
        sae.sparse = sparse
        sae.tokens_silent[:20] = 10**9
        sae.training_pass(batch_for(sae, 3), Clock(60, 100, 256)).total.backward()
        gradients.append({name: weight.grad for name, weight in sae.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, plain in gradients[0].items():
        # additions of another order differ by 1e-6 of the whole
        assert (gradients[1][name] - plain).norm() <= 1e-5 * plain.norm(), name


@trained
def test_a_sparse_step_in_bfloat16_is_near_one_in_float32(variant: str, always_sparse: None) -> None:
    losses = []
    for precision in (torch.float32, torch.bfloat16):
        learner = learner_of(new_sae(variant), 60, precision)
        learner.sae.sparse = True
        for step in range(30):
            learner.train_step(batch_for(learner.sae, step), 256)
        losses.append(learner.read_metrics()["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)  # means of 30 steps: a single one may have another draw


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the plain way is taken without MKL")
@keeps_k
def test_steps_are_plain_of_themselves_where_much_is_kept(variant: str) -> None:
    assert learner_of(new_sae(variant, k=N_LATENTS // 8), 60).sae.sparse
    assert not learner_of(new_sae(variant, k=N_LATENTS // 8 + 1), 60).sae.sparse


@pytest.mark.parametrize("variant", [name for name in every if not issubclass(REGISTRY[name].Config, KeptConfig)])
@pytest.mark.parametrize("shift", [0.0, -0.2])
def test_a_step_with_a_penalty_is_sparse_where_few_codes_are_above_0(variant: str, shift: float) -> None:
    sae = new_sae(variant)
    sae.sparse = True
    with torch.no_grad():
        sae.b_enc += shift
    batch = batch_for(sae, 0)
    share = float((sae.codes(batch) > 0).float().mean())
    assert (share <= 0.125) == (shift < 0)
    assert isinstance(sae.training_pass(batch, Clock(60, 100, 256)).latents, Kept) == (shift < 0)


def test_a_sparse_step_of_batchtopk_counts_k_a_token() -> None:
    learner = learner_of(new_sae("batchtopk"), 60)
    learner.sae.sparse = True
    learner.train_step(sentences(0, 8), 128)
    assert float(learner.tally.sums.values["l0"]) / 128 == pytest.approx(K)
