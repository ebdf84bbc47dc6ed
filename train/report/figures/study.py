"""What a figure is drawn of: learners, put together where they differ only in seed, with their colours."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.report.kinds import says_k, stem_of
from train.report.palette import Style, colours, natural, styles
from train.report.runs import Record
from train.report.tables import half_interval

Read = Callable[[Record], tuple[float | None, str]]
"""Gives a learner's value, or None and the reason that it has none."""


@dataclass(frozen=True)
class Group:
    """Learners that differ only in seed.

    Attributes:
        label: name without the seed, unique in the study; with k where the kind has several, or names that say it.
        kind: what groups at other L0 share with it: the label without k.
        aim: k, or the L0 aimed at.
    """

    label: str
    kind: str
    aim: float | None
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Summary:
    """A figure over the seeds of a group.

    Attributes:
        each: values by learner's name, those that there are.
        value: their mean; None where there is none.
        half: half the 95 % interval of the mean over seeds; None for one seed.
        low, high: the ends of an interval: over seeds, or of one seed's documents where its file has that.
        reason: why there is no value.
    """

    each: dict[str, float]
    value: float | None
    low: float | None
    high: float | None
    reason: str


@dataclass(frozen=True)
class Study:
    """Learners of one or more runs.

    Attributes:
        groups: by natural order of their labels.
        colours, styles: of every group's label and kind.
    """

    records: tuple[Record, ...]
    groups: tuple[Group, ...]
    colours: dict[str, str]
    styles: dict[str, Style]

    @property
    def subtitle(self) -> str:
        """What was run: `runs/demo: 3 learners · demo blocks.2.hook_resid_post · 500 steps of 1,024 tokens`."""
        folders = dict.fromkeys(record.run.resolve() for record in self.records)
        runs = [f"{folder.parent.name}/{folder.name}" for folder in folders]
        shown = ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
        n = len(self.records)
        sources = " + ".join(dict.fromkeys(record.source for record in self.records))
        asked = sorted({record.asked for record in self.records})
        steps = f"{asked[0]:,}" if len(asked) == 1 else f"{asked[0]:,} to {asked[-1]:,}"
        return f"{shown}: {n} learner{'s' * (n > 1)} · {sources} · {steps} steps asked for"

    def labels(self) -> dict[Path, str]:
        """The label of each learner's group, by the learner's folder."""
        return {(record.run / record.name).resolve(): g.label for g in self.groups for record in g.records}

    def kinds(self) -> dict[str, list[Group]]:
        """Groups by kind, each by rising aim."""
        found: dict[str, list[Group]] = defaultdict(list)
        for group in self.groups:
            found[group.kind].append(group)
        return {kind: sorted(groups, key=lambda group: group.aim or 0.0) for kind, groups in found.items()}


def make_study(records: Sequence[Record]) -> Study:
    """Groups with labels of their own, and a colour each: shades of one hue for one kind at several L0."""
    by_kind: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_kind[record.kind].append(record)
    groups = []
    for kind, name in kind_names(by_kind).items():
        members = by_kind[kind]
        aims = {record.aim for record in members}
        with_k = len(aims) > 1 or any(says_k(record.name) for record in members)
        for aim in aims:
            label = f"{name}-k{aim:g}" if with_k and aim is not None else name
            groups.append(Group(label, name, aim, tuple(record for record in members if record.aim == aim)))
    groups.sort(key=lambda group: (natural(group.kind), group.aim or 0.0))
    families: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        families[group.kind].append(group.label)
    return Study(tuple(records), tuple(groups), colours(families), styles(families))


def kind_names(members: dict[str, list[Record]]) -> dict[str, str]:
    """A name for each kind: what its learners are called without k and seed, with the run where two are called so."""
    names = {}
    for kind, records in members.items():
        stems = {stem_of(record.name) for record in records}
        names[kind] = stems.pop() if len(stems) == 1 else records[0].variant
    names = told_apart(names, lambda kind: f"{members[kind][0].run.resolve().name}/{names[kind]}")
    return told_apart(names, lambda kind: f"{names[kind]} #{list(members).index(kind) + 1}")


def told_apart(names: dict[str, str], longer: Callable[[str], str]) -> dict[str, str]:
    """The names, those that stand several times replaced."""
    times = Counter(names.values())
    return {kind: longer(kind) if times[name] > 1 else name for kind, name in names.items()}


def figure_of(suite: str, name: str) -> Read:
    """Reads a figure of a suite."""
    return lambda record: record.figure(suite, name)


def summary(group: Group, read: Read, suite: str = "", name: str = "") -> Summary:
    """A figure over a group's seeds.

    With one seed the interval is that of its documents, if the suite's file has one for `name`.
    """
    found = {record.name: read(record) for record in group.records}
    each = {learner: float(value) for learner, (value, _) in found.items() if value is not None}
    reasons = "; ".join(dict.fromkeys(reason for value, reason in found.values() if value is None and reason))
    values = list(each.values())
    if not values:
        return Summary({}, None, None, None, reasons)
    mean, half = float(np.mean(values)), half_interval(values)
    low, high = (mean - half, mean + half) if half is not None else (None, None)
    if len(values) == 1 and suite:
        low, high = document_interval(next(r for r in group.records if r.name in each), suite, name)
    return Summary(each, mean, low, high, reasons)


def document_interval(record: Record, suite: str, name: str) -> tuple[float | None, float | None]:
    """The 95 % interval over resampled documents that a suite's file gives for a metric, if it does."""
    found = record.evaluations.get(suite, {}).get("intervals", {})
    ends = found.get(name) if isinstance(found, dict) else None
    return (float(ends[0]), float(ends[1])) if isinstance(ends, list) and len(ends) == 2 else (None, None)
