"""What every variant must pass. The registry is the only list: nothing here names a variant."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError, StoreError
from train.checkpoint import read_checkpoint, save_checkpoint
from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner
from train.saes import REGISTRY, load_sae, make_sae, save_sae
from train.saes.base import SAE
from train.schedule import Clock

D, N_LATENTS, K = 16, 64, 8
every_variant = pytest.mark.parametrize("variant", list(REGISTRY))
every_trained_variant = pytest.mark.parametrize("variant", [name for name, cls in REGISTRY.items() if cls.trained])
every_variant_with_k = pytest.mark.parametrize(
    "variant", [variant for variant, cls in REGISTRY.items() if "k" in cls.Config.model_fields]
)


def new_sae(variant: str, d: int = D, n_latents: int = N_LATENTS, k: int = K, **options: object) -> SAE:
    """A variant of this size, with the settings among `k` and `options` that it has."""
    known = REGISTRY[variant].Config.model_fields
    chosen = {key: value for key, value in ({"k": k} | options).items() if key in known}
    return make_sae(variant, {"d_sae": n_latents} | chosen, d, 0, "test")


def windows_of(sae: SAE, n: int, seed: int = 0) -> Tensor:
    """`n` windows of unit mean squared norm with a mean apart from 0: [n, window, d]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, sae.window, sae.d_in, generator=generator) + 0.5
    return x / x.square().sum(-1).mean().sqrt()


def batch_of(x: Tensor, valid: Tensor | None = None) -> Batch:
    """Each window the beginning of a document."""
    places = torch.arange(x.shape[1], dtype=torch.int32).expand(x.shape[:2])
    return Batch.of(x, pos=places, valid=valid)


def learner_of(sae: SAE, n_steps: int, lr: float | None = None) -> Learner:
    config = LearnerConfig(name="x", variant=sae.variant, lr=lr)
    return Learner(config, sae, n_steps, torch.device("cpu"), torch.float32)


def trained(variant: str, n_steps: int = 60) -> SAE:
    """A few steps on fresh batches, in raw units of 1 / 0.37; a copy of its own for every caller."""
    return copy.deepcopy(trained_once(variant, n_steps))


@functools.cache
def trained_once(variant: str, n_steps: int) -> SAE:
    sae = new_sae(variant)
    sae.start(0.37, windows_of(sae, 64).mean((0, 1)))
    learner = learner_of(sae, n_steps, lr=1e-3)
    for step in range(n_steps):
        batch = batch_of(windows_of(sae, 64, seed=step) / 0.37)
        if learner.at_landmark():
            learner.revise(lambda batch=batch: [batch.with_x(batch.x * 0.37)], 64 * sae.window)
        learner.train_step(batch, 64 * sae.window)
    for parameter in sae.parameters():
        parameter.grad = None
    return sae


@every_variant
def test_shapes_follow_the_input(variant: str) -> None:
    sae = new_sae(variant)
    rows, windows = torch.randn(5, D), torch.randn(3, 4, D)
    assert sae.d_sae == N_LATENTS or not sae.trained  # a reference has as many latents as it needs
    assert sae.encode(rows).shape == (5, sae.d_sae)
    assert sae.encode(windows).shape == (3, 4, sae.d_sae)
    assert sae(rows).shape == rows.shape
    assert sae(windows).shape == windows.shape
    assert (sae.encode(windows) >= 0).all()
    with pytest.raises(ValueError, match=r"expected \[N, 16\] or \[B, T, 16\], got \[5, 3\]"):
        sae.encode(torch.randn(5, 3))


@every_variant
def test_groups_are_disjoint_and_cover_the_latents(variant: str) -> None:
    sae = new_sae(variant)
    members = [latent for place in sae.groups().values() for latent in range(sae.d_sae)[place]]
    assert sorted(members) == (list(range(sae.d_sae)) if sae.groups() else [])


@every_variant
def test_rows_encode_as_windows_of_one(variant: str) -> None:
    sae = trained(variant)
    x = torch.randn(20, D)
    assert torch.equal(sae.encode(x), sae.encode(x[:, None])[:, 0])


@every_variant
def test_codes_do_not_depend_on_other_windows_of_the_batch(variant: str) -> None:
    sae = trained(variant)
    x = windows_of(sae, 32)
    with torch.no_grad():
        together = sae.encode(x)
        for row in range(32):
            louder = torch.cat([x[row : row + 1], 100 * x[:3]])
            # a matrix product of another shape may differ in its last bits, no more
            assert torch.allclose(sae.encode(louder)[0], together[row], rtol=1e-4, atol=1e-6)


@every_trained_variant
def test_the_gradient_reaches_every_parameter(variant: str) -> None:
    sae = trained(variant, 2)  # what starts at 0 stands in the way of what comes before it
    x = windows_of(sae, 64)
    output = sae.training_pass(batch_of(x), Clock(50, 100, 64))
    output.total.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


