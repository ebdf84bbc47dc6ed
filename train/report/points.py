"""Finished learners as points (L0, figures), read from the files that runs left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.console import say
from common.errors import ConfigError, StoreError
from common.files import read_json
from train.folders import blamed

FIGURES = ("explained_variance", "nmse", "dead_share", "dense_share")
AIMS = ("k", "target_l0")


@dataclass(frozen=True)
class Point:
    """One finished learner.

    Attributes:
        kind: what decides it but name, seed and L0 aimed at, as canonical JSON: its settings and its run's.
        l0: on held-out documents.
        figures: held-out figures by name.
        tokens_per_s: of its own steps.
    """

    name: str
    kind: str
    seed: int
    aim: float | None
    l0: float
    figures: dict[str, float]
    tokens_per_s: float | None


def read_points(runs: Iterable[Path]) -> list[Point]:
    """Every finished learner of these runs (run or learner folders); those left out are named on stderr.

    Raises:
        StoreError: a folder without a learner, no learner with held-out figures at all, or files not of a run.
        ConfigError: learners of several stores or hooks.
    """
    found: dict[Path, dict[str, Any]] = {}
    left_out: dict[str, list[str]] = {}
    for run in runs:
        single = (run / "config.json").exists()
        folders = [run] if single else [file.parent for file in sorted(run.glob("*/config.json"))]
        if not folders:
            raise StoreError(f"{run}: no learner here. Give run or learner folders.")
        for folder in folders:
            path = folder / "result.json"
            result = read_json(path) if path.exists() else {"state": "not finished", "reason": "see train resume"}
            with blamed(folder):
                reason = why_left_out(result)
            if reason:
                left_out.setdefault(reason, []).append(str(folder))
            else:
                found[folder] = result
    lines = [f"{', '.join(folders)}: left out: {reason}" for reason, folders in left_out.items()]
    if not found:
        raise StoreError("no finished learner with held-out figures to compare. " + "; ".join(lines))
    for line in lines:
        say(line)
    identities, points = {}, []
    for folder in found:
        with blamed(folder):
            identities[folder] = read_json(folder.resolve().parent / "data.json")["identity"]
            refuse_several_sources(identities)
            points.append(point_of(folder, found[folder], identities[folder]))
    return points


def why_left_out(result: dict[str, Any]) -> str:
    """Why a learner is not compared; nothing for one that is."""
    if result["state"] != "finished":
        return f"{result['state']}: {result['reason']}"
    if "l0" not in result["metrics"]:
        return "no held-out figures (trained with --held-out 0)"
    none = [name for name in ("l0", *FIGURES) if result["metrics"][name] is None]
    return f"no held-out {', '.join(none)}" if none else ""


def refuse_several_sources(identities: dict[Path, dict[str, Any]]) -> None:
    """Figures of different activations do not compare.

    Raises:
        ConfigError: several stores or hooks; names both, with a learner of each.
    """
    for key in ("store", "hook"):
        folders = {identity[key]: folder for folder, identity in identities.items()}
        if len(folders) > 1:
            (one, first), (other, second) = list(folders.items())[:2]
            raise ConfigError(
                f"{first} was trained on {key} {one}, {second} on {key} {other}: their figures do not compare. "
                f"Compare the learners of each {key} apart."
            )


def point_of(folder: Path, result: dict[str, Any], identity: dict[str, Any]) -> Point:
    """A learner's point, from its config.json, its result.json and what decides its run."""
    config, metrics = read_json(folder / "config.json"), result["metrics"]
    return Point(
        name=str(result["name"]),
        kind=kind_of(config, identity),
        seed=seed_of(config, identity),
        aim=aim_of(config),
        l0=float(metrics["l0"]),
        figures={name: float(metrics[name]) for name in FIGURES},
        tokens_per_s=result["tokens_seen"] / result["seconds"] if result["seconds"] else None,
    )


def kind_of(config: dict[str, Any], identity: dict[str, Any]) -> str:
    """What decides a learner but name, seed and L0 aimed at: its own settings and its run's, as canonical JSON."""
    settings = {key: value for key, value in config.items() if key not in ("name", "d_in")}
    settings["options"] = {key: value for key, value in config["options"].items() if key not in AIMS}
    return json.dumps(settings | identity | {"seed": None}, sort_keys=True)


def seed_of(config: dict[str, Any], identity: dict[str, Any]) -> int:
    """The learner's own seed, or else its run's."""
    return int(config["seed"] if config["seed"] is not None else identity["seed"])


def aim_of(config: dict[str, Any]) -> float | None:
    """k, or the L0 aimed at; None where a variant has neither."""
    return next((config["options"][key] for key in AIMS if config["options"].get(key) is not None), None)
