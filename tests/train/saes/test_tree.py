"""Tree: start, codes, nested losses, swaps, training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from common.errors import ConfigError
from tests.train.saes.trees import MIDDLE, D, tokens, tree, uneven
from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import make_sae
from train.saes.base import SAE
from train.saes.forest import LEAF, MID, TOP
from train.saes.tree import Tree
from train.schedule import Clock


def learner(sae: SAE, n_steps: int) -> Learner:
    config = LearnerConfig(name="x", variant=sae.variant, lr=3e-3)
    return Learner(config, sae, n_steps, torch.device("cpu"), torch.float32, "plain")  # sums in one order


@pytest.mark.parametrize(("shape", "d_sae"), [("halves", 3), ("fanout", 20)])
def test_too_few_latents_for_the_tree_are_refused(shape: str, d_sae: int) -> None:
    with pytest.raises(ConfigError, match=f"{d_sae} latents are no tree of {shape}: at least {d_sae + 1}"):
        tree(d_sae, 1, shape=shape)


def test_weights_that_leave_no_loss_are_refused() -> None:
    with pytest.raises(ConfigError, match="its last weight and all level_weights are above 0"):
        tree(nesting=[1.0, 1.0, 0.0])


def test_levels_that_would_see_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="would see neither x nor an aggregate"):
        tree(no_enc_skip=True, kappa=0.0)


def test_parents_start_near_the_sum_of_their_children() -> None:
    sae = tree(64)
    parent = sae.parent[sae.forest.spans[LEAF]]
    sums = torch.zeros(64, D).index_add_(0, parent, sae.W_dec.detach()[sae.forest.spans[LEAF]])
    mid = sae.forest.spans[MID]
    cosine = torch.cosine_similarity(sums[mid], sae.W_dec.detach()[mid])
    # noise of norm about 0.1 at a right angle: cosine about 1 / √1.01 = .995
    assert (cosine > 0.97).all()
    assert float(cosine.mean()) < 0.999
    assert torch.equal(sae.W_enc, sae.W_dec.t())


def test_edges_start_as_the_mean_and_the_unit_sum() -> None:
    sae = tree(42, shape="fanout", rho=0.01)
    assert sae.down is not None
    linked = sae.parent >= 0
    assert torch.allclose(sae.edge_weights()[linked], torch.tensor(0.25))
    assert torch.allclose(softplus(sae.down)[linked], torch.tensor(0.5))
    assert sae.kappa is not None
    assert torch.allclose(softplus(sae.kappa), torch.tensor(0.25))


def slow_codes(sae: Tree, x: Tensor, top_down: bool) -> Tensor:
    """Latent by latent, from the formula."""
    assert sae.kappa is not None
    direct = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    w, kappa, parent = sae.edge_weights(), softplus(sae.kappa), sae.parent.tolist()
    codes = torch.zeros_like(direct)
    for place, level in enumerate((TOP, MID, LEAF) if top_down else (LEAF, MID, TOP)):
        span = sae.forest.spans[level]
        for i in range(span.start, span.stop):
            a = torch.zeros(len(x))
            if place and top_down and parent[i] >= 0:
                a = w[i] * codes[:, parent[i]]
            if place and not top_down:
                a = sum((w[c] * codes[:, c] for c in range(sae.d_sae) if parent[c] == i), a)
            u = torch.relu(direct[:, i] + (kappa[i] * a if place else 0))
            codes[:, i] = u * (u > sae.sparsity.threshold[place])
    return codes


@pytest.mark.parametrize("orientation", ["bottom_up", "top_down"])
@pytest.mark.parametrize(("shape", "d_sae"), [("halves", 18), ("fanout", 24)])
def test_codes_are_those_of_the_formula(orientation: str, shape: str, d_sae: int) -> None:
    sae = tree(d_sae, orientation=orientation, shape=shape)
    uneven(sae)
    x = tokens()
    with torch.no_grad():
        codes = sae.codes(Batch.of(x))[:, 0]
        expected = slow_codes(sae, x[:, 0], orientation == "top_down")
    assert torch.allclose(codes, expected, atol=1e-6)
    assert 0 < (codes > 0).float().mean() < 1


@pytest.mark.parametrize(("orientation", "shares"), [("bottom_up", (1, 2, 4)), ("top_down", (4, 2, 1))])
def test_budgets_fall_with_the_price_of_a_level(orientation: str, shares: tuple[int, ...]) -> None:
    sae = tree(64, 14, orientation=orientation, no_enc_skip=False)
    latents = sae.training_pass(Batch.of(tokens(50)), MIDDLE).latents
    l0 = [int((latents[..., span] > 0).sum()) for span in sae.forest.spans]
    assert l0 == [50 * 2 * share for share in shares]  # k = 14 = 2 · 7


def test_a_hard_gate_lets_a_parent_fire_only_with_a_child() -> None:
    sae = tree(16, 8, gate="hard")
    uneven(sae)
    codes = sae.codes(Batch.of(tokens()))
    for level in (TOP, MID):
        children = sae.forest.gathered((codes[..., sae.forest.spans[level + 1]] > 0).float(), level)
        parents = codes[..., sae.forest.spans[level]] > 0
        assert parents.any()
        assert not (parents & (children == 0)).any()


def test_a_hard_gate_downwards_spares_leaves_without_a_parent() -> None:
    sae = tree(24, 8, gate="hard", orientation="top_down", shape="fanout")
    uneven(sae)
    codes = sae.codes(Batch.of(tokens()))
    on = codes > 0
    for child, parent in enumerate(sae.parent.tolist()):
        if parent >= 0:
            assert not (on[..., child] & ~on[..., parent]).any()
    assert on[..., -3:].any()


def test_without_the_encoder_skip_upper_levels_see_only_the_aggregate() -> None:
    sae = tree(16, no_enc_skip=True)
    uneven(sae)
    x = Batch.of(tokens())
    with torch.no_grad():
        before = sae.codes(x)
        sae.W_enc[:, : sae.forest.spans[LEAF].start] += 1.0
        assert torch.equal(sae.codes(x), before)
        sae.W_enc[:, sae.forest.spans[LEAF]] += 1.0
        assert not torch.equal(sae.codes(x)[..., :8], before[..., :8])
    upper = slice(0, sae.forest.spans[LEAF].start)
    assert not sae.direct_encoder()[:, upper].any()
    assert torch.equal(sae.direct_encoder()[:, upper.stop :], sae.W_enc[:, upper.stop :])


def test_without_the_decoder_skip_rows_follow_the_leaves() -> None:
    sae = tree(16, no_dec_skip=True)
    uneven(sae)
    run = learner(sae, 20)
    for step in range(20):
        run.train_step(Batch.of(tokens(seed=step)), 64)
    assert sae.down is not None
    v, parent = softplus(sae.down), sae.parent
    for row in (7, 4, 3, 0):  # middle, then top
        total = sum((v[c] * sae.W_dec[c] for c in range(16) if int(parent[c]) == row), torch.zeros(D))
        assert torch.allclose(sae.W_dec[row], total / total.norm(), atol=1e-6)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (20, 0.0), (30, 0.5), (40, 1.0), (99, 1.0)])
def test_consistency_rises_between_a_fifth_and_two_fifths(step: int, share: float) -> None:
    x = Batch.of(tokens())
    options = {"k": 2, "rho": 0.01, "coverage": 0.03}  # few enough for some parents to be alone
    full = tree(16, **options).training_pass(x, Clock(60, 100, 64)).parts
    parts = tree(16, **options).training_pass(x, Clock(step, 100, 64)).parts
    for name in ("l2", "kl", "family", "coverage"):
        assert full[name].item() > 0
        assert parts[name].item() == pytest.approx(share * full[name].item(), rel=1e-4)


def test_nested_losses_are_those_of_the_prefixes() -> None:
    sae, x = tree(nesting=[1.0, 2.0, 5.0]), tokens()
    output = sae.training_pass(Batch.of(x), MIDDLE)
    losses = []
    for span in sae.forest.spans:
        part = output.latents[..., : span.stop] @ sae.W_dec[: span.stop] + sae.b_dec
        losses.append((x - part).square().sum(-1).mean().item())
    expected = (losses[0] + 2 * losses[1] + 5 * losses[2]) / 8
    assert output.parts["reconstruction"].item() == pytest.approx(expected, rel=1e-5)
    assert losses[0] != losses[1]


def test_following_coverage_alone_gives_parents_children_that_fire_with_them() -> None:
    sae, batch = tree(40, 3, coverage=1.0), Batch.of(tokens(200))
    optimizer = torch.optim.Adam([sae.W_enc, sae.b_enc], lr=0.01)
    shares = []
    for _ in range(15):
        output = sae.training_pass(batch, MIDDLE)
        mid, leaf = ((output.latents[..., sae.forest.spans[level]] > 0).float() for level in (MID, LEAF))
        shares.append(float((mid * (sae.forest.gathered(leaf, MID) > 0)).sum() / mid.sum()))
        optimizer.zero_grad()
        output.parts["coverage"].backward()
        optimizer.step()
    assert shares[0] < 0.9
    assert shares[-1] > 0.97


def test_a_certain_swap_leaves_everything_to_the_leaves() -> None:
    sae, x = tree(swap=1.0), tokens()
    output = sae.training_pass(Batch.of(x), MIDDLE)
    top, mid, leaf = (output.latents[..., span] for span in sae.forest.spans)
    assert sae.down is not None
    v = softplus(sae.down)
    spans = sae.forest.spans
    mid_written = v[spans[MID]] * mid * (top > 0)  # one child each; then the middle's own codes are swapped away
    parents = (mid > 0).repeat_interleave(2, -1)
    leaf_written = leaf * (1 + v[spans[LEAF]] * parents)
    expected = mid_written @ sae.W_dec[spans[MID]] + leaf_written @ sae.W_dec[spans[LEAF]] + sae.b_dec
    assert torch.allclose(output.reconstruction, expected, atol=1e-6)


def test_swaps_depend_on_the_step_and_nothing_else() -> None:
    sae, x = tree(swap=0.5), Batch.of(tokens())
    one, again, other = (
        sae.training_pass(x, Clock(step, 100, 64)).parts["reconstruction"].item() for step in (5, 5, 6)
    )
    assert one == again
    assert one != other
    sae.seed = 2**40  # the same in the 32 bits that torch takes of a seed
    assert sae.training_pass(x, Clock(5, 100, 64)).parts["reconstruction"].item() != one


def test_with_its_extras_off_it_is_flat_batchtopk() -> None:
    flat = make_sae("batchtopk", {"d_sae": 32, "k": 6}, D, 0, "test")
    plain = make_sae("tree", {"d_sae": 32, "k": 6} | dict(Tree.plain), D, 0, "test")
    runs = [learner(sae, 30) for sae in (flat, plain)]
    for step in range(30):
        for run in runs:
            run.train_step(Batch.of(tokens(seed=step)), 64)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in flat.named_parameters()]
    for name, value in flat.named_parameters():
        assert torch.equal(value, plain.get_parameter(name)), name
    assert runs[0].read_metrics()["loss"] == runs[1].read_metrics()["loss"]


@pytest.mark.parametrize(
    ("option", "value"), [("sparsity", "l1"), ("sparsity", "joint"), ("orientation", "top_down"), ("shape", "fanout")]
)
def test_other_modes_learn(option: str, value: str) -> None:
    sae = tree(32, 6, **{option: value})
    run, batch = learner(sae, 60), Batch.of(tokens(128))
    losses = []
    for _ in range(60):
        losses.append(sae.training_pass(batch, run.clock(128)).parts["reconstruction"].item())
        run.train_step(batch, 128)
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_with_repairs_and_swaps_resumes_to_the_bit() -> None:
    def stepped(run: Learner, steps: range) -> None:
        for step in steps:
            if step == 3:
                run.sae.tokens_silent[25] = 10**9
            if run.at_landmark():
                run.revise(lambda: [Batch.of(tokens(seed=99))], 64)
            run.train_step(Batch.of(tokens(seed=step)), 64)

    straight, stopped, resumed = (learner(tree(40, 4, swap=0.2, rho=0.01, coverage=0.03), 20) for _ in range(3))
    stepped(straight, range(20))
    stepped(stopped, range(6))
    resumed.restore(stopped.tensors(), stopped.facts())
    stepped(resumed, range(6, 20))
    for group, tensors in straight.tensors().items():
        for name, value in tensors.items():
            assert torch.equal(value, resumed.tensors()[group][name]), f"{group} {name}"
