"""What a page says of runs, read from their result files, whatever is missing or damaged among them.

`runs.py` refuses what does not fit, since a figure must not be drawn of half a study. A page is looked at when
something went wrong: here each problem is noted, and the rest is shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.config import read_toml
from common.errors import ConfigError, StoreError
from common.files import read_json
from train.record import read_lines
from train.report.runs import SILENT_S

RUN_FILES = ("run.toml", "data.json", "status.json")
LATENTS = "latents"


@dataclass(frozen=True)
class LearnerView:
    """One learner, as far as its files tell.

    Attributes:
        label: its name, after its run's where there are several; unique on the page.
        state: as `result.json` or else `status.json` has it; "killed" where the run fell silent, "not begun" without
            a word of it.
        result: `result.json`; {} while there is none.
        config: `config.json`, and what `sae/config.json` adds once there is one.
        lines: `metrics.jsonl`.
        evaluations: `eval/*.json` by file name without its end, heldout first.
        latents: `eval/latents.json`, else that of the most tokens; {} without one.
    """

    folder: Path
    label: str
    state: str
    reason: str
    result: dict[str, Any]
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    latents: dict[str, Any]


@dataclass(frozen=True)
class RunView:
    """One run: settings, data plan and status, each {} where it is missing, and its learners."""

    path: Path
    state: str
    reason: str
    settings: dict[str, Any]
    data: dict[str, Any]
    status: dict[str, Any]
    learners: list[LearnerView]


@dataclass
class Reader:
    """Reads files and notes what is wrong with them.

    Attributes:
        problems: one line for each file that could not be read.
        now: Unix time that heartbeats are held against.
    """

    now: float
    problems: list[str] = field(default_factory=list)

    def json(self, path: Path) -> dict[str, Any]:
        """The object in a JSON file; {} and, unless it is just not there, a problem where it cannot be had."""
        if not path.exists():
            return {}
        try:
            value = read_json(path)
        except (StoreError, OSError) as error:
            return self.wrong(str(error))
        return value if isinstance(value, dict) else self.wrong(f"{path}: an object was expected here.")

    def toml(self, path: Path) -> dict[str, Any]:
        """The table in a TOML file, likewise."""
        try:
            return read_toml(path) if path.exists() else {}
        except ConfigError as error:
            return self.wrong(str(error))

    def lines(self, path: Path) -> list[dict[str, Any]]:
        """The whole lines of a .jsonl file, those that hold objects with a step."""
        try:
            found: list[Any] = read_lines(path) if path.exists() else []
        except (UnicodeDecodeError, OSError) as error:
            self.wrong(f"{path}: cannot be read ({error}).")
            return []
        return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]

    def wrong(self, problem: str) -> dict[str, Any]:
        self.problems.append(problem)
        return {}


def read_runs(paths: Sequence[Path], now: float | None = None) -> tuple[list[RunView], list[str]]:
    """Runs (run or learner folders) with their learners, and what could not be read of them.

    Raises:
        StoreError: a path with nothing of a run in it.
        ConfigError: a learner named twice.
    """
    reader = Reader(time.time() if now is None else now)
    names = [path.resolve().name for path in paths]
    titles = names if len(set(names)) == len(names) else [str(path) for path in paths]
    runs = [read_run(path, title if len(paths) > 1 else "", reader) for path, title in zip(paths, titles, strict=True)]
    folders = [learner.folder.resolve() for run in runs for learner in run.learners]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice}: named twice. Give each run or learner once.")
    return runs, reader.problems


def read_run(path: Path, title: str, reader: Reader) -> RunView:
    """A run folder, or a learner folder as a run of one; learners are called by `title` too, if it is not empty."""
    single = (path / "config.json").exists()
    run = path.resolve().parent if single else path
    if not single and not any((run / name).exists() for name in RUN_FILES):
        raise StoreError(f"{path}: no run here (none of {', '.join(RUN_FILES)}). Give run or learner folders.")
    settings, status = reader.toml(run / "run.toml"), reader.json(run / "status.json")
    state, reason = standing(status, reader.now)
    listed = [str(learner.get("name")) for learner in objects(settings.get("learner"))]
    others = sorted(file.parent.name for file in run.glob("*/config.json"))
    names = [path.resolve().name] if single else list(dict.fromkeys(listed + others))
    labels = {name: title if single and title else f"{title}/{name}" if title else name for name in names}
    learners = [read_learner(run / name, labels[name], status, (state, reason), reader) for name in names]
    return RunView(run, state, reason, settings, reader.json(run / "data.json"), status, learners)


def standing(status: dict[str, Any], now: float) -> tuple[str, str]:
    """State and reason of a run; one that has not been heard of for two minutes was killed."""
    state, reason = str(status.get("state", "not begun")), str(status.get("reason", ""))
    heartbeat = status.get("heartbeat")
    if state == "running" and isinstance(heartbeat, int | float) and now - heartbeat > SILENT_S:
        return "killed", f"not heard of since {moment(heartbeat)}"
    return state, reason


def moment(unix_s: Any) -> str:
    """`2026-11-21 10:40 UTC`; a dash for what is no time."""
    try:
        return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M} UTC"
    except (TypeError, ValueError, OverflowError, OSError):
        return "–"


def read_learner(
    folder: Path, label: str, status: dict[str, Any], of_run: tuple[str, str], reader: Reader
) -> LearnerView:
    result = reader.json(folder / "result.json")
    said = result or table(table(status.get("learners")).get(folder.name))
    state, reason = str(said.get("state", "not begun")), str(said.get("reason") or "")
    if state in ("running", "waiting") and of_run[0] not in ("running", "finished"):
        state, reason = of_run  # what it said last is no longer so
    evaluations, latents = read_evaluations(folder / "eval", reader)
    return LearnerView(
        folder=folder,
        label=label,
        state=state,
        reason=reason,
        result=result,
        config=reader.json(folder / "sae" / "config.json") | reader.json(folder / "config.json"),
        lines=reader.lines(folder / "metrics.jsonl"),
        evaluations=evaluations,
        latents=latents,
    )


def read_evaluations(folder: Path, reader: Reader) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Results by file name, heldout first; and the latents of the whole file, else of the one with the most tokens."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.stem.partition("-")[0] != "heldout", path.stem))
    found = {path.stem: value for path in paths if (value := reader.json(path))}
    best = max((stem for stem in found if tokens_of(stem)), key=tokens_of, default=None)
    return found, found[best] if best is not None else {}


def tokens_of(stem: str) -> float:
    """How many tokens `latents-<tokens>.json` looked at, infinitely many without a number; 0 of another suite."""
    suite, _, limit = stem.partition("-")
    return 0.0 if suite != LATENTS else float(limit) if limit.isdigit() else math.inf


def table(value: Any) -> dict[str, Any]:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; none where it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
