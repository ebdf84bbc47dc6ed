"""What is had at which sparsity: fronts of L0 with explained variance, cross-entropy and temporal consistency."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.report.figures.draw import averaged_points, kinds_key, learners_key
from train.report.figures.shapes import Curve, Row
from train.report.figures.sheet import Axes, Sheet, title_of
from train.report.figures.study import Group, Read, Study, Summary, figure_of, summary
from train.report.runs import Record

BASELINES = ("batchtopk", "topk", "standard")  # flat variants whose curves have a band
REFERENCES = ("mean", "pca", "identity")  # not trained: they do not set the scale of an axis
REMARK = (
    "Points: means over seeds. Bars, and bands of flat baselines: 95 % intervals over seeds, or one seed's documents."
)
HEIGHT = 4.2
SPREAD = 1.5  # L0s that differ by more than this factor have a logarithmic axis


def l0_fronts(study: Study) -> Sheet:
    """Explained variance and cross-entropy score against L0."""
    sheet = fronts_sheet(study, "Fronts: what is kept at which L0", 2)
    axes = sheet.panel(0, 0, "Explained variance, held-out documents")
    l0 = figure_of("heldout", "l0")
    kinds = front(sheet, axes, study, l0, "heldout", "explained_variance", "explained variance")
    axes = sheet.panel(0, 1, "Cross-entropy loss score, SAE in the model")
    l0 = figure_of("core", "l0")
    kinds |= front(sheet, axes, study, l0, "core", "ce_loss_score", "score, 1: as the clean model")
    kinds_key(sheet, study, kinds)
    return sheet


def temporal_consistency(study: Study) -> Sheet:
    """ρ(8) at equal density against L0, ρ over lags, and ρ(8) of levels and time scales."""
    sheet = fronts_sheet(study, "Temporal consistency", 3)
    axes = sheet.panel(0, 0, "Temporal consistency ρ(8) against L0")
    l0 = figure_of("temporal", "l0")
    front(sheet, axes, study, l0, "temporal", "matched_rho_8", "correlation over 8 tokens, density-matched")
    over_lags(sheet, sheet.panel(0, 1, "Correlation by lag (dotted: null)"), study)
    of_levels(sheet, sheet.panel(0, 2, "ρ(8) by level, density-matched"), study)
    learners_key(sheet, study)
    return sheet


def fronts_sheet(study: Study, title: str, columns: int) -> Sheet:
    """Panels beside each other."""
    height = max(HEIGHT, 0.19 / 2 * (len(study.groups) + 4))
    return Sheet(title, study.subtitle, [4.4] * columns, [height], REMARK)


@dataclass(frozen=True)
class Place:
    """A group's point of a front."""

    group: Group
    x: float
    y: Summary


def front(sheet: Sheet, axes: Axes, study: Study, l0: Read, suite: str, name: str, unit: str) -> set[str]:
    """A curve for each kind over the L0s that its learners have; the kinds in sight."""
    reasons, drawn = [], []
    for kind, groups in study.kinds().items():
        places = []
        for group in groups:
            x, y = summary(group, l0), summary(group, figure_of(suite, name), suite, name)
            reasons.append(y.reason or x.reason)
            sheet.rows.append(
                Row(title_of(axes), group.label, "", x.value, y.value, y.low, y.high, len(y.each), reasons[-1])
            )
            if x.value and y.value is not None:
                places.append(Place(group, x.value, y))
        if places:
            drawn.append(sorted(places, key=lambda place: place.x))
            draw_front(axes, study, kind, drawn[-1])
    if not drawn:
        sheet.nothing(axes, "; ".join(dict.fromkeys(filter(None, reasons))), row=False)
        return set()
    sheet.label(axes, "L0, latents active per token", unit)
    return fit_to_trained(axes, [place for places in drawn for place in places])


