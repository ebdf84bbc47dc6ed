"""What runs left of their learners, the unfinished and failed ones too: read from result files alone."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.config import read_toml
from common.errors import ConfigError, StoreError
from common.files import read_json
from train.folders import blamed
from train.record import read_lines
from train.report.points import aim_of, kind_of, seed_of

SILENT_S = 120.0  # a run writes its heartbeat every few seconds; one that is silent for so long was killed
UNREAD = "latents"  # texts of thousands of latents, which no figure needs

Part = TypeVar("Part", dict[str, Any], list[Any])


@dataclass(frozen=True)
class Record:
    """One learner as its files tell it.

    Attributes:
        run: the run's folder.
        kind: what decides it but name, seed and L0 aimed at, as canonical JSON.
        options: the variant's settings.
        aim: k, or the L0 aimed at.
        state: as in result.json, else in status.json; "killed" where a run has not been heard of for two minutes.
        steps, asked: taken, and to take.
        final_loss: the last finite total loss.
        seconds: of its own steps.
        metrics: held-out figures of result.json; {} before it finished.
        lines: metrics.jsonl.
        evaluations: eval/*.json by suite; of several the one of the most tokens.
        source: store and hook, for titles.
    """

    run: Path
    name: str
    variant: str
    options: dict[str, Any]
    kind: str
    seed: int
    aim: float | None
    state: str
    reason: str
    steps: int
    asked: int
    tokens: int
    final_loss: float | None
    seconds: float
    metrics: dict[str, Any]
    lines: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    source: str

    @property
    def ending(self) -> str:
        """State and reason in a line: `diverged: loss or gradient not finite by step 5`."""
        return f"{self.state}: {self.reason}" if self.reason else self.state

    @property
    def tokens_per_s(self) -> float | None:
        """Of its own steps."""
        return self.tokens / self.seconds if self.seconds else None

    def figure(self, suite: str, name: str) -> tuple[float | None, str]:
        """A figure of a suite; None with the reason where there is none."""
        found = self.evaluations.get(suite)
        if suite == "heldout" and found is None and name in self.metrics:
            found = {"metrics": self.metrics}
        if found is None:
            return None, self.missing(suite)
        value = found["metrics"].get(name)
        if isinstance(value, int | float):
            return float(value), ""
        return None, str(found.get("reasons", {}).get(name) or f"eval/{suite}.json does not have {name}")

    def missing(self, suite: str) -> str:
        """Why there is no `eval/<suite>.json`, and what makes one."""
        if self.state in ("running", "waiting", "interrupted", "killed"):
            return "not finished yet"
        if self.state != "finished":
            return self.ending
        return f"no eval/{suite}.json: train eval {self.run} --suite {suite}"

    def part(self, suite: str, key: str, kind: type[Part]) -> Part:
        """What a suite's file has beside metrics under a key; empty where there is none.

        Raises:
            StoreError: something else is there.
        """
        value = self.evaluations.get(suite, {}).get(key)
        if value is not None and not isinstance(value, kind):
            raise StoreError(f"{self.run / self.name}/eval/{suite}.json: {key} is no {kind.__name__}.")
        return value if value is not None else kind()

    def table(self, suite: str, key: str, *columns: str) -> list[dict[str, Any]]:
        """A list of objects that a suite's file has under a key, each with numbers in these columns; [] without.

        Raises:
            StoreError: something else is there.
        """
        rows = self.part(suite, key, list)
        for row in rows:
            for column in columns:
                if not isinstance(row, dict) or not isinstance(row.get(column), int | float):
                    raise StoreError(f"{self.run / self.name}/eval/{suite}.json: {key} has a row without {column}.")
        return rows

    def densities(self) -> np.ndarray | None:
        """Share of tokens on which each latent is active, from suite core; None without."""
        details = self.table("core", "eval_result_details", "feature_density")
        return np.array([latent["feature_density"] for latent in details]) if details else None


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Every learner of these runs (run or learner folders), in the order of their run.toml.

    Raises:
        StoreError: no run there, or a file that is damaged or not what a run leaves.
        ConfigError: a learner twice.
    """
    records = [record for path in paths for record in read_run(path)]
    folders = [(record.run.resolve(), record.name) for record in records]
    twice = next((run / name for run, name in folders if folders.count((run, name)) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice}: named twice. Give each run or learner once.")
    return records


def read_run(path: Path) -> list[Record]:
    """The learners of a run folder, or the one of a learner folder."""
    single = (path / "config.json").exists()
    run = path.resolve().parent if single else path
    if not (run / "run.toml").exists():
        raise StoreError(f"{path}: no run here (no run.toml). Give run or learner folders.")
    settings = read_settings(run / "run.toml")
    identity = read_object(run / "data.json", "identity")["identity"]
    status = read_object(run / "status.json", "state", "steps", "learners", "heartbeat")
    with blamed(path):
        listed = [str(learner["name"]) for learner in settings.get("learner", [])]
        begun = sorted(file.parent.name for file in run.glob("*/config.json"))
        names = sorted(begun, key=lambda name: listed.index(name) if name in listed else len(listed))
        wanted = [path.resolve().name] if single else names
        records = [read_learner(run, name, settings, identity, status) for name in wanted]
    return records