@every_trained_variant
def test_the_total_is_the_sum_of_the_parts_with_everything_dead(variant: str) -> None:
    sae = new_sae(variant)
    for name, buffer in sae.named_buffers():
        if name == "tokens_silent":
            buffer.fill_(10**9)
    x = windows_of(sae, 64)
    output = sae.training_pass(batch_of(x), Clock(50, 100, 64))
    parts = [part.item() for part in output.parts.values()]
    assert output.total.item() == pytest.approx(sum(parts), rel=1e-6)
    assert len(parts) >= 2
    assert all(part > 0 for part in parts)


@every_trained_variant
def test_the_first_loss_is_summed_over_dimensions(variant: str) -> None:
    sae = new_sae(variant, d=64, n_latents=256, k=8)
    x = windows_of(sae, 256)
    sae.start(1.0, x.mean((0, 1)))
    energy = (x - sae.b_dec).square().sum(-1).mean().item()
    loss = float(sae.training_pass(batch_of(x), Clock(0, 100, 64)).parts["reconstruction"].detach())
    # a mean over d would be 64 times less (spec §3)
    assert 0.5 * energy < loss < 3 * energy


@every_trained_variant
def test_invalid_positions_do_not_count(variant: str) -> None:
    x = windows_of(new_sae(variant), 32)
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[::4] = False
    losses = []
    for filler in (0.0, 1e3):
        sae = new_sae(variant)
        filled = torch.where(valid[..., None], x, filler)
        output = sae.training_pass(batch_of(filled, valid), Clock(50, 100, 64))
        output.total.backward()
        assert sae.W_enc.grad is not None
        losses.append((output.total.detach(), sae.W_enc.grad))
    assert torch.allclose(losses[0][0], losses[1][0])
    assert torch.allclose(losses[0][1], losses[1][1], rtol=1e-4, atol=1e-6)


@every_variant
def test_saved_and_loaded_is_equal_to_the_bit(variant: str, tmp_path: Path) -> None:
    sae = trained(variant)
    save_sae(sae, tmp_path / "sae", {"units": "raw"})
    loaded = load_sae(tmp_path)
    assert loaded.config == sae.config
    ours, theirs = sae.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = torch.randn(20, D)
    assert torch.equal(sae(x), loaded(x))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@every_variant
def test_folding_keeps_the_reconstruction_in_raw_units(variant: str) -> None:
    sae = trained(variant)
    x = windows_of(sae, 200, seed=999) / 0.37
    with torch.no_grad():
        sae.calibrate(lambda: (batch_of(windows_of(sae, 64, seed=step)) for step in range(10)))
        before, latents = sae(x), sae.encode(x)
        sae.fold()
        after = sae(x)
        assert (after - before).norm() / before.norm() < 1e-5
        assert (sae.encode(x) - latents).norm() <= 1e-5 * latents.norm()
    assert sae.scale.item() == pytest.approx(1.0 if sae.foldable else 0.37)
    norms = sae.W_dec.norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


