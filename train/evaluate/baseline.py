"""The flat learner that a learner is held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import read_json
from train.evaluate.subject import Subject
from train.settings import saved_config

FLAT = "batchtopk"
AIMS = ("k", "target_l0")


@dataclass(frozen=True)
class Baseline:
    """A learner's folder, or why there is none."""

    folder: Path | None
    reason: str = ""


def baseline_of(subject: Subject) -> Baseline:
    """`--baseline`; by default the `batchtopk` of the same run that aims at the same L0 with the same seed.

    Of several the one of as many latents, then the first by name. A `batchtopk` that nobody fits better is its own.

    Raises:
        ConfigError: `--baseline` names no trained learner, or one of another store or hook, or one that was trained on
            documents held out here.
    """
    if subject.config.baseline is None:
        return flat_of(subject.folder.parent, subject)
    name = Path(subject.config.baseline)
    folder = next((path for path in (subject.folder.parent / name, name) if (path / "sae").is_dir()), None)
    if folder is None and not any(name.glob("*/sae")):
        raise ConfigError(
            f"--baseline {name}: no trained learner, neither in {subject.folder.parent} nor at that path. "
            "Name a finished learner of the run, or the folder of one or of a run."
        )
    found = flat_of(name, subject) if folder is None else Baseline(folder)
    if found.folder is not None:
        refuse_other_activations(found.folder, subject)
        refuse_seen_documents(found.folder, subject)
    return found


def refuse_other_activations(folder: Path, subject: Subject) -> None:
    """Raises:
    ConfigError: the baseline was trained on another store or hook.
    """
    theirs = read_json(folder / "sae" / "config.json")
    for key in ("store", "hook"):
        if theirs[key] != subject.facts[key]:
            raise ConfigError(
                f"--baseline {folder}: trained on {key} {theirs[key]}, {subject.folder} on {subject.facts[key]}: "
                "their codes do not compare. Name a learner of the same activations."
            )


def refuse_seen_documents(folder: Path, subject: Subject) -> None:
    """Documents are held out by a hash, so that those of a smaller share are among those of a larger one.

    Nothing is known of a learner that lies outside of its run.

    Raises:
        ConfigError: the baseline was trained on some of these.
    """
    run, ours = folder.resolve().parent, subject.plan.config.held_out
    if not (run / "run.toml").exists():
        return
    theirs = saved_config(run, subject.store.path).held_out
    if theirs < ours:
        raise ConfigError(
            f"--baseline {folder}: trained on documents that are held out here (--held-out {theirs:g}, here {ours:g}): "
            "it would be judged on what it has seen. Name a learner that holds out as many."
        )


def flat_of(run: Path, subject: Subject) -> Baseline:
    """The flat learner of a run, see `baseline_of`."""
    ours, aim = subject.facts, aim_of(subject.facts)
    if aim is None:
        return Baseline(None, f"{ours['variant']} aims at no L0 to choose a flat learner by. Name one with --baseline.")
    found = []
    for file in sorted(run.glob("*/sae/config.json")):
        theirs, folder = read_json(file), file.parent.parent
        if theirs["variant"] == FLAT and aim_of(theirs) == aim and theirs["seed"] == ours["seed"]:
            far = abs(theirs["options"]["d_sae"] - ours["options"]["d_sae"])
            found.append((folder != subject.folder, far, folder))
    if not found:
        return Baseline(
            None,
            f"no finished {FLAT} of L0 {aim:g} and seed {ours['seed']} in {run}. "
            "Train one, or name a flat learner with --baseline.",
        )
    return Baseline(min(found)[-1])


def aim_of(facts: dict[str, Any]) -> float | None:
    """The L0 that a learner was asked for."""
    aims = [facts["options"].get(key) for key in AIMS]
    return next((float(aim) for aim in aims if aim is not None), None)
