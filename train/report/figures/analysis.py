"""`training_analysis`: losses with their parts, gradients, dead latents, time, and what variants report beside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from train.report.figures.draw import (
    NO_LINES,
    averaged,
    bars_height,
    curves_height,
    group_bars,
    keys_of,
    learners_key,
    level_dashes,
    range_remark,
    seeds_remark,
    step_curve,
    step_curves,
    value_of,
)
from train.report.figures.shapes import Curve, Row
from train.report.figures.sheet import Axes, Sheet, title_of
from train.report.figures.study import Group, Study
from train.report.figures.training import FEW, LOSS

COMMON = {
    "step", "tokens", "loss", "explained_variance", "l0", "l1", "grad_norm", "grad_norm_max", "lr", "dead", "dense",
    "tokens_per_s", "wait_share",
}  # fmt: skip
FAMILIES = {  # keys that begin so and go on with a level or a dilation share a panel
    "omega_mean_": "Convolution ω by dilation: mean",
    "omega_std_": "Convolution ω by dilation: standard deviation",
    "omega_distance_": "Convolution ω by dilation: distance from identity",
    "threshold_": "Threshold θ by group",
    "dead_": "Dead latents by level, share",
    "l0_": "L0 by level",
    "sparsity_": "Sparsity loss by level",
}
ALONE = ("l0_weight",)  # keys that begin so by chance


def training_analysis(study: Study) -> Sheet:
    """See the module."""
    families = inner_families(study)
    convolved = any(opening.startswith("omega") for opening in families)
    inner = math.ceil((len(families) + (not convolved)) / 3)
    heights = [curves_height(study), bars_height(len(study.groups)) + 0.5, *[2.6] * inner]
    remark = f"{range_remark(study)} {seeds_remark(study)}".strip()
    sheet = Sheet("Training analysis", study.subtitle, [3.9] * 3, heights, remark)
    title = "Total loss with its parts" if len(study.groups) <= FEW else "Total loss"
    parts = loss_and_parts(sheet, sheet.panel(0, 0, title), study)
    axes = sheet.panel(0, 1, "Gradient norm: mean, largest (dotted)")
    curves = two_lines(sheet, axes, study, ("mean", "grad_norm"), ("largest", "grad_norm_max"))
    sheet.curves(axes, curves, "step", "norm before clipping", NO_LINES)
    axes = sheet.panel(0, 2, "Dead latents, dense ones (dotted)")
    curves = two_lines(sheet, axes, study, ("dead", "dead"), ("dense", "dense"))
    sheet.curves(axes, curves, "step", "share of latents", NO_LINES, zero=True)
    last_parts(sheet, sheet.panel(1, 0, "Parts of the loss in the last tenth"), study)
    axes = sheet.panel(1, 1, "Steps completed")
    steps, time = (lambda r: (float(r.steps), "")), (lambda r: (r.seconds or None, "not ended: no time yet"))
    group_bars(sheet, axes, study, steps, "steps", mark=asked, names=False, linear=True)
    axes = sheet.panel(1, 2, "Wall time of own steps")
    group_bars(sheet, axes, study, time, "seconds", names=False, linear=True)
    inside(sheet, study, families)
    if not convolved:
        why = "No learner here has logged a temporal convolution (variant multiscale does)"
        why += "." if families else ", and none reports anything else of its inside."
        sheet.nothing(sheet.panel(-1, slice(len(families) % 3, 3), "Temporal convolution"), why)
    learners_key(sheet, study, parts)
    return sheet


def asked(group: Group) -> float:
    """Steps asked for."""
    return float(group.records[0].asked)


def loss_and_parts(sheet: Sheet, axes: Axes, study: Study) -> list[str]:
    """Total loss of all, and thin lines for its parts where there are few learners: those that were drawn."""
    curves = step_curves(sheet, axes, study, "loss")
    parts = [key.removeprefix("loss_") for key in keys_of(study.groups, "loss_")]
    for group in study.groups:
        for name, dash in level_dashes(parts).items():
            curve = step_curve(sheet, axes, study, group, value_of(f"loss_{name}"), series=name, dash=dash, thin=True)
            curves += [curve] if len(study.groups) <= FEW else []
    sheet.curves(axes, curves, "step", LOSS, NO_LINES)
    return parts if len(study.groups) <= FEW else []


def two_lines(sheet: Sheet, axes: Axes, study: Study, first: tuple[str, str], second: tuple[str, str]) -> list[Curve]:
    """Of each group a solid line for one logged figure and a thin dotted one for another: (name, key) of each."""
    solid, dotted = (
        [
            step_curve(sheet, axes, study, group, value_of(key), series=name, dash=dash, thin=dash == "dotted")
            for group in study.groups
        ]
        for (name, key), dash in ((first, "solid"), (second, "dotted"))
    )
    return [*solid, *dotted]


def last_parts(sheet: Sheet, axes: Axes, study: Study) -> None:
    """Of each group the parts of its loss, as marks on one axis."""
    points: dict[str, list[tuple[int, float]]] = {}
    for place, group in enumerate(study.groups):
        for key in keys_of([group], "loss_"):
            found, name = averaged(group, value_of(key)), key.removeprefix("loss_")
            value = float(np.mean(found.mean[-max(len(found.mean) // 10, 1) :]))
            sheet.rows.append(Row(title_of(axes), group.label, x=name, value=value, n=max(found.n)))
            points.setdefault(name, []).append((place, value))
    labels = [group.label for group in study.groups]
    sheet.marks(axes, points, labels, [study.colours[label] for label in labels], LOSS, NO_LINES)


def inner_families(study: Study) -> dict[str, list[str]]:
    """What variants report beside the common figures: keys by what they begin with, convolutions first."""
    families: dict[str, list[str]] = {}
    for key in keys_of(study.groups):
        if key not in COMMON and not key.startswith("loss_"):
            opening = next((name for name in FAMILIES if key.startswith(name) and key not in ALONE), key)
            families.setdefault(opening, []).append(key)
    return dict(sorted(families.items(), key=lambda item: (not item[0].startswith("omega"), item[0])))


def inside(sheet: Sheet, study: Study, families: dict[str, list[str]]) -> None:
    """A panel for each family from the third row on: a line style for each of its levels."""
    for place, (opening, keys) in enumerate(families.items()):
        axes = sheet.panel(2 + place // 3, place % 3, FAMILIES.get(opening, opening.replace("_", " ")))
        dashes: dict[str, Any] = {"": "solid"}
        dashes |= level_dashes([level for level in (key.removeprefix(opening) for key in keys) if level])
        curves = [
            step_curve(sheet, axes, study, group, value_of(key), series=level, dash=dashes[level])
            for group in study.groups
            for key, level in ((key, key.removeprefix(opening)) for key in keys_of([group]) if key in keys)
        ]
        sheet.curves(axes, curves, "step", "as logged", NO_LINES)
        sheet.dashes(axes, {level.replace("_", " "): dash for level, dash in dashes.items() if level})
