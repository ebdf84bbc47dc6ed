"""SAELens: `cfg.json` and `sae_weights.safetensors` in the layout of version 6, for `SAE.load_from_disk`.

`sparsity.safetensors`, the logarithm of the latents' densities, where suite core has measured them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.files import write_json
from train.exchange.about import About
from train.saes.affine import AffineForm

FILES = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
LAYOUT = "6.0.0"  # the first version that reads metadata from a table of its own
NEVER = 1e-10  # added to a density, so that one of 0 has a logarithm: as SAELens does
ARCHITECTURES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}


def write_saelens(form: AffineForm, about: About, folder: Path) -> str:
    """Write the files; which architecture they have."""
    architecture = ARCHITECTURES[form.activation]
    d_in, d_sae = form.W_enc.shape
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": form.centred,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if about.hook.endswith("hook_z") else "none",  # our heads lie flat already
        "metadata": metadata(form, about),
    }
    if form.activation == "topk":
        config |= {"k": form.k, "rescale_acts_by_decoder_norm": False}
    write_json(folder / "cfg.json", config)
    save_file(tensors(form), folder / "sae_weights.safetensors")
    if about.densities is not None and not form.lost:  # the densities are those of the whole SAE
        sparsity = torch.log10(torch.tensor(about.densities) + NEVER)
        save_file({"sparsity": sparsity}, folder / "sparsity.safetensors")
    return architecture


def tensors(form: AffineForm) -> dict[str, Tensor]:
    """The state dict of the architecture, exactly its keys."""
    found: dict[str, Tensor | None] = {"W_enc": form.W_enc, "W_dec": form.W_dec, "b_dec": form.b_dec}
    if form.activation == "gated":
        found |= {"b_gate": form.b_enc, "r_mag": form.r_mag, "b_mag": form.b_mag}
    else:
        found |= {"b_enc": form.b_enc, "threshold": form.threshold}
    return {name: value.float().cpu().contiguous() for name, value in found.items() if value is not None}


def metadata(form: AffineForm, about: About) -> dict[str, Any]:
    """How the SAE is to be used; what is ours stands under `granary`."""
    ours = {
        "variant": about.variant,
        "options": about.options,
        "training_steps": about.training_steps,
        "training_tokens": about.training_tokens,
        "model_revision": about.revision,
        "groups": about.groups,
        "context_free": bool(form.lost),
        "lost": form.lost,
    }
    return {
        "sae_lens_version": LAYOUT,
        "sae_lens_training_version": None,
        "model_name": about.model,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "hook_name": about.hook,
        "hook_head_index": None,
        "prepend_bos": about.bos,
        "context_size": about.context,
        "seqpos_slice": [None],
        "dataset_path": about.corpus,
        "exclude_special_tokens": list(about.special_tokens) or False,
        "neuronpedia_id": None,
        "granary": ours,
    }