def read_learner(
    run: Path, name: str, settings: dict[str, Any], identity: dict[str, Any], status: dict[str, Any]
) -> Record:
    """One learner of a run."""
    folder = run / name
    config = read_object(folder / "config.json", "variant", "options", "seed")
    result = read_object(folder / "result.json", "state", "training_steps") if (folder / "result.json").exists() else {}
    lines = read_metrics(folder / "metrics.jsonl")
    state, reason = standing(result, status, name)
    aim = aim_of(config)
    steps = result["training_steps"] if result else lines[-1]["step"] if lines else 0
    loss = result["final_loss"] if result else lines[-1]["loss"] if lines else None
    return Record(
        run=run,
        name=name,
        variant=str(config["variant"]),
        options=dict(config["options"]),
        kind=kind_of(config, identity),
        seed=seed_of(config, identity),
        aim=None if aim is None else float(aim),
        state=state,
        reason=reason,
        steps=int(steps),
        asked=int(result.get("requested_steps", status["steps"])),
        tokens=int(steps) * int(identity["batch_size"]),
        final_loss=None if loss is None else float(loss),
        seconds=float(result.get("seconds", 0.0)),
        metrics=dict(result.get("metrics") or {}),
        lines=lines,
        evaluations=read_evaluations(folder / "eval"),
        source=f"{Path(settings['cache']).stem} {identity['hook']}",
    )


def read_settings(path: Path) -> dict[str, Any]:
    """A run.toml; one that a run wrote is damaged, not wrongly configured, where it is no TOML."""
    try:
        return read_toml(path)
    except ConfigError as error:
        raise StoreError(str(error)) from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no such file."""
    with blamed(path):
        lines = read_lines(path) if path.exists() else []
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in lines):
        raise StoreError(f"{path}: not a file of a run: a line has no step.")
    return lines


def standing(result: dict[str, Any], status: dict[str, Any], name: str) -> tuple[str, str]:
    """State and reason of a learner, by its result or else by what the run last said of it."""
    said = result or status["learners"].get(name, {"state": status["state"], "reason": ""})
    state, reason = str(said["state"]), str(said.get("reason", ""))
    if state == "running" and time.time() - float(status["heartbeat"]) > SILENT_S:
        last = datetime.fromtimestamp(float(status["heartbeat"]), UTC)
        return "killed", f"not heard of since {last:%Y-%m-%d %H:%M} UTC"
    return state, reason


def read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by suite; of several of one suite the whole one, else that of the most tokens."""
    found: dict[str, tuple[float, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        suite, limit = re.sub(r"-\d+$", "", path.stem), "".join(re.findall(r"-(\d+)$", path.stem))
        size = float(limit) if limit else float("inf")
        if suite != UNREAD and size > found.get(suite, (0.0, path))[0]:
            found[suite] = (size, path)
    return {suite: read_evaluation(path) for suite, (_, path) in found.items()}


def read_evaluation(path: Path) -> dict[str, Any]:
    """An `eval/<suite>.json`."""
    found = read_object(path, "metrics")
    for key in ("metrics", "reasons"):
        if not isinstance(found.get(key, {}), dict):
            raise StoreError(f"{path}: {key} is no object.")
    return found


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object with these keys.

    Raises:
        StoreError: missing, damaged, or something else.
    """
    value = read_json(path)
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing or not isinstance(value, dict):
        raise StoreError(f"{path}: not a file of a run: no '{', '.join(missing)}' in it.")
    return value
