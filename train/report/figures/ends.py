"""How learners ended: steps, final losses, and what they came to, side by side."""

from __future__ import annotations

from collections.abc import Callable

from train.report.figures.draw import bars_height, group_bars, seeds_remark
from train.report.figures.shapes import Bar, Row
from train.report.figures.sheet import Sheet
from train.report.figures.study import Read, Study, figure_of
from train.report.palette import natural
from train.report.runs import Record

LONG = 44  # characters of a learner's name, with its run
EACH = "One bar for each learner; those of one colour differ in seed alone. Dotted: steps asked for."


def training_steps_comparison(study: Study) -> Sheet:
    """Steps taken by each learner, with those asked for and how it ended."""
    return learners_sheet(study, "Training steps", "Steps completed", "steps", steps_bar, EACH)


def final_loss_comparison(study: Study) -> Sheet:
    """The last finite loss of each learner, or why it has none."""
    remark = EACH.split(" Dotted")[0] + " Losses of variants with other terms are not of one scale."
    return learners_sheet(study, "Final loss", "Final loss", "last finite total loss, scaled units", loss_bar, remark)


def steps_bar(record: Record) -> tuple[float | None, float | None, str]:
    """Steps, steps asked for, state."""
    return float(record.steps), float(record.asked), "finished" if record.state == "finished" else record.ending


def loss_bar(record: Record) -> tuple[float | None, float | None, str]:
    """Final loss, nothing aimed at, and what a reader must know of it."""
    if record.final_loss is None:
        return None, None, record.ending
    return record.final_loss, None, "" if record.state == "finished" else f"{record.state} at step {record.steps:,}"


def learners_sheet(
    study: Study,
    heading: str,
    panel: str,
    unit: str,
    read: Callable[[Record], tuple[float | None, float | None, str]],
    remark: str,
) -> Sheet:
    """One panel with a bar for each learner."""
    sheet = Sheet(heading, study.subtitle, [9.0], [bars_height(len(study.records))], remark)
    axes, bars = sheet.panel(0, 0, panel), []
    runs = {record.run for record in study.records}
    for group in study.groups:
        for record in sorted(group.records, key=lambda record: (str(record.run), natural(record.name))):
            value, mark, text = read(record)
            label = record.name if len(runs) == 1 else f"{record.run.name}/{record.name}"
            bars.append(Bar(label, study.colours[group.label], value, mark=mark, text=text))
            note = text if mark is None else f"of {mark:g}; {text}"
            sheet.rows.append(Row(panel, group.label, record.name, value=value, note=note))
    sheet.bars(axes, bars, unit, names=LONG, linear=unit == "steps")
    return sheet


def run_comparison(study: Study) -> Sheet:
    """Steps, final loss, explained variance and speed of each group."""
    height = bars_height(len(study.groups))
    sheet = Sheet("Run comparison", study.subtitle, [4.4, 3.2, 3.2, 3.2], [height], seeds_remark(study))
    panels: dict[str, tuple[Read, str]] = {
        "Steps completed": (lambda r: (float(r.steps), ""), "steps"),
        "Final loss": (lambda r: (r.final_loss, r.ending), "total loss, scaled units"),
        "Explained variance, held-out": (figure_of("heldout", "explained_variance"), "share"),
        "Speed of own steps": (lambda r: (r.tokens_per_s, "no time noted"), "tokens per second"),
    }  # fmt: skip
    for column, (title, (read, unit)) in enumerate(panels.items()):
        suite, name = ("heldout", "explained_variance") if "variance" in title else ("", "")
        axes = sheet.panel(0, column, title)
        linear = unit in ("steps", "tokens per second")
        group_bars(sheet, axes, study, read, unit, suite=suite, name=name, names=column == 0, linear=linear)
    return sheet
