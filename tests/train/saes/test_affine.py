"""What variants give as one affine map, against the formulas written out and against the variants themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.saes import REGISTRY, make_sae
from train.saes.affine import AffineForm
from train.saes.base import SAE

D, L, N = 12, 40, 64
PLAIN = {"tree": dict(REGISTRY["tree"].plain or {}), "compositional": {"encoder": "no_comp"}}
FORMS = [(name, PLAIN.get(name, {})) for name in REGISTRY] + [
    ("tree", PLAIN["tree"] | {"sparsity": "budgets", "orientation": "top_down"}),
    ("tree", PLAIN["tree"] | {"sparsity": "budgets", "no_dec_skip": True}),
    ("contrastive", {"sparsity": "l1"}),
    ("multiscale", {"convolution": "none", "sparsity": "budgets"}),
    ("multiscale", {"convolution": "mixture"}),
    ("relational", {"memory": "lags", "context_as": "input", "position_gate": True}),
    ("predictor", {"rank": 0}),
]
every_form = pytest.mark.parametrize(("variant", "options"), FORMS, ids=str)
LOST = {"relational", "multiscale", "predictor"}


def drawn(variant: str, options: dict[str, object], scale: float = 1.0) -> SAE:
    """One with weights that are all drawn, thresholds that let some through, and unit decoder rows."""
    known = REGISTRY[variant].Config.model_fields
    size = {"d_sae": L, "k": 6, "window": 4, "buffer": 0, "keys": 128}
    chosen = {key: value for key, value in size.items() if key in known and (key != "window" or variant in LOST)}
    sae = make_sae(variant, chosen | options, D, 0, "test")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            if name == "theta":
                weight.uniform_(0.1, 1.0, generator=generator)
            elif name not in ("W_dec", "W_low", "coupling"):
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        if (sparsity := getattr(sae, "sparsity", None)) and sparsity.mode != "l1":
            sparsity.threshold.copy_(0.2 + 0.5 * torch.arange(len(sparsity.threshold)))
        sae.scale.fill_(scale)
    if hasattr(sae, "_write_rows"):
        sae._write_rows()
    if variant == "standard":
        sae.calibrate(lambda: [])
    return sae.eval().requires_grad_(False)


def tokens(scale: float = 1.0) -> Tensor:
    return 3 * torch.randn(N, D, generator=torch.Generator().manual_seed(2)) / scale


def codes(form: AffineForm, x: Tensor) -> Tensor:
    """The formulas of the module, latent by latent."""
    out = torch.zeros(len(x), form.W_enc.shape[1])
    for n, row in enumerate(x - form.b_dec if form.centred else x):
        pi = torch.stack([(row * form.W_enc[:, i]).sum() for i in range(form.W_enc.shape[1])])
        u = pi + form.b_enc
        if form.activation == "gated":
            assert form.r_mag is not None
            assert form.b_mag is not None
            out[n] = torch.where(u > 0, torch.relu(torch.exp(form.r_mag) * pi + form.b_mag), 0.0)
        elif form.activation == "jumprelu":
            assert form.threshold is not None
            out[n] = torch.where(u > form.threshold, torch.relu(u), 0.0)
        elif form.activation == "topk":
            kept = sorted(range(len(u)), key=lambda i: -float(u[i]))[: form.k]
            out[n, kept] = torch.relu(u[kept])
        else:
            out[n] = torch.relu(u)
    return out


@every_form
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_form_gives_the_codes_and_reconstructions_of_tokens_alone(
    variant: str, options: dict[str, object], scale: float
) -> None:
    sae, x = drawn(variant, options, scale), tokens(scale)
    form = sae.as_affine()
    assert form is not None
    expected = sae.encode(x)
    found = codes(form, x)
    assert bool((expected > 0).any()) or variant == "mean"
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 / scale)
    assert torch.allclose(found @ form.W_dec + form.b_dec, sae(x), rtol=1e-5, atol=1e-5 / scale)
    assert torch.allclose(form.W_dec.norm(dim=-1), torch.ones(sae.d_sae), atol=1e-5)


@every_form
def test_form_names_what_is_lost_where_neighbours_matter(variant: str, options: dict[str, object]) -> None:
    sae = drawn(variant, options)
    form = sae.as_affine()
    assert form is not None
    windows = tokens().reshape(4, -1, D)
    alone = form.W_dec.T @ codes(form, windows.reshape(-1, D)).T
    same = torch.allclose(sae(windows).reshape(-1, D), alone.T + form.b_dec, atol=1e-4)
    assert same == (form.lost == "")


@pytest.mark.parametrize(
    ("variant", "options"),
    [("tree", {}), ("tree", PLAIN["tree"] | {"gate": "hard"}), ("compositional", {})],
    ids=str,
)
def test_levels_that_read_one_another_have_no_form(variant: str, options: dict[str, object]) -> None:
    assert drawn(variant, options).as_affine() is None


def a_form(**more: object) -> AffineForm:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(L, D, generator=generator)
    values = {
        "W_enc": torch.randn(D, L, generator=generator),
        "b_enc": torch.randn(L, generator=generator),
        "W_dec": rows,
        "b_dec": torch.randn(D, generator=generator),
        "activation": "relu",
    }
    return AffineForm(**(values | more))  # type: ignore[arg-type]


KINDS = [
    {"activation": "relu"},
    {"activation": "jumprelu", "threshold": torch.linspace(0, 2, L)},
    {"activation": "gated", "r_mag": torch.linspace(-1, 1, L), "b_mag": torch.linspace(1, -1, L)},
]


@pytest.mark.parametrize("more", KINDS, ids=lambda more: str(more["activation"]))
@pytest.mark.parametrize("centred", [True, False])
def test_unit_rows_and_centre_keep_the_reconstruction(more: dict[str, object], centred: bool) -> None:
    form, x = a_form(**more, centred=centred), tokens()
    wanted = codes(form, x) @ form.W_dec + form.b_dec
    for other in (form.with_unit_rows(), form.with_centre(not centred), form.with_unit_rows().with_centre(not centred)):
        assert torch.allclose(codes(other, x) @ other.W_dec + other.b_dec, wanted, atol=1e-4)
    assert torch.allclose(form.with_unit_rows().W_dec.norm(dim=-1), torch.ones(L))


def test_rows_of_norm_one_keep_their_bits() -> None:
    rows = torch.nn.functional.normalize(a_form().W_dec, dim=-1)
    form = a_form(W_dec=rows)
    assert form.with_unit_rows() is form


def test_a_row_of_zeros_stays_one() -> None:
    rows = torch.cat([torch.zeros(1, D), a_form().W_dec[1:]])
    form = a_form(W_dec=rows).with_unit_rows()
    assert torch.equal(form.W_dec[0], torch.zeros(D))
    assert bool(form.W_enc.isfinite().all())


def test_topk_with_even_rows_is_folded_and_with_uneven_ones_refused() -> None:
    rows = torch.nn.functional.normalize(a_form().W_dec, dim=-1)
    form, x = a_form(activation="topk", k=5, W_dec=3 * rows), tokens()
    folded = form.with_unit_rows()
    assert torch.allclose(folded.W_dec, rows, atol=1e-6)
    assert torch.allclose(codes(folded, x), 3 * codes(form, x), atol=1e-4)
    with pytest.raises(ValueError, match=r"decoder norms from .* decide which latents are the k largest"):
        a_form(activation="topk", k=5).with_unit_rows()


def test_topk_with_rows_rounded_to_bfloat16_stays_as_it_is() -> None:
    rows = torch.nn.functional.normalize(a_form().W_dec, dim=-1).bfloat16().float()
    form = a_form(activation="topk", k=5, W_dec=rows)
    assert form.with_unit_rows() is form