def draw_front(axes: Axes, study: Study, kind: str, places: Sequence[Place]) -> None:
    """Points of one kind with their intervals, joined; a band where it is a flat baseline."""
    colour, style = study.colours[kind], study.styles[kind]
    x, y = [place.x for place in places], [place.y.value or 0.0 for place in places]
    low = [v if (v := place.y.low) is not None else place.y.value or 0.0 for place in places]
    high = [v if (v := place.y.high) is not None else place.y.value or 0.0 for place in places]
    errors = [np.subtract(y, low), np.subtract(high, y)]
    axes.errorbar(
        x, y, yerr=errors, color=colour, linestyle=style.dash, marker=style.marker, markersize=5, linewidth=1.4,
        elinewidth=1.0, capsize=2, alpha=0.95,
    )  # fmt: skip
    if places[0].group.records[0].variant in BASELINES:
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def fit_to_trained(axes: Axes, places: Sequence[Place]) -> set[str]:
    """Scale the axes by trained variants, and tell which references lie outside; the kinds that lie inside."""
    trained = [place for place in places if place.group.records[0].variant not in REFERENCES] or list(places)
    left, right = min(place.x for place in trained), max(place.x for place in trained)
    if right > SPREAD * left:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(f"{axes.get_xlabel()} (log scale)")
    axes.set_xlim(left / 1.12, right * 1.12)
    values = [v for place in trained for v in (place.y.value, place.y.low, place.y.high) if v is not None]
    room = 0.12 * max(max(values) - min(values), 0.02)
    low, high = min(values) - room, max(values) + room
    axes.set_ylim(low, high)
    inside = [p for p in places if low <= (p.y.value or 0.0) <= high and left / 1.12 <= p.x <= right * 1.12]
    outside = [f"{p.group.label} ({p.x:.3g}, {p.y.value:.3g})" for p in places if p not in inside]
    if outside:
        axes.set_xlabel("\n".join([axes.get_xlabel(), *textwrap.wrap(f"outside: {', '.join(outside)}", 62)]))
    return {place.group.kind for place in inside}


def over_lags(sheet: Sheet, axes: Axes, study: Study) -> None:
    """ρ(τ), mass-weighted, and what pairs of different documents give."""
    curves, reasons = [], []
    for group in study.groups:
        reasons += [record.missing("temporal") for record in group.records if "temporal" not in record.evaluations]
        for key, dash, series in (("rho", study.styles[group.label].dash, ""), ("null", "dotted", "null")):
            found = averaged_points([by_lag(record, key) for record in group.records])
            name = f"{group.label} {series}".strip()
            sheet.rows += [
                Row(title_of(axes), name, "", lag, mean, n=n)
                for lag, mean, n in zip(found.x, found.mean, found.n, strict=True)
            ]
            curves.append(
                Curve(name, study.colours[group.label], found.x, found.mean, dash=dash, thin=series == "null")
            )
    sheet.curves(axes, curves, "lag, tokens", "ρ, weighted by activation mass", first_few(reasons), zero=True)
    if any(curve.x for curve in curves):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def by_lag(record: Record, key: str) -> list[tuple[float, float]]:
    """(lag, figure) of a temporal evaluation, those that there are."""
    curve: dict[str, list[Any]] = record.part("temporal", "curve", dict)
    pairs = zip(curve.get("lags", []), curve.get(key, []), strict=False)
    return [(float(lag), float(value)) for lag, value in pairs if value is not None and math.isfinite(value)]


def of_levels(sheet: Sheet, axes: Axes, study: Study) -> None:
    """A mark for each level or time scale of a group, the mean over its seeds."""
    points: dict[str, list[tuple[int, float]]] = {}
    labels: list[str] = []
    hues: list[str] = []
    for group in study.groups:
        found: dict[str, list[float]] = {}
        for record in group.records:
            for level, figures in record.part("temporal", "groups", dict).items():
                if figures.get("matched_rho_8") is not None:
                    found.setdefault(level, []).append(float(figures["matched_rho_8"]))
        for level, values in found.items():
            mean = float(np.mean(values))
            sheet.rows.append(Row(title_of(axes), group.label, x=level, value=mean, n=len(values)))
            points.setdefault(level, []).append((len(labels), mean))
        labels += [group.label] if found else []
        hues += [study.colours[group.label]] if found else []
    why = "No learner with levels or time scales has an eval/temporal.json that holds them to a baseline."
    sheet.marks(axes, points, labels, hues, "correlation over 8 tokens", why)


def first_few(reasons: Sequence[str]) -> str:
    """Different reasons, once each."""
    return "; ".join(dict.fromkeys(reasons)) or "no data"
