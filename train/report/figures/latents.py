"""What latents do: how often they are active, what paths through them explain, what clamping them unlearns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from train.report.figures.draw import averaged_points, curves_height, key_width, learners_key
from train.report.figures.fronts import first_few
from train.report.figures.scales import shortened
from train.report.figures.shapes import Curve, Row
from train.report.figures.sheet import Axes, Sheet, title_of
from train.report.figures.study import Group, Study
from train.report.figures.training import FEW
from train.report.palette import NEUTRAL
from train.report.runs import Record

EDGES = np.linspace(-6, 0, 49)  # log10 of density
SMALL = 0.01  # rise of the retain text's loss that a score allows


def latent_density(study: Study) -> Sheet:
    """A histogram of latents by density for each group, all on one axis."""
    heights = [max(1.1 + 0.42 * len(study.groups), 2.2)]
    remark = "Height: share of the latents; seeds together. Left: share that is never active. Dotted: dense, 10 %."
    sheet = Sheet("Latent density", study.subtitle, [8.5], heights, remark)
    axes = sheet.panel(0, 0, "Latents by density")
    reasons, drawn = [], []
    for group in study.groups:
        densities = [found for record in group.records if (found := record.densities()) is not None]
        reasons += [record.missing("core") for record in group.records if record.densities() is None]
        if densities:
            drawn.append((group, np.concatenate(densities)))
    if not drawn:
        sheet.nothing(axes, first_few(reasons))
        return sheet
    for place, (group, values) in enumerate(drawn):
        ridge(sheet, axes, study, group, values, len(drawn) - 1 - place)
    labels = [shortened(group.label, 26) for group, _ in reversed(drawn)]
    axes.set_yticks(range(len(drawn)), labels)
    axes.tick_params(axis="y", length=0)
    axes.axvline(-1, color=NEUTRAL, linestyle="dotted", linewidth=1)
    axes.set_xlim(EDGES[0] - 0.9, 0)
    axes.set_ylim(-0.15, len(drawn) + 0.1)
    axes.set_xticks(range(-6, 1), [f"$10^{{{power}}}$" for power in range(-6, 1)])
    sheet.label(axes, "density: share of tokens on which a latent is active (log scale)", "")
    left_out = first_few(reasons) if reasons else ""
    if left_out:
        sheet.rows.append(Row(title_of(axes), "", note=left_out))
    return sheet


def ridge(sheet: Sheet, axes: Axes, study: Study, group: Group, densities: np.ndarray, place: int) -> None:
    """One histogram standing on its line."""
    alive = densities[densities > 0]
    counts, _ = np.histogram(np.log10(np.clip(alive, 10 ** EDGES[0], 1)), EDGES)
    shares, dead = counts / len(densities), 1 - len(alive) / len(densities)
    heights = 0.9 * shares / max(shares.max(), 1e-12)
    axes.stairs(heights + place, EDGES, baseline=place, fill=True, color=study.colours[group.label], alpha=0.75)
    axes.hlines(place, EDGES[0], EDGES[-1], color="#BBBBBB", linewidth=0.6)
    axes.annotate(f"dead {dead:.1%}", (EDGES[0] - 0.85, place + 0.12), fontsize=7.5, color=NEUTRAL)
    n = len(group.records)
    title = title_of(axes)
    sheet.rows.append(Row(title, group.label, x=0.0, value=float(dead), n=n, note="never active"))
    sheet.rows += [
        Row(title, group.label, x=float(10**edge), value=float(share), n=n, note="from x to the next x")
        for edge, share in zip(EDGES[:-1], shares, strict=True)
    ]


def faithfulness(study: Study) -> Sheet:
    """Cross-entropy and divergence with the strongest paths alone, against how many are kept."""
    remark = "Solid: the paths of largest attribution; dotted: as many at random. Means over seeds."
    width = key_width(study)
    sheet = Sheet("Faithfulness of path attribution", study.subtitle, [4.4] * 2, [curves_height(study)], remark, width)
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
    sheet = Sheet("Unlearning", study.subtitle, [4.8] * 2, [height], remark, key_width(study))
    axes = sheet.panel(0, 0, "Rise of the loss, forget against retain")
    pareto(sheet, axes, study, "unlearn", "relative_{}", lambda value: value)
    axes = sheet.panel(0, 1, "SAEBench: questions no longer right")
    pareto(sheet, axes, study, "unlearn-saebench", "accuracy_{}", lambda right: 1 - right)
    learners_key(sheet, study)
    return sheet


def pareto(sheet: Sheet, axes: Axes, study: Study, suite: str, column: str, rise: Callable[[float], float]) -> None:
    """Settings and their front for each learner; `column` is a figure's name with {} for the text."""
    retain, forget = column.format("retain"), column.format("forget")
    reasons, any_drawn = [], False
    for group in study.groups:
        for record in group.records:
            if suite not in record.evaluations:
                reasons.append(why_not_unlearnt(record, suite))
                continue
            any_drawn = True
            for kind in ("settings", "controls", "pareto"):
                rows = record.table(suite, kind, retain, forget)
                points = [(rise(row[retain]), rise(row[forget])) for row in rows]
                sheet.rows += [Row(title_of(axes), group.label, record.name, *point, note=kind) for point in points]
                draw_points(axes, study, group, kind, points)
    if not any_drawn:
        return sheet.nothing(axes, first_few(reasons))
    axes.axvline(SMALL, color=NEUTRAL, linestyle="dotted", linewidth=1)
    axes.set_xscale("symlog", linthresh=SMALL)
    axes.set_yscale("symlog", linthresh=SMALL)
    places = np.concatenate([line.get_xydata() for line in axes.lines[:-1]])  # the last is the one just drawn
    axes.set_xlim(left=min(places[:, 0].min() * 1.2, -SMALL / 5))
    axes.set_ylim(bottom=min(places[:, 1].min() * 1.2, -SMALL / 5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.3g}")
    sheet.label(axes, "retain: relative rise, symmetric log", "forget: relative rise, symmetric log")
    return None


def draw_points(axes: Axes, study: Study, group: Group, kind: str, points: Sequence[tuple[float, float]]) -> None:
    """The front as a line; settings and controls as faint marks where there are few learners."""
    colour, x, y = study.colours[group.label], [point[0] for point in points], [point[1] for point in points]
    if kind == "pareto":
        order = np.argsort(x)
        style, x, y = study.styles[group.label], np.take(x, order).tolist(), np.take(y, order).tolist()
        marker = style.marker if len(study.groups) <= FEW else ""
        axes.plot(x, y, color=colour, linestyle=style.dash, marker=marker, markersize=4)
    elif len(study.groups) <= FEW:
        axes.plot(x, y, "." if kind == "settings" else "x", color=colour, markersize=4, alpha=0.35)


def why_not_unlearnt(record: Record, suite: str) -> str:
    """Why a learner has no such file."""
    if record.state != "finished":
        return record.missing(suite)
    more = "--data FOLDER" if suite.endswith("saebench") else "--forget TEXT --retain TEXT"
    return f"no eval/{suite}.json: train unlearn {record.run} {more}"
