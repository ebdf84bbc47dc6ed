"""Colours of learners: the same ones whatever the order, and told apart by people who do not see all colours."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from train.report.palette import HUES, NEUTRAL, Style, colours, natural, shade, styles

# Viénot, Brettel and Mollon 1999: linear RGB as seen without the red or the green cones
SEEN = {
    "all": np.eye(3),
    "no red": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    "no green": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
}


def lab(colour: str, seen: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as somebody sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = SEEN[seen] @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(to_xyz @ linear, 0, None) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN)
def test_hues_are_told_apart_by_everybody(seen: str) -> None:
    distances = [np.linalg.norm(lab(a, seen) - lab(b, seen)) for a, b in itertools.combinations(HUES, 2)]
    assert min(distances) > 15  # a difference of 2.3 is just seen


def test_colours_do_not_depend_on_the_order_of_names() -> None:
    families = {"topk": ["topk"], "batchtopk": ["batchtopk"], "standard": ["standard"]}
    backwards = dict(reversed(families.items()))
    assert colours(families) == colours(backwards)
    assert colours(families)["batchtopk"] == HUES[0]
    assert styles(families) == styles(backwards)


def test_a_family_has_shades_of_one_hue() -> None:
    found = colours({"topk": ["topk-k8", "topk-k16", "topk-k32"], "batchtopk": ["batchtopk-k8"]})
    assert found["batchtopk"] == found["batchtopk-k8"] == HUES[0]
    assert found["topk-k16"] == found["topk"] == HUES[1]
    lightness = [lab(found[f"topk-k{k}"], "all")[0] for k in (8, 16, 32)]
    assert lightness[0] - lightness[1] > 10
    assert lightness[1] - lightness[2] > 10


def test_more_names_than_hues_differ_in_their_line() -> None:
    families: dict[str, list[str]] = {f"v{chr(97 + number)}": [] for number in range(2 * len(HUES) + 2)}
    drawn = {(colour, styles(families)[name].dash) for name, colour in colours(families).items()}
    assert len(drawn) == len(families)
    assert styles(families)["va"] == Style("solid", "o")
    assert styles(families)["vh"].dash == "dashed"


def test_names_are_ordered_as_numbers() -> None:
    assert sorted(["k16", "k8", "a", "k8-2"], key=natural) == ["a", "k8", "k8-2", "k16"]


def test_shades_go_from_light_to_dark_and_stay_colours() -> None:
    assert shade("#0072B2", 0, 1) == "#0072B2"
    assert shade("#0072B2", 1, 3) == "#0072B2"
    for hue in HUES:
        assert len({shade(hue, number, 5) for number in range(5)}) == 5
    assert lab(NEUTRAL, "all")[0] < 55  # 4.5 to 1 against white
