"""Reading a SAELens folder: `cfg.json` and `sae_weights.safetensors`, of version 6 or with the flat keys before it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import ConfigError, StoreError
from common.files import read_json
from train.saes.affine import Activation, AffineForm

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
KINDS: dict[str, tuple[Activation, tuple[str, ...]]] = {
    "standard": ("relu", ("b_enc",)),
    "topk": ("topk", ("b_enc",)),
    "jumprelu": ("jumprelu", ("b_enc", "threshold")),
    "gated": ("gated", ("b_gate", "r_mag", "b_mag")),
}
NOT_FOLDED = (
    "the weights expect inputs that were scaled by what the folder does not hold. Fold it into them with SAELens "
    "(fold_activation_norm_scaling_factor, fold_activation_whitening) and save the SAE again."
)
NORMALISED = "each token is normalised on its own before it is encoded, which no variant here does."
NORMALISATIONS = {
    "expected_average_only_in": NOT_FOLDED,
    "covariance_whitening": NOT_FOLDED,
    "constant_norm_rescale": NORMALISED,
    "layer_norm": NORMALISED,
}


NAMES: dict[type, str] = {str: "text", int: "a whole number", bool: "true or false", dict: "a table"}
METADATA: dict[str, type] = {
    "model_name": str,
    "hook_name": str,
    "context_size": int,
    "prepend_bos": bool,
    "training_tokens": int,
    "granary": dict,
}


@dataclass(frozen=True)
class Published:
    """A published SAE.

    Attributes:
        form: raw units, unit decoder rows.
        model, hook, context, bos: what it was trained on; None where the folder does not say.
    """

    form: AffineForm
    architecture: str
    model: str | None
    hook: str | None
    context: int | None
    bos: bool | None
    training_tokens: int | None


def read_published(path: Path) -> Published:
    """The SAE of a SAELens folder.

    Raises:
        StoreError: files are missing or damaged, or do not fit together.
        ConfigError: it computes something that no variant here does.
    """
    config = read_config(path / CONFIG_FILE)
    architecture = config["architecture"]
    if architecture not in KINDS:
        raise ConfigError(f"{path}: architecture '{architecture}' cannot be imported; {', '.join(KINDS)} can.")
    normalised = config.get("normalize_activations") or "none"
    if normalised != "none":
        why = NORMALISATIONS.get(normalised, "it is not known what that does.")
        raise ConfigError(f"{path}: normalize_activations = {normalised!r}: {why}")
    form = form_of(path, config, read_weights(path / WEIGHTS_FILE, config, path))
    about, ours = config["metadata"], config["metadata"].get("granary") or {}
    return Published(
        form=form,
        architecture=architecture,
        model=about.get("model_name"),
        hook=about.get("hook_name"),
        context=about.get("context_size"),
        bos=about.get("prepend_bos"),
        training_tokens=about.get("training_tokens") or ours.get("training_tokens"),
    )


def read_config(path: Path) -> dict[str, Any]:
    """`cfg.json` with the keys of version 6.

    Raises:
        StoreError: missing, not JSON, or without the sizes.
    """
    if not path.exists():
        raise StoreError(f"{path}: no such file. A SAELens folder has {CONFIG_FILE} and {WEIGHTS_FILE}.")
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("metadata", {}), dict):
        raise StoreError(f"{path}: not the settings of an SAE.")
    if "metadata" not in config:
        config = from_flat(config, path)
    for key in ("d_in", "d_sae"):
        size = config.get(key)
        if not isinstance(size, int) or size < 1:
            raise StoreError(f"{path}: {key} = {size!r}; a number of at least 1 is needed.")
    if not isinstance(config.get("architecture"), str):
        raise StoreError(f"{path}: it does not say its architecture.")
    refuse_other_types(config, {"normalize_activations": str}, path)
    refuse_other_types(config["metadata"], METADATA, path)
    return dict(config)


def refuse_other_types(values: dict[str, Any], types: dict[str, type], path: Path) -> None:
    """Raises:
    StoreError: one of the values is there and of another type than all versions write.
    """
    for key, expected in types.items():
        value = values.get(key)
        if expected is int and isinstance(value, float) and value.is_integer():
            continue  # 1e9 for a number of tokens
        if value is not None and type(value) is not expected:
            raise StoreError(f"{path}: {key} = {value!r}; {NAMES[expected]} is needed.")


def from_flat(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings as versions before 6 wrote them, all side by side.

    Raises:
        ConfigError: an activation function that no variant here has.
    """
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation not in ("relu", "topk"):
        raise ConfigError(f"{path}: activation function '{activation}' cannot be imported; relu and topk can.")
    normalised = config.get("normalize_activations")
    if isinstance(normalised, bool):
        normalised = "expected_average_only_in" if normalised else "none"
    refuse_other_types(config, {"activation_fn_kwargs": dict}, path)
    about = dict(config) | {"hook_name": config.get("hook_name", config.get("hook_point"))}
    return {
        "d_in": config.get("d_in"),
        "d_sae": config.get("d_sae"),
        "architecture": "topk" if activation == "topk" else config.get("architecture", "standard"),
        "k": (config.get("activation_fn_kwargs") or {}).get("k"),
        "apply_b_dec_to_input": config.get("apply_b_dec_to_input", True),
        "normalize_activations": normalised,
        "metadata": about,
    }


