"""What the page's tables say: runs, learners, suites, and the comparison at equal L0. Plain values for the template."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.console import format_cell, format_seconds
from common.errors import GranaryError
from train.folders import ODD
from train.report.gather import LearnerView, RunView, moment, table
from train.report.kinds import kinds_by_name, numbered
from train.report.pack import is_number
from train.report.points import read_points
from train.report.tables import Row, compare

NONE = "–"
BASELINE = "batchtopk"
FEW = 6  # so many learners are columns, more are rows
HUGE = 1e12  # a loss that blew up has 25 digits
MANY_VALUES = 6  # of a list in one cell


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        text: as it is read; a dash where there is none.
        exact: all its digits, or the reason that there is none.
        note: number of the footnote with that reason; 0 without one.
        value: to sort by.
        interval: `0.81 to 0.85`, or empty.
    """

    text: str
    exact: str = ""
    note: int = 0
    value: float | None = None
    interval: str = ""


@dataclass(frozen=True)
class SuiteTable:
    """One suite's figures, a row of cells for each learner that has been evaluated.

    Attributes:
        metrics: name and definition; the definition is empty where we have none.
        rows: learner's label and its cells, in the order of `metrics`.
        notes: reasons of figures that are missing, numbered from 1.
    """

    name: str
    metrics: list[tuple[str, str]]
    rows: list[tuple[str, list[Cell]]]
    notes: list[str]

    @property
    def meanings(self) -> list[tuple[str, str]]:
        """The metrics that we have a definition of."""
        return [(name, meaning) for name, meaning in self.metrics if meaning]

    @property
    def upright(self) -> bool:
        """Whether learners are columns: they fit beside each other."""
        return len(self.rows) <= FEW


@dataclass(frozen=True)
class Comparison:
    """Learners at equal L0; `problem` says why there is no such table."""

    rows: list[Row]
    baseline: str
    notes: list[str]
    problem: str = ""


def run_facts(run: RunView) -> list[tuple[str, str]]:
    """What a run was given, by name; what is not known is a dash."""
    identity, plan = table(run.data.get("identity")), table(run.data.get("plan"))
    steps, size = (
        identity.get("n_steps", run.status.get("steps")),
        identity.get("batch_size", run.settings.get("batch_size")),
    )
    model = next((str(learner.config["model"]) for learner in run.learners if "model" in learner.config), NONE)
    held_out = run.settings.get("held_out")
    return [
        ("store", str(run.settings.get("cache", NONE))),
        ("model", model),
        ("hook", str(plan.get("hook", NONE))),
        ("steps", f"{shown(run.status.get('step'))} of {shown(steps)}"),
        ("tokens a step", shown(size)),
        ("training tokens", shown(steps * size) if is_number(steps) and is_number(size) else NONE),
        ("documents held out", f"{held_out:.3g}" if is_number(held_out) else NONE),
        ("seed", shown(identity.get("seed"))),
        ("last word", moment(run.status.get("heartbeat"))),
    ]


def learner_row(learner: LearnerView) -> dict[str, Any]:
    """A learner's line: how it ended, and its first figures."""
    result, metrics = learner.result, table(learner.result.get("metrics"))
    last = learner.lines[-1] if learner.lines else {}
    steps = result.get("training_steps", last.get("step"))
    seconds = result.get("seconds")
    return {
        "label": learner.label,
        "variant": str(learner.config.get("variant", result.get("variant", NONE))),
        "options": ", ".join(f"{key} {value}" for key, value in table(learner.config.get("options")).items()),
        "state": learner.state,
        "reason": learner.reason,
        "alarms": alarms_of(result),
        "cells": [
            cell(steps),
            cell(result.get("final_loss", last.get("loss"))),
            cell(metrics.get("explained_variance")),
            cell(metrics.get("l0")),
            cell(metrics.get("dead_share")),
            Cell(format_seconds(seconds), value=seconds) if is_number(seconds) else Cell(NONE),
        ],
    }


def alarms_of(result: dict[str, Any]) -> list[str]:
    """What was odd about a learner, a line each."""
    found = result.get("alarms")
    values = found.values() if isinstance(found, dict) else found if isinstance(found, list) else []
    return [str(value) for value in values]


def suite_tables(learners: Sequence[LearnerView], definitions: dict[str, dict[str, str]]) -> list[SuiteTable]:
    """A table for each file name in the learners' `eval` folders that has metrics."""
    found = [(stem, result) for learner in learners for stem, result in learner.evaluations.items()]
    stems = dict.fromkeys(stem for stem, result in found if table(result.get("metrics")))
    return [suite_table(stem, learners, definitions.get(stem.partition("-")[0], {})) for stem in stems]


def suite_table(stem: str, learners: Sequence[LearnerView], definitions: dict[str, str]) -> SuiteTable:
    found = {learner.label: learner.evaluations[stem] for learner in learners if stem in learner.evaluations}
    names = dict.fromkeys(name for evaluation in found.values() for name in flat(table(evaluation.get("metrics"))))
    notes: dict[str, int] = {}
    rows = []
    for label, evaluation in found.items():
        metrics, reasons = flat(table(evaluation.get("metrics"))), table(evaluation.get("reasons"))
        intervals = table(evaluation.get("intervals"))
        rows.append((label, [figure(metrics, name, reasons, intervals, notes) for name in names]))
    return SuiteTable(stem, [(name, definitions.get(name, "")) for name in names], rows, list(notes))


def flat(metrics: dict[str, Any], opening: str = "") -> dict[str, Any]:
    """Groups of figures as `group.name`."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        found |= flat(value, f"{opening}{name}.") if isinstance(value, dict) else {f"{opening}{name}": value}
    return found


def figure(
    metrics: dict[str, Any], name: str, reasons: dict[str, Any], intervals: dict[str, Any], notes: dict[str, int]
) -> Cell:
    """A suite's figure; a reason that is new is numbered in `notes`."""
    value = metrics.get(name)
    if value is None:
        known = reasons.get(name, reasons.get(name.partition(".")[0]))
        reason = str(known) if known else ("no reason was given" if name in metrics else "this file does not have it")
        return Cell(NONE, reason, notes.setdefault(reason, len(notes) + 1))
    ends = intervals.get(name)
    if isinstance(ends, list) and len(ends) == 2 and all(is_number(end) for end in ends):
        return cell(value, f"{shown(ends[0])} to {shown(ends[1])}")
    return cell(value)


def cell(value: Any, interval: str = "") -> Cell:
    """A value to four digits, with all of them behind it."""
    if value is None:
        return Cell(NONE)
    return Cell(shown(value), str(value), value=float(value) if is_number(value) else None, interval=interval)


def shown(value: Any) -> str:
    """A value as people read it; a long list by how many there are."""
    if is_number(value) and abs(value) >= HUGE:
        return f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(shown(item) for item in value) if len(value) <= MANY_VALUES else f"{len(value)} values"
    return format_cell(value)


def comparison(paths: Sequence[Path]) -> Comparison:
    """All finished learners at equal L0, against `batchtopk` or else the first kind there is."""
    said = io.StringIO()
    rows, baseline, problem = [], BASELINE, ""
    with contextlib.redirect_stderr(said):  # who was left out stands below the table
        try:
            points = read_points(paths)
            kinds = numbered(kinds_by_name(points))
            baseline = BASELINE if BASELINE in kinds else next(iter(kinds))
            rows = compare(points, None, baseline)
        except (GranaryError, *ODD) as error:
            problem = str(error) if isinstance(error, GranaryError) else f"files that are not a run's ({error!r})"
    return Comparison(rows, baseline, said.getvalue().splitlines(), problem)
