"""Reading SAELens folders, and what cannot be read, each told in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import ConfigError, GranaryError, StoreError
from train.exchange.imports import sae_from
from train.exchange.published import read_published

D, L, K = 6, 20, 4
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
ABOUT = {
    "sae_lens_version": "6.20.1",
    "model_name": "tiny",
    "hook_name": "blocks.1.hook_resid_post",
    "context_size": 32,
    "prepend_bos": True,
}


def weights(architecture: str, unit: bool = False) -> dict[str, Tensor]:
    """Drawn ones; decoder rows have norms of .5 to 2 unless they are unit."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(L, D, generator=generator), dim=-1)
    own = {
        "gated": ("b_gate", "r_mag", "b_mag"),
        "jumprelu": ("b_enc", "threshold"),
    }.get(architecture, ("b_enc",))
    found = {
        "W_enc": torch.randn(D, L, generator=generator),
        "W_dec": rows if unit else rows * torch.linspace(0.5, 2, L)[:, None],
        "b_dec": torch.randn(D, generator=generator),
    }
    return found | {name: torch.randn(L, generator=generator) for name in own}


def published(folder: Path, architecture: str, tensors: dict[str, Tensor] | None = None, **more: Any) -> Path:
    """A SAELens folder of version 6."""
    config = {"architecture": architecture, "d_in": D, "d_sae": L, "dtype": "float32", "device": "cpu",
              "apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": ABOUT}  # fmt: skip
    if architecture == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": True}
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config | more))
    save_file(tensors or weights(architecture), folder / "sae_weights.safetensors")
    return folder


def reconstruction(architecture: str, w: dict[str, Tensor], x: Tensor, centred: bool, rescale: bool = True) -> Tensor:
    """What SAELens computes, on weights as they are saved."""
    projected = (x - w["b_dec"] if centred else x) @ w["W_enc"]
    if architecture == "gated":
        f = (projected + w["b_gate"] > 0) * torch.relu(projected * w["r_mag"].exp() + w["b_mag"])
    else:
        u = projected + w["b_enc"]
        norms = w["W_dec"].norm(dim=-1) if architecture == "topk" and rescale else torch.ones(L)
        f = torch.relu(u)
        if architecture == "jumprelu":
            f = f * (u > w["threshold"])
        if architecture == "topk":
            chosen = torch.topk(u * norms, K).indices
            f = torch.zeros_like(f).scatter(-1, chosen, f.gather(-1, chosen))
    return f @ w["W_dec"] + w["b_dec"]


def tokens() -> Tensor:
    return 2 * torch.randn(200, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("centred", [True, False])
def test_reconstruction_is_the_same_with_norms_and_centre_folded(
    architecture: str, centred: bool, tmp_path: Path
) -> None:
    found = read_published(published(tmp_path / "x", architecture, apply_b_dec_to_input=centred))
    sae = sae_from(found.form)
    x = tokens()
    assert torch.allclose(sae(x), reconstruction(architecture, weights(architecture), x, centred), atol=1e-5)
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(L), atol=1e-5)
    assert sae.variant == architecture
    assert (found.model, found.hook, found.context, found.bos) == ("tiny", ABOUT["hook_name"], 32, True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flat_settings_of_earlier_versions_are_read(architecture: str, tmp_path: Path) -> None:
    folder = published(tmp_path / "x", architecture, weights(architecture, unit=True))
    flat = {
        "d_in": D,
        "d_sae": L,
        "hook_point": "blocks.1.hook_resid_post",
        "model_name": "tiny",
        "prepend_bos": False,
        "normalize_activations": None,
        "context_size": 64,
        "training_tokens": 123.0,
        "dtype": "float32",
    }
    if architecture == "topk":
        flat |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    elif architecture != "standard":
        flat |= {"architecture": architecture, "normalize_activations": False}
    (folder / "cfg.json").write_text(json.dumps(flat))
    found = read_published(folder)
    x = tokens()
    expected = reconstruction(architecture, weights(architecture, unit=True), x, centred=True, rescale=False)
    assert torch.allclose(sae_from(found.form)(x), expected, atol=1e-5)
    assert (found.hook, found.context, found.bos, found.training_tokens) == (ABOUT["hook_name"], 64, False, 123)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_name", 5, "text is needed"),
        ("hook_name", ["x"], "text is needed"),
        ("context_size", "128", "a whole number is needed"),
        ("context_size", True, "a whole number is needed"),
        ("prepend_bos", "yes", "true or false is needed"),
        ("training_tokens", {}, "a whole number is needed"),
        ("granary", "x", "a table is needed"),
    ],
)
def test_metadata_of_another_type_is_one_error(key: str, value: Any, message: str, tmp_path: Path) -> None:
    folder = published(tmp_path / "x", "standard", metadata=ABOUT | {key: value})
    with pytest.raises(StoreError, match=rf"cfg\.json: {key} = .*{message}"):
        read_published(folder)


def test_settings_of_another_type_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"normalize_activations = \['x'\]; text is needed"):
        read_published(published(tmp_path / "x", "standard", normalize_activations=["x"]))
    flat = {"d_in": D, "d_sae": L, "activation_fn_str": "topk", "activation_fn_kwargs": [4]}
    folder = published(tmp_path / "y", "topk")
    (folder / "cfg.json").write_text(json.dumps(flat))
    with pytest.raises(StoreError, match=r"activation_fn_kwargs = \[4\]; a table is needed"):
        read_published(folder)


