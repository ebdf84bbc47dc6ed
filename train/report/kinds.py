"""Which learners are one kind, and what a kind is called."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Sequence

from common.errors import nearest
from common.files import difference
from train.report.points import Point


def kinds_by_name(points: Sequence[Point]) -> dict[str, list[list[Point]]]:
    """Kinds by a short name: their learners' own without k and seed, or the variant where these differ."""
    by_kind: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_kind[point.kind].append(point)
    by_name: dict[str, list[list[Point]]] = defaultdict(list)
    for kind, members in by_kind.items():
        stems = {stem_of(point.name) for point in members}
        by_name[stems.pop() if len(stems) == 1 else str(json.loads(kind)["variant"])].append(members)
    return by_name


def stem_of(name: str) -> str:
    """A learner's name without the parts that a grid adds for k and seed: `topk` of `topk-k16-seed0`."""
    return re.sub(r"-(?:k|seed)\d+(?:\.\d+)?(?=-|$)", "", name)


def says_k(name: str) -> bool:
    """Whether a learner's name has its k in it, as a grid's names do."""
    return re.search(r"-k\d", name) is not None


def numbered(same_name: dict[str, list[list[Point]]]) -> dict[str, list[Point]]:
    """Kinds by a name of their own: `topk-1` and `topk-2` where two are called `topk`."""
    kinds: dict[str, list[Point]] = {}
    for name, same in same_name.items():
        numbers = (f"{name}-{number}" for number in itertools.count(1))
        free = (own for own in numbers if own not in same_name)
        kinds |= {name: same[0]} if len(same) == 1 else dict(zip(free, same, strict=False))
    return kinds


def why_no_baseline(baseline: str, same_name: dict[str, list[list[Point]]], kinds: dict[str, list[Point]]) -> str:
    """What is wrong with a baseline that is no kind's own name."""
    if baseline not in same_name:
        return f"none of the learners is called so; give one of them with --baseline.{nearest(baseline, kinds)}"
    called = [name for name, members in kinds.items() if members in same_name[baseline]]
    settings = [json.loads(kinds[name][0].kind) for name in called]
    lines = [
        f"{called[0]} → {name}: {', '.join(difference(settings[0], other))}"
        for name, other in zip(called[1:], settings[1:], strict=True)
    ]
    return f"{len(called)} kinds of learners are called so: {'; '.join(lines)}. Choose one: {', '.join(called)}."
