"""What is shown to raters: a sample of latents of each learner, from `eval/latents.json`, told apart by nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError, StoreError
from common.files import read_json

N_CONTEXTS = 10


@dataclass(frozen=True)
class Item:
    """One latent to be scored.

    Attributes:
        learner: `<run>/<learner>`; never sent to the page.
        latent: its number; never sent either.
        contexts: [{"tokens": [text], "values": [0 to 1], "peak": place}], the strongest first.
        promoted: tokens that its decoder row makes likelier; of all items or of none.
    """

    learner: str
    latent: int
    contexts: tuple[dict[str, Any], ...]
    promoted: tuple[str, ...]

    def shown(self) -> dict[str, Any]:
        """What the page gets: nothing that tells the learner (groups, scale and density differ by variant)."""
        return {"contexts": list(self.contexts), "promoted": list(self.promoted)}


def read_items(learners: Sequence[Path], per_learner: int, seed: int) -> list[Item]:
    """A seeded sample of each learner's latents, learner by learner.

    Raises:
        StoreError: a learner without eval/latents.json, or one that is damaged.
        ConfigError: two learners that answers could not tell apart.
        DataError: no latent to rate at all.
    """
    refuse_namesakes(learners)
    items: list[Item] = []
    for folder in learners:
        path = folder / "eval" / "latents.json"
        if not path.exists():
            raise StoreError(f"{folder}: no eval/latents.json to rate from. Run: train eval {folder} --suite latents")
        try:
            found = [item_of(learner_name(folder), latent) for latent in read_json(path)["latents"]]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{path}: not a result of suite latents ({type(error).__name__}: {error}). "
                f"Run: train eval {folder} --suite latents"
            ) from None
        shown = [item for item in found if item.contexts]
        items += random.Random(f"{seed} {learner_name(folder)}").sample(shown, min(per_learner, len(shown)))
    if not items:
        raise DataError("none of these learners has a latent that was ever active, so there is nothing to rate.")
    return alike(items)


def alike(items: list[Item]) -> list[Item]:
    """The items, without promoted tokens unless all have them: those who have would be told from those who have not."""
    return items if all(item.promoted for item in items) else [replace(item, promoted=()) for item in items]


def refuse_namesakes(learners: Sequence[Path]) -> None:
    """Raises:
    ConfigError: two of the learners have one name, so that answers would be of both.
    """
    known: dict[str, Path] = {}
    for folder in learners:
        name = learner_name(folder)
        if name in known:
            raise ConfigError(
                f"{known[name]} and {folder} are both {name}, under which answers are kept. "
                "Name each learner once; rename one run's folder if they are two."
            )
        known[name] = folder


def learner_name(folder: Path) -> str:
    """`<run>/<learner>`, which answers are kept under."""
    whole = folder.resolve()
    return f"{whole.parent.name}/{whole.name}"


def item_of(learner: str, latent: dict[str, Any]) -> Item:
    """An item from an entry of eval/latents.json, activations as shares of the latent's largest."""
    largest = float(latent["max"]) or 1.0
    contexts = tuple(
        {
            "tokens": [str(token) for token in context["tokens"]],
            "values": [max(0.0, min(1.0, float(value) / largest)) for value in context["values"]],
            "peak": int(context["peak"]),
        }
        for context in latent["contexts"][:N_CONTEXTS]
    )
    return Item(learner, int(latent["index"]), contexts, tuple(str(token) for token, _ in latent["promoted"] or ()))


def order_for(rater: str, items: Sequence[Item], seed: int) -> list[Item]:
    """The items in an order of this rater's own, the same at every start."""
    shuffled = list(items)
    random.Random(f"{seed} {rater}").shuffle(shuffled)
    return shuffled