def test_half_precision_weights_are_read_in_float32(tmp_path: Path) -> None:
    half = {name: value.bfloat16() for name, value in weights("standard").items()}
    form = read_published(published(tmp_path / "x", "standard", half)).form
    assert {value.dtype for value in (form.W_enc, form.W_dec, form.b_enc, form.b_dec)} == {torch.float32}


def test_thresholds_that_let_everything_or_nothing_through(tmp_path: Path) -> None:
    w = weights("jumprelu") | {"threshold": torch.tensor([-3.0, torch.inf] * (L // 2))}
    sae, x = sae_from(read_published(published(tmp_path / "x", "jumprelu", w)).form), tokens()
    assert torch.allclose(sae(x), reconstruction("jumprelu", w, x, centred=True), atol=1e-5)
    assert float(sae.encode(x).min()) == 0.0
    assert not bool((sae.encode(x)[:, 1::2] > 0).any())


def test_scaling_factors_of_one_are_nothing(tmp_path: Path) -> None:
    w = weights("standard")
    ones = published(tmp_path / "x", "standard", w | {"scaling_factor": torch.ones(L)})
    assert torch.allclose(
        sae_from(read_published(ones).form)(tokens()), reconstruction("standard", w, tokens(), True), atol=1e-5
    )
    with pytest.raises(ConfigError, match="scales its latents by factors of its own"):
        read_published(published(tmp_path / "y", "standard", w | {"scaling_factor": torch.full((L,), 2.0)}))


def change(**more: Any) -> Callable[[Path], None]:
    """Other settings; None takes a key away."""

    def apply(folder: Path) -> None:
        path = folder / "cfg.json"
        config = json.loads(path.read_text()) | more
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return apply


def swap(**more: Tensor | None) -> Callable[[Path], None]:
    """Other tensors; None takes one away."""

    def apply(folder: Path) -> None:
        path = folder / "sae_weights.safetensors"
        changed = load_file(path) | more
        save_file({name: value for name, value in changed.items() if value is not None}, path)

    return apply


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


MALFORMED: list[tuple[str, Callable[[Path], Any], type[GranaryError], str]] = [
    ("standard", lambda folder: (folder / "cfg.json").unlink(), StoreError, "no such file. A SAELens folder has"),
    ("standard", put("cfg.json", b"{"), StoreError, "not valid JSON"),
    ("standard", put("cfg.json", b"[1]"), StoreError, "not the settings of an SAE"),
    ("standard", change(metadata=[1]), StoreError, "not the settings of an SAE"),
    ("standard", change(d_in=None), StoreError, "d_in = None; a number of at least 1"),
    ("standard", change(d_sae="many"), StoreError, "d_sae = 'many'; a number"),
    ("standard", change(architecture=None), StoreError, "does not say its architecture"),
    ("standard", change(architecture="temporal"), ConfigError, "'temporal' cannot be imported; standard, topk"),
    ("standard", change(metadata=None, activation_fn="tanh-relu"), ConfigError, "function 'tanh-relu' cannot"),
    ("standard", change(metadata=None, normalize_activations=True), ConfigError, "Fold it into them with SAELens"),
    ("standard", change(normalize_activations="expected_average_only_in"), ConfigError, "the folder does not hold"),
    ("standard", change(normalize_activations="layer_norm"), ConfigError, "each token is normalised on its own"),
    ("standard", change(normalize_activations="odd"), ConfigError, "it is not known what that does"),
    ("topk", change(k=None), StoreError, "k = None; topk needs one from 1 to d_sae = 20"),
    ("topk", change(k=21), StoreError, "k = 21; topk needs one from 1 to d_sae = 20"),
    ("topk", change(rescale_acts_by_decoder_norm=False), ConfigError, "decoder norms from 0.5 to 2 decide which"),
    ("standard", lambda folder: (folder / "sae_weights.safetensors").unlink(), StoreError, "from safetensors alone"),
    ("standard", put("sae_weights.safetensors", pickle.dumps({"W_enc": 1})), StoreError, "no safetensors file"),
    ("standard", swap(b_enc=None), StoreError, r"holds W_dec, W_enc, b_dec; standard has W_dec, W_enc, b_dec, b_enc"),
    ("standard", swap(W_skip=torch.ones(D, D)), StoreError, "it holds W_dec, W_enc, W_skip"),
    ("jumprelu", change(architecture="standard"), StoreError, "threshold; standard has"),
    ("standard", swap(W_enc=torch.ones(L, D)), StoreError, r"W_enc is \[20, 6\], cfg.json says \[6, 20\]"),
    ("standard", swap(b_dec=torch.full((D,), torch.nan)), StoreError, "b_dec is not finite"),
    ("jumprelu", swap(threshold=torch.full((L,), torch.nan)), StoreError, "threshold is not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "spoil", "error", "message"), MALFORMED, ids=[case[3] for case in MALFORMED])
def test_what_cannot_be_read_is_one_clear_line(
    architecture: str, spoil: Callable[[Path], Any], error: type[GranaryError], message: str, tmp_path: Path
) -> None:
    folder = published(tmp_path / "x", architecture)
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        read_published(folder)
    assert type(caught.value) is error
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "run",))

    folder = published(tmp_path / "x", "standard")
    for name in ("sae_weights.safetensors", "sae_weights.pt", "ae.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(StoreError):
        read_published(folder)
    assert not (tmp_path / "run").exists()
