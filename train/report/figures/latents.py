"""What latents do: how often they are active, what paths through them explain, what clamping them unlearns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from train.report.figures.draw import averaged_points, curves_height, learners_key
from train.report.figures.fronts import first_few
from train.report.figures.scales import LONGEST, shortened
from train.report.figures.shapes import Curve, Row
from train.report.figures.sheet import Axes, Sheet, title_of
from train.report.figures.study import Group, Study
from train.report.figures.training import FEW
from train.report.palette import NEUTRAL
from train.report.runs import Record

EDGES = np.linspace(-6, 0, 49)  # log10 of density
ASIDE = 0.15  # of the axis: room at its left for the share that is never active
SMALL = 0.01  # rise of the retain text's loss that a score allows


def latent_density(study: Study) -> Sheet:
    """A histogram of latents by density for each group, all on one axis."""
    drawn = [(group, found) for group in study.groups if (found := densities_of(group))]
    reasons = [r.missing("core") for group in study.groups for r in group.records if r.densities() is None]
    remark = "Height: share of the latents; each reaches its own top, seeds together. Dotted: dense, 10 %."
    heights = [max(1.1 + 0.42 * len(drawn), 2.2)]
    sheet = Sheet("Latent density", study.subtitle, [8.5], heights, remark)
    axes = sheet.panel(0, 0, "Latents by density")
    if not drawn:
        sheet.nothing(axes, first_few(reasons))
        return sheet
    rarest = min(float(values[values > 0].min(initial=1.0)) for _, found in drawn for values in found)
    left = max(min(math.floor(math.log10(rarest)), -1), EDGES[0])
    for place, (group, found) in enumerate(reversed(drawn)):
        ridge(sheet, axes, group, found, study.colours[group.label], place, left)
    axes.set_yticks(range(len(drawn)), [shortened(group.label, LONGEST) for group, _ in reversed(drawn)])
    axes.tick_params(axis="y", length=0)
    axes.axvline(-1, color=NEUTRAL, linestyle="dotted", linewidth=1)
    axes.set_xlim(left - ASIDE * -left, 0)
    axes.set_ylim(-0.15, len(drawn) + 0.1)
    axes.set_xticks(range(int(left), 1), [f"$10^{{{power}}}$" for power in range(int(left), 1)])
    sheet.label(axes, "density: share of tokens on which a latent is active (log scale)", "")
    if reasons:
        sheet.rows.append(Row(title_of(axes), "", note=first_few(reasons)))
    return sheet


def densities_of(group: Group) -> list[np.ndarray]:
    """The latents' densities of each seed that has them."""
    return [found for record in group.records if (found := record.densities()) is not None]


def ridge(
    sheet: Sheet, axes: Axes, group: Group, found: Sequence[np.ndarray], colour: str, place: int, left: float
) -> None:
    """One histogram standing on its line from `left` on, and the share that is never active before it."""
    densities = np.concatenate(found)
    alive = densities[densities > 0]
    counts, _ = np.histogram(np.log10(np.clip(alive, 10 ** EDGES[0], 1)), EDGES)
    shares, dead = counts / len(densities), 1 - len(alive) / len(densities)
    heights = 0.9 * shares / max(shares.max(), 1e-12)
    axes.stairs(heights + place, EDGES, baseline=place, fill=True, color=colour, alpha=0.75)
    axes.hlines(place, left, EDGES[-1], color="#BBBBBB", linewidth=0.6)
    axes.annotate(f"dead {dead:.1%}", (left, place + 0.12), fontsize=7.5, color=NEUTRAL, ha="right")
    n, title = len(found), title_of(axes)
    sheet.rows.append(Row(title, group.label, x=0.0, value=float(dead), n=n, note="never active"))
    sheet.rows += [
        Row(title, group.label, x=float(10**edge), value=float(share), n=n, note="from x to the next x")
        for edge, share in zip(EDGES[:-1], shares, strict=True)
    ]


def faithfulness(study: Study) -> Sheet:
    """Cross-entropy and divergence with the strongest paths alone, against how many are kept."""
    remark = "Solid: the paths of largest attribution; dotted: as many at random. Means over seeds."
    sheet = Sheet("Faithfulness of path attribution", study.subtitle, [4.4] * 2, [curves_height(study)], remark)
    panels: dict[str, tuple[str, str, str]] = {
        "Cross-entropy above the model's own": ("ce", "random_ce", "nats per token"),
        "KL divergence from the model": ("kl", "random_kl", "nats per token"),
    }
    for column, (title, (own, random, unit)) in enumerate(panels.items()):
        axes, curves, reasons = sheet.panel(0, column, title), [], []
        for group in study.groups:
            for key, dash, series in ((own, study.styles[group.label].dash, ""), (random, "dotted", "random")):
                found = averaged_points([kept_curve(record, key) for record in group.records])
                name = f"{group.label} {series}".strip()
                for x, mean, n in zip(found.x, found.mean, found.n, strict=True):
                    sheet.rows.append(Row(title, name, "", x, mean, n=n))
                curves.append(
                    Curve(name, study.colours[group.label], found.x, found.mean, dash=dash, thin=bool(series))
                )
            reasons += [why_no_curve(record) for record in group.records if not kept_curve(record, own)]
        sheet.curves(axes, curves, "paths kept per token", unit, first_few(reasons), zero=True)
        if any(curve.x for curve in curves):
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    learners_key(sheet, study)
    return sheet


