"""The variants. `REGISTRY` is the only list of them; the command line, the tests and the docs read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from common.config import build
from common.errors import ConfigError, StoreError, nearest
from common.files import read_json, write_file, write_json
from train.saes.base import SAE, SAEConfig
from train.saes.batchtopk import BatchTopK
from train.saes.compositional import Compositional
from train.saes.contrastive import Contrastive
from train.saes.gated import Gated
from train.saes.jumprelu import JumpReLU
from train.saes.matryoshka import Matryoshka
from train.saes.multiscale import MultiScale
from train.saes.panneal import PAnneal
from train.saes.predictor import Predictor
from train.saes.references import PCA, Identity, Mean
from train.saes.relational import Relational
from train.saes.standard import Standard
from train.saes.topk import TopK
from train.saes.tree import Tree

REGISTRY: dict[str, type[SAE]] = {
    sae.variant: sae
    for sae in (
        Standard,
        PAnneal,
        Gated,
        JumpReLU,
        TopK,
        BatchTopK,
        Matryoshka,
        Compositional,
        Tree,
        Relational,
        Contrastive,
        MultiScale,
        Predictor,
        Mean,
        PCA,
        Identity,
    )
}
WIDTH_FACTOR = 8  # default d_sae / d_model
MAX_WINDOW = 128


def variant_class(name: str) -> type[SAE]:
    """The class of a variant.

    Raises:
        ConfigError: unknown; with the nearest known name.
    """
    if name not in REGISTRY:
        raise ConfigError(f"unknown variant '{name}'.{nearest(name, REGISTRY)}")
    return REGISTRY[name]


def settle_config(
    variant: str, options: dict[str, Any], d_in: int, context: int, where: str, begun: bool = False
) -> SAEConfig:
    """A variant's settings with their defaults: 8 × d_model latents, and a window that fits `context` tokens.

    Args:
        begun: of a learner that was trained with them already: what has no effect is let be.

    Raises:
        ConfigError: unknown variant or option, a value that does not fit, or one that would have no effect.
    """
    config = variant_class(variant).Config
    window = min(config.model_fields["window"].default, context)
    settled = build(config, {"d_sae": WIDTH_FACTOR * d_in, "window": window} | options, where)
    if not begun:
        refuse_idle(settled, where)
    return settled


def refuse_idle(config: SAEConfig, where: str) -> None:
    """
    Raises:
        ConfigError: a setting is not its default and has no effect.
    """
    fields = type(config).model_fields
    values = {name: getattr(config, name) for name in fields}
    defaults = {name: field.get_default() for name, field in fields.items()}
    for wrong in (each.wrong(values, defaults) for each in config.idle()):
        if wrong is not None:
            raise ConfigError(f"{where}: {wrong}")


def make_sae(variant: str, options: dict[str, Any], d_in: int, seed: int, where: str, context: int = MAX_WINDOW) -> SAE:
    """A new SAE with its defaults settled; raises as `settle_config`."""
    return variant_class(variant)(settle_config(variant, options, d_in, context, where), d_in, seed)


def save_sae(sae: SAE, folder: Path, facts: dict[str, Any]) -> None:
    """Write `weights.safetensors` (float32, raw units) and `config.json`: architecture plus `facts`.

    Raises:
        StoreError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    write_file(folder / "weights.safetensors", save(tensors))
    write_json(folder / "config.json", sae.describe() | facts)


def load_sae(path: str | Path, device: str = "cpu") -> SAE:
    """Load a trained SAE: a learner's folder or its `sae/`; latents are in raw units.

    Raises:
        StoreError: no trained SAE there, or files that do not fit together.
    """
    path = Path(path).expanduser()
    folder = path / "sae" if (path / "sae" / "config.json").exists() else path
    if not (folder / "weights.safetensors").exists():
        raise StoreError(
            f"{path}: no trained SAE here (no config.json with weights.safetensors). Give a learner's folder."
        )
    facts = read_json(folder / "config.json")
    cls = variant_class(facts["variant"])
    sae = cls(build(cls.Config, facts["options"], str(folder)), facts["d_in"])
    try:
        sae.load_state_dict(load_file(folder / "weights.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise StoreError(f"{folder}: the weights do not fit config.json: {error}") from None
    return sae.to(device).eval().requires_grad_(False)
