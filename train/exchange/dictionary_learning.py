"""dictionary_learning: `ae.pt`, a state dict, and `config.json`, for its `load_dictionary` and for SAEBench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import write_json
from train.exchange.about import About
from train.saes.affine import AffineForm

FILES = {"ae.pt", "config.json"}


@dataclass(frozen=True)
class Dictionary:
    """One of the library's classes with its weights.

    Attributes:
        more: what its `config.json` says beside what all say.
    """

    dict_class: str
    trainer_class: str
    state: dict[str, Tensor]
    more: dict[str, Any]


def write_dictionary_learning(form: AffineForm, about: About, folder: Path) -> str:
    """Write both files; which class they load as."""
    found = dictionary(form, about)
    d_in, d_sae = form.W_enc.shape
    submodule = f"resid_post_layer_{about.layer}" if about.hook.endswith("hook_resid_post") else about.hook
    trainer = {
        "trainer_class": found.trainer_class,
        "dict_class": found.dict_class,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "layer": about.layer,
        "lm_name": about.model,
        "submodule_name": submodule,
        "steps": about.training_steps,
        "lr": about.lr,
        "seed": about.seed,
        "device": "cpu",
        "wandb_name": about.name,
        **found.more,
    }
    buffer = {"d_submodule": d_in, "io": "out", "n_ctxs": None, "ctx_len": about.context, "device": "cpu"}
    ours = {"variant": about.variant, "hook": about.hook, "context_free": bool(form.lost), "lost": form.lost}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer, "granary": ours})
    torch.save({name: value.cpu().contiguous() for name, value in found.state.items()}, folder / "ae.pt")
    return found.dict_class


def dictionary(form: AffineForm, about: About) -> Dictionary:
    """The class that computes what the form does, and its state dict."""
    if form.activation == "gated":
        return gated(form)
    if form.activation == "jumprelu":
        return thresholded(form, about)
    form = form.with_centre(True)
    if form.activation == "topk":
        assert form.k is not None
        more = {"k": torch.tensor(form.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}  # -1: not set
        return Dictionary("AutoEncoderTopK", "TopKTrainer", layers(form, "b_dec") | more, {"k": form.k})
    trainer = "PAnnealTrainer" if about.variant == "panneal" else "StandardTrainer"
    return Dictionary("AutoEncoder", trainer, layers(form, "bias"), {})


def layers(form: AffineForm, bias: str) -> dict[str, Tensor]:
    """Encoder and decoder as `nn.Linear` has them, [out, in]."""
    return {
        bias: form.b_dec,
        "encoder.weight": form.W_enc.T,
        "encoder.bias": form.b_enc,
        "decoder.weight": form.W_dec.T,
    }


def gated(form: AffineForm) -> Dictionary:
    """Biases of gate and magnitude apart."""
    form = form.with_centre(True)
    assert form.r_mag is not None
    assert form.b_mag is not None
    state = layers(form, "decoder_bias") | {"r_mag": form.r_mag, "mag_bias": form.b_mag}
    state["gate_bias"] = state.pop("encoder.bias")
    return Dictionary("GatedAutoEncoder", "GatedSAETrainer", state, {})


def thresholded(form: AffineForm, about: About) -> Dictionary:
    """One threshold for all latents is a BatchTopK; else a JumpReLU, which subtracts no bias from its input."""
    assert form.threshold is not None
    theta, k = form.threshold, about.options.get("k")
    parameters = {"W_enc": form.W_enc, "b_enc": form.b_enc, "W_dec": form.W_dec, "b_dec": form.b_dec}
    if k is None or not form.centred or not bool((theta == theta[0]).all()):
        apart = form.with_centre(False)
        state = parameters | {"b_enc": apart.b_enc, "threshold": theta}
        return Dictionary("JumpReluAutoEncoder", "JumpReluTrainer", state, {})
    common = {"k": torch.tensor(k, dtype=torch.int), "threshold": theta[0].clone()}
    if about.variant != "matryoshka":
        return Dictionary("BatchTopKSAE", "BatchTopKTrainer", layers(form, "b_dec") | common, {"k": k})
    sizes = [stop - start for start, stop in about.groups.values()]
    state = parameters | common | {"group_sizes": torch.tensor(sizes)}
    return Dictionary("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer", state, {"k": k, "group_sizes": sizes})
