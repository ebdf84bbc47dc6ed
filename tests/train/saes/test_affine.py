"""What variants give as one affine map, against the formulas written out and against the variants themselves."""

from __future__ import annotations

import pytest
import torch

from tests.train.saes.drawn import FORMS, PLAIN, D, L, codes, drawn, tokens
from train.saes.affine import AffineForm

every_form = pytest.mark.parametrize(("variant", "options"), FORMS, ids=str)


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
