"""What the page's scripts draw, as small as it can be: curves, and latents with each token's text once."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from train.report.gather import table

MOST_POINTS = 400  # of a curve: more than a screen has room for
DIGITS = 4


def for_script(value: Any) -> str:
    """JSON that may stand inside of a `<script>`: nothing in it can end the element or open another."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")


def pack_curves(lines: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Logged figures by name, `step` among them, a value for each line kept; null where a line has none."""
    stride = max(math.ceil(len(lines) / MOST_POINTS), 1)
    kept = list(reversed(list(reversed(lines))[::stride]))  # the last one always
    names = dict.fromkeys(key for line in kept for key, value in line.items() if is_number(value))
    return {name: [short(line.get(name)) for line in kept] for name in names}


def pack_latents(found: dict[str, Any]) -> dict[str, Any]:
    """`eval/latents.json` with texts as numbers of a list and activations as pairs of place and value.

    Of each latent: index, group, density, mean, max, histogram [low, high, counts], neighbours, promoted, suppressed,
    contexts [document, activation, peak, texts, pairs].

    Raises:
        ValueError, KeyError, TypeError: not what suite latents writes.
    """
    texts: dict[str, int] = {}

    def numbers(tokens: Sequence[Any]) -> list[int]:
        return [texts.setdefault(str(token), len(texts)) for token in tokens]

    latents = []
    for latent in found["latents"]:
        histogram = latent["histogram"]
        edges, counts = [float(edge) for edge in histogram["edges"]], [int(count) for count in histogram["counts"]]
        contexts = [
            [str(c["document"]), short(c["activation"]), int(c["peak"]), numbers(c["tokens"]), pairs(c["values"])]
            for c in latent["contexts"]
        ]
        latents.append(
            [
                int(latent["index"]),
                None if latent["group"] is None else str(latent["group"]),
                *(number(latent[name]) for name in ("density", "mean", "max")),
                [edges[0], edges[-1], counts],
                [[int(index), number(cosine)] for index, cosine in latent["neighbours"]],
                *(tokens_with_logits(latent[name]) for name in ("promoted", "suppressed")),
                contexts,
            ]
        )
    return {"texts": list(texts), "latents": latents, "reasons": reasons(found)}


def tokens_with_logits(found: Any) -> list[list[Any]] | None:
    return None if found is None else [[str(token), number(logit)] for token, logit in found]


def reasons(found: dict[str, Any]) -> dict[str, str]:
    """Why there are no promoted tokens or no texts."""
    return {key: str(reason) for key, reason in table(found.get("reasons")).items() if key in ("promoted", "text")}


def pairs(values: Sequence[Any]) -> list[float]:
    """Place and value of what is not 0, one after the other."""
    return [item for place, value in enumerate(values) if number(value) for item in (place, number(value))]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> float:
    """A finite number, or a ValueError."""
    if not is_number(value):
        raise ValueError(f"a number was expected, not {value!r}")
    return value


def short(value: Any) -> float | None:
    """To four digits; None for what is no finite number."""
    return float(f"{value:.{DIGITS}g}") if is_number(value) else None
