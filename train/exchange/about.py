"""What other libraries want to know of an SAE beside its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import StoreError
from common.files import read_json
from common.models import layer_of
from train.saes.base import SAE


@dataclass(frozen=True)
class About:
    """Where an SAE comes from.

    Attributes:
        options: the variant's settings.
        groups: first and last latent + 1 of its levels or time scales, by name.
        model: hub name, or the last part of a local folder's path.
        layer: block of the hook; None for a hook outside the blocks.
        context: tokens per sequence it was trained on.
        bos: whether sequences begin with BOS.
        median_norm: of the training activations; None where it is not known.
        densities: share of tokens that each latent fires on; None where suite core was not run.
    """

    name: str
    variant: str
    options: dict[str, Any]
    groups: dict[str, tuple[int, int]]
    model: str
    revision: str | None
    hook: str
    layer: int | None
    context: int
    bos: bool
    corpus: str | None
    special_tokens: tuple[int, ...]
    training_steps: int
    training_tokens: int
    lr: float | None
    seed: int | None
    median_norm: float | None
    densities: tuple[float, ...] | None


def about_sae(folder: Path, sae: SAE) -> About:
    """What a learner's `sae/config.json` says.

    Raises:
        StoreError: it does not say where the SAE comes from.
    """
    path = folder / "sae" / "config.json"
    facts = read_json(path if path.exists() else folder / "config.json")
    try:
        hook, model = str(facts["hook"]), str(facts["model"])
        return About(
            name=folder.name,
            variant=sae.variant,
            options=facts["options"],
            groups={name: (place.start, place.stop) for name, place in sae.groups().items()},
            model=short(model),
            revision=facts.get("model_identity", {}).get("revision"),
            hook=hook,
            layer=layer_of(hook),
            context=int(facts["context"]),
            bos=bool(facts.get("bos", True)),  # runs of older versions do not say
            corpus=short(facts["corpus"]) if facts.get("corpus") else None,
            special_tokens=tuple(facts["special_tokens"]),
            training_steps=int(facts["training_steps"]),
            training_tokens=int(facts["training_tokens"]),
            lr=facts.get("lr"),
            seed=facts.get("seed"),
            median_norm=facts.get("median_norm"),
            densities=densities_of(folder),
        )
    except KeyError as error:
        raise StoreError(f"{path}: it lacks {error}, so it is not known what the SAE was trained on.") from None


def densities_of(folder: Path) -> tuple[float, ...] | None:
    """What suite core found on held-out or other text.

    Raises:
        StoreError: its file is damaged.
    """
    path = folder / "eval" / "core.json"
    if not path.exists():
        return None
    try:
        return tuple(float(latent["feature_density"]) for latent in read_json(path)["eval_result_details"])
    except (KeyError, TypeError, ValueError):
        raise StoreError(f"{path}: no result of suite core. Remove it, or run: train eval --suite core") from None


def short(name: str) -> str:
    """A name as it is, the last part of a local path: where a folder lies is nobody else's business."""
    return Path(name).name if Path(name).is_absolute() else name
