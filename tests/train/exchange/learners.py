"""Learner folders of SAEs that nobody trained, and readers of other libraries' files that know nothing of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from train.saes import save_sae
from train.saes.base import SAE

FACTS: dict[str, Any] = {
    "units": "raw",
    "store": "a store",
    "model": "/home/somebody/models/tiny",
    "model_identity": {"weights": "abc"},
    "hook": "blocks.3.hook_resid_post",
    "context": 16,
    "bos": False,
    "corpus": "owner/texts",
    "special_tokens": [0, 7],
    "median_norm": 2.0,
    "training_steps": 5,
    "training_tokens": 640,
    "lr": 1e-3,
    "seed": 4,
}


def learner_folder(run: Path, sae: SAE, name: str = "", **facts: Any) -> Path:
    """A learner with `sae/` alone."""
    folder = run / (name or sae.variant)
    save_sae(sae, folder / "sae", FACTS | facts)
    return folder


@dataclass(frozen=True)
class Read:
    """An SAE as another library would compute it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def keep_largest(values: Tensor, k: int) -> Tensor:
    """Token by token, all but the k largest set to 0."""
    out = torch.zeros_like(values)
    for row, kept in zip(values, out, strict=True):
        chosen = sorted(range(len(row)), key=lambda i: -float(row[i]))[:k]
        kept[chosen] = row[chosen]
    return out


def read_saelens(folder: Path) -> Read:
    """SAELens 6: exactly the architecture's tensors."""
    config, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    own = {"gated": {"b_gate", "r_mag", "b_mag"}, "jumprelu": {"b_enc", "threshold"}}
    assert set(w) == {"W_enc", "W_dec", "b_dec"} | own.get(config["architecture"], {"b_enc"})
    assert w["W_enc"].shape == (config["d_in"], config["d_sae"])
    assert w["W_dec"].shape == (config["d_sae"], config["d_in"])
    assert config["normalize_activations"] == "none"

    def encode(x: Tensor) -> Tensor:
        projected = (x - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"]
        if config["architecture"] == "gated":
            return (projected + w["b_gate"] > 0) * torch.relu(projected * w["r_mag"].exp() + w["b_mag"])
        before = projected + w["b_enc"]
        if config["architecture"] == "jumprelu":
            return torch.relu(before) * (before > w["threshold"])
        if config["architecture"] == "topk":
            return torch.relu(keep_largest(before, config["k"]))
        assert config["architecture"] == "standard"
        return torch.relu(before)

    return Read(config, w, encode, lambda f: f @ w["W_dec"] + w["b_dec"])


DICTIONARIES = {
    "AutoEncoder": {"bias", "encoder.weight", "encoder.bias", "decoder.weight"},
    "GatedAutoEncoder": {"decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"},
    "AutoEncoderTopK": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"},
    "BatchTopKSAE": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"},
    "MatryoshkaBatchTopKSAE": {"W_enc", "b_enc", "W_dec", "b_dec", "k", "threshold", "group_sizes"},
    "JumpReluAutoEncoder": {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"},
}


def read_dictionary(folder: Path) -> Read:
    """dictionary_learning: one of its classes, at inference."""
    config = json.loads((folder / "config.json").read_text())
    w = torch.load(folder / "ae.pt", weights_only=True)
    kind = config["trainer"]["dict_class"]
    assert set(w) == DICTIONARIES[kind]
    if "encoder.weight" in w:  # nn.Linear: [out, in]
        assert w["encoder.weight"].is_contiguous()
        centre = w.get("bias", w.get("decoder_bias", w.get("b_dec")))
        W_enc, W_dec, b_enc = w["encoder.weight"].T, w["decoder.weight"].T, w.get("encoder.bias", torch.zeros(()))
    else:
        W_enc, W_dec, b_enc, centre = w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"]
    assert W_enc.shape == (config["trainer"]["activation_dim"], config["trainer"]["dict_size"])

    def encode(x: Tensor) -> Tensor:
        before = (x if kind == "JumpReluAutoEncoder" else x - centre) @ W_enc + b_enc
        if kind == "GatedAutoEncoder":
            return (before + w["gate_bias"] > 0) * torch.relu(w["r_mag"].exp() * before + w["mag_bias"])
        positive = torch.relu(before)
        if kind == "AutoEncoderTopK":
            assert w["threshold"] < 0  # not set
            return keep_largest(positive, int(w["k"]))
        return positive if kind == "AutoEncoder" else positive * (positive > w["threshold"])

    return Read(config, w, encode, lambda f: f @ W_dec + centre)


def read_sparsify(folder: Path) -> Read:
    """sparsify: top-k of ReLU."""
    config, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    assert set(w) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    assert config["activation"] == "topk"
    assert not config["transcode"]
    assert w["encoder.weight"].shape == w["W_dec"].shape == (config["num_latents"], config["d_in"])

    def encode(x: Tensor) -> Tensor:
        positive = torch.relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
        return keep_largest(positive, config["k"])

    return Read(config, w, encode, lambda f: f @ w["W_dec"] + w["b_dec"])
