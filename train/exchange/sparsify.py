"""sparsify: `cfg.json` and `sae.safetensors`, for `SparseCoder.load_from_disk`. It knows top-k alone."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from common.errors import ConfigError
from common.files import write_json
from train.exchange.about import About
from train.saes.affine import AffineForm

FILES = {"cfg.json", "sae.safetensors"}
OTHERS = {"relu": "all its positive latents", "jumprelu": "latents above thresholds", "gated": "latents by a gate"}


def refuse_but_topk(form: AffineForm, variant: str) -> None:
    """Raises:
    ConfigError: the SAE keeps its latents another way than the k largest of each token.
    """
    if form.activation != "topk":
        raise ConfigError(
            f"sparsify keeps the k largest latents of each token, {variant} {OTHERS[form.activation]}. "
            "Export it with --to saelens or dictionary_learning."
        )


def write_sparsify(form: AffineForm, about: About, folder: Path) -> str:
    """Write both files; which activation they have."""
    form = form.with_centre(True)
    d_in, d_sae = form.W_enc.shape
    config = {
        "activation": "topk",
        "expansion_factor": max(d_sae // d_in, 1),
        "normalize_decoder": True,
        "num_latents": d_sae,
        "k": form.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d_in,
        "granary": {"model": about.model, "hook": about.hook, "variant": about.variant},
    }
    weights = {"encoder.weight": form.W_enc.T, "encoder.bias": form.b_enc, "W_dec": form.W_dec, "b_dec": form.b_dec}
    write_json(folder / "cfg.json", config)
    save_file({name: value.cpu().contiguous() for name, value in weights.items()}, folder / "sae.safetensors")
    return "topk"