def kept_curve(record: Record, key: str) -> list[tuple[float, float]]:
    """(paths kept, figure) of a hierarchy evaluation; cross-entropies are taken above the model's own."""
    points = record.table("hierarchy", "faithfulness", "kept", key)
    zero = record.part("hierarchy", "faithfulness_model", dict).get("ce", 0.0) if key.endswith("ce") else 0.0
    return [(float(point["kept"]), float(point[key]) - zero) for point in points]


def why_no_curve(record: Record) -> str:
    """Why a learner has no faithfulness curve."""
    found = record.evaluations.get("hierarchy")
    if found is None:
        return record.missing("hierarchy")
    return str(found.get("reasons", {}).get("path_recovered", f"eval/hierarchy.json of {record.name} has no curve"))


def unlearning_pareto(study: Study) -> Sheet:
    """What clamping latents costs the text to keep, against what it does to the text to forget."""
    remark = "Lines: Pareto fronts. Of few learners also settings (dots) and controls (crosses). Dotted: 1 %."
    height = max(4.0, curves_height(study))
    sheet = Sheet("Unlearning", study.subtitle, [4.8] * 2, [height], remark)
    pareto(sheet, sheet.panel(0, 0, "Rise of the loss, forget against retain"), study, LOSSES)
    pareto(sheet, sheet.panel(0, 1, "SAEBench: questions no longer right"), study, QUESTIONS)
    learners_key(sheet, study)
    return sheet


@dataclass(frozen=True)
class Protocol:
    """How `train unlearn` wrote a trade-off.

    Attributes:
        column: a figure's name, with {} for the text.
        harm: from that figure to what is drawn, in `unit`.
    """

    suite: str
    column: str
    harm: Callable[[float], float]
    unit: str


LOSSES = Protocol("unlearn", "relative_{}", lambda rise: rise, "relative rise of the loss")
QUESTIONS = Protocol("unlearn-saebench", "accuracy_{}", lambda right: 1 - right, "share no longer right")


def pareto(sheet: Sheet, axes: Axes, study: Study, protocol: Protocol) -> None:
    """Settings and their front for each learner."""
    retain, forget = protocol.column.format("retain"), protocol.column.format("forget")
    treated = [(g, r) for g in study.groups for r in g.records if protocol.suite in r.evaluations]
    few = len(treated) <= FEW
    for group, record in treated:
        for kind in ("settings", "controls", "pareto"):
            rows = record.table(protocol.suite, kind, retain, forget)
            points = sorted((protocol.harm(row[retain]), protocol.harm(row[forget])) for row in rows)
            sheet.rows += [Row(title_of(axes), group.label, record.name, *point, note=kind) for point in points]
            if points and (few or kind == "pareto"):
                draw_points(axes, study, group, kind, points, few)
    if not axes.lines:
        without = [r for g in study.groups for r in g.records if protocol.suite not in r.evaluations]
        reasons = [why_not_unlearnt(record, protocol.suite) for record in without]
        return sheet.nothing(axes, first_few(reasons or ["nothing was clamped"]))
    frame_pareto(sheet, axes, protocol.unit)
    return None


def draw_points(
    axes: Axes, study: Study, group: Group, kind: str, points: Sequence[tuple[float, float]], few: bool
) -> None:
    """The front as a line, with markers where there are `few` learners; settings and controls as faint marks."""
    colour, style = study.colours[group.label], study.styles[group.label]
    x, y = [point[0] for point in points], [point[1] for point in points]
    if kind == "pareto":
        marker = style.marker if few or len(points) == 1 else ""
        axes.plot(x, y, color=colour, linestyle=style.dash, marker=marker, markersize=4)
    else:
        axes.plot(x, y, "." if kind == "settings" else "x", color=colour, markersize=4, alpha=0.35)


def frame_pareto(sheet: Sheet, axes: Axes, unit: str) -> None:
    """Axes that show what is near 0 and what is far, and the harm to the text to keep that a score allows."""
    places = np.concatenate([line.get_xydata() for line in axes.lines])
    axes.axvline(SMALL, color=NEUTRAL, linestyle="dotted", linewidth=1)
    axes.set_xscale("symlog", linthresh=SMALL)
    axes.set_yscale("symlog", linthresh=SMALL)
    for across, limits in ((0, axes.set_xlim), (1, axes.set_ylim)):
        reached = places[:, across]
        limits(min(reached.min() * 1.2, -SMALL / 5), max(reached.max(), SMALL) * 1.5)  # room for whole marks
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.3g}")
    sheet.label(axes, f"retain: {unit}, symmetric log", f"forget: {unit}, symmetric log")


def why_not_unlearnt(record: Record, suite: str) -> str:
    """Why a learner has no such file."""
    if record.state != "finished":
        return record.missing(suite)
    more = "--data FOLDER" if suite.endswith("saebench") else "--forget TEXT --retain TEXT"
    return f"no eval/{suite}.json: train unlearn {record.run} {more}"