@every_variant
def test_calibration_keeps_the_reconstruction_of_free_rows(variant: str) -> None:
    sae = trained(variant)
    if sae.unit_rows:
        norms = sae.W_dec.norm(dim=-1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
        return
    x = windows_of(sae, 100)
    with torch.no_grad():
        before = sae(x)
        sae.calibrate(lambda: [batch_of(x)])
        assert (sae(x) - before).norm() / before.norm() < 1e-5


@every_variant_with_k
def test_calibrated_l0_is_the_k_asked_for(variant: str) -> None:
    sae = trained(variant)
    batches = [windows_of(sae, 64, seed=step) for step in range(10)]
    sae.calibrate(lambda: [batch_of(x) for x in batches])
    l0 = (sae.codes(batch_of(torch.cat(batches))) > 0).sum() / (640 * sae.window)
    assert float(l0) == pytest.approx(K, rel=0.02)


@every_trained_variant
def test_one_batch_is_learned_by_heart(variant: str) -> None:
    d, n_steps = 64, 1000
    last, free = (0.0, 0.0, 1.0), "free"  # noise has neither levels nor parts
    timeless = {"lambda_scale": 0.0, "lambda_sep": 0.0, "lambda_c": 0.0}  # nor time scales, nor topics
    apart = {"l2": 0.0, "kl": 0.0}  # nor a tree
    even = {"high_weight": 0.0, "high_share": 0.5, "k_high": 16}  # nor a group that should do without the other
    options = {"nesting": last, "decoder": free, **timeless, **apart, **even}
    penalised = "sparsity" not in REGISTRY[variant].Config.model_fields
    price = {"l1": 1e-4, "l0": 1e-4} if penalised else {}
    sae = new_sae(variant, d=d, n_latents=4 * d, k=32, **price, **options)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(32, d, generator=generator)
    x = torch.randn(512 // sae.window, sae.window, 32, generator=generator) @ basis + 0.3 * torch.randn(
        512 // sae.window, sae.window, d, generator=generator
    )
    x = x / x.square().sum(-1).mean().sqrt()
    sae.start(1.0, x.mean((0, 1)))
    learner = learner_of(sae, n_steps, lr=3e-3)
    batch = batch_of(x)
    for _ in range(n_steps):
        if learner.at_landmark():
            learner.revise(lambda: [batch], 512)
        learner.train_step(batch, 512)
    with torch.no_grad():
        sae.calibrate(lambda: [batch_of(x)])
        error = (x - sae(batch_of(x))).square().sum()
        spread = (x - x.mean((0, 1))).square().sum()
    assert 1 - float(error / spread) > 0.99


@every_trained_variant
def test_seeds_decide_the_first_weights(variant: str) -> None:
    one, again, other = (REGISTRY[variant](new_sae(variant).config, D, seed) for seed in (1, 1, 2))
    assert torch.equal(one.W_dec, again.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)


@every_variant
def test_a_learner_restores_to_the_bit(variant: str, tmp_path: Path) -> None:
    straight, stopped = (learner_of(new_sae(variant), 20, lr=1e-3) for _ in range(2))
    for step in range(20):
        batch = batch_of(windows_of(straight.sae, 32, seed=step))
        straight.train_step(batch, 32)
        if step == 9:
            other = learner_of(new_sae(variant), 20, lr=1e-3)
            saved = read_checkpoint(save_checkpoint(tmp_path, 10, stopped.tensors(), stopped.facts(), {}))
            other.restore(saved.tensors, saved.facts)
            stopped = other
        stopped.train_step(batch, 32)
    for group, tensors in straight.tensors().items():
        for name, value in tensors.items():
            assert torch.equal(value, stopped.tensors()[group][name]), f"{group} {name}"
    assert straight.read_metrics() == stopped.read_metrics()


def test_an_unknown_variant_is_told_the_nearest() -> None:
    known = next(iter(REGISTRY))
    with pytest.raises(ConfigError, match=rf"unknown variant '{known}x'\. Did you mean '{known}'\?"):
        make_sae(known + "x", {}, D, 0, "test")


@every_variant
def test_an_unknown_option_is_told_the_nearest(variant: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'd_sea'\. Did you mean 'd_sae'\?"):
        make_sae(variant, {"d_sea": 4}, D, 0, "test")


@every_variant_with_k
def test_a_k_beyond_the_width_is_refused(variant: str) -> None:
    if not REGISTRY[variant].trained:
        return  # its width is not what was asked for
    with pytest.raises(ConfigError, match="k = 33 is more than d_sae = 32"):
        make_sae(variant, {"d_sae": 32, "k": 33}, D, 0, "test")


@every_trained_variant
def test_the_default_width_is_eight_times_the_model(variant: str) -> None:
    assert make_sae(variant, {}, D, 0, "test").d_sae == 8 * D


def test_loading_from_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no trained SAE here"):
        load_sae(tmp_path)


@every_trained_variant
def test_loading_weights_of_another_width_is_refused(variant: str, tmp_path: Path) -> None:
    save_sae(new_sae(variant), tmp_path / "a", {})
    save_sae(new_sae(variant, n_latents=32), tmp_path / "b", {})
    (tmp_path / "a" / "config.json").replace(tmp_path / "b" / "config.json")
    with pytest.raises(StoreError, match="the weights do not fit"):
        load_sae(tmp_path / "b")


@pytest.mark.parametrize("variant", ["standard", "panneal", "gated", "jumprelu"])
def test_an_l0_above_the_width_is_refused(variant: str) -> None:
    with pytest.raises(ConfigError, match=r"target_l0 = 33 \(or --k\) is more than d_sae = 32"):
        make_sae(variant, {"d_sae": 32, "target_l0": 33}, 8, 0, "test")


@pytest.mark.parametrize("variant", [name for name, cls in REGISTRY.items() if cls.trained])
@pytest.mark.parametrize(("d_sae", "d_in"), [(1, 8), (32, 1)])
def test_encoder_and_decoder_never_share_memory(variant: str, d_sae: int, d_in: int) -> None:
    try:
        sae = make_sae(variant, {"d_sae": d_sae} | ({"k": 1} if d_sae == 1 else {}), d_in, 0, "test")
    except ConfigError:  # too small for its levels
        return
    assert sae.W_enc.untyped_storage().data_ptr() != sae.W_dec.untyped_storage().data_ptr()