def read_weights(path: Path, config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The architecture's tensors in float32, of the sizes that the settings say.

    Raises:
        StoreError: missing, damaged, more or fewer than the architecture has, of other shapes, or not finite.
        ConfigError: the reconstruction is scaled by factors of its own.
    """
    if not path.exists():
        raise StoreError(f"{path}: no such file. Weights are read from safetensors alone.")
    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(f"{path}: no safetensors file: {error}") from None
    scaling = found.pop("scaling_factor", found.pop("finetuning_scaling_factor", torch.ones(1)))
    if not bool((scaling == 1).all()):
        raise ConfigError(f"{folder}: it scales its latents by factors of its own, which no variant here does.")
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys(KINDS[config["architecture"]][1], (d_sae,))
    if found.keys() != shapes.keys():
        raise StoreError(
            f"{path}: it holds {', '.join(sorted(found))}; {config['architecture']} has {', '.join(sorted(shapes))}."
        )
    for name, shape in shapes.items():
        if tuple(found[name].shape) != shape:
            raise StoreError(f"{path}: {name} is {list(found[name].shape)}, {CONFIG_FILE} says {list(shape)}.")
        never = found[name] == torch.inf if name == "threshold" else torch.zeros((), dtype=torch.bool)
        if not bool((found[name].isfinite() | never).all()):
            raise StoreError(f"{path}: {name} is not finite.")
    return {name: value.float() for name, value in found.items()}


def form_of(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> AffineForm:
    """The weights with unit decoder rows.

    Raises:
        StoreError: no k, or one that does not fit.
        ConfigError: top-k by decoder norms that cannot be folded.
    """
    activation = KINDS[config["architecture"]][0]
    k = config.get("k") if activation == "topk" else None
    if activation == "topk" and (not isinstance(k, int) or not 1 <= k <= config["d_sae"]):
        raise StoreError(f"{path / CONFIG_FILE}: k = {k!r}; topk needs one from 1 to d_sae = {config['d_sae']}.")
    form = AffineForm(
        W_enc=weights["W_enc"],
        b_enc=weights["b_gate" if activation == "gated" else "b_enc"],
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
        activation=activation,
        centred=bool(config.get("apply_b_dec_to_input", True)),
        k=k,
        threshold=weights.get("threshold"),
        r_mag=weights.get("r_mag"),
        b_mag=weights.get("b_mag"),
    )
    if activation == "topk" and config.get("rescale_acts_by_decoder_norm"):
        form = form.with_rows_divided(norms_of(form.W_dec))  # the k largest are chosen with the norms in
    if form.threshold is not None:
        form = dataclasses.replace(form, threshold=form.threshold.clamp_min(0))  # below 0 it is a plain ReLU
    try:
        return form.with_unit_rows()
    except ValueError as error:
        raise ConfigError(f"{path}: {error}. Train or save it with rescale_acts_by_decoder_norm.") from None


def norms_of(rows: Tensor) -> Tensor:
    """Their norms; 1 where there is nothing to divide."""
    norms = rows.norm(dim=-1)
    return torch.where(norms > 0, norms, torch.ones_like(norms))
