"""Checkpoints: a folder made aside, fsynced, its manifest with hashes last, then renamed. Never pickle."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from common.errors import GranaryError, StoreError
from common.files import ASIDE, disk_error, file_sha256, read_json, sync_folder, write_file, write_json

FORMAT = 2  # 1: thresholds and λ outside `sparsity`, no landmarks
MANIFEST = "manifest.json"
PREFIX = "step-"
NAME = re.compile(rf"{PREFIX}\d+")
UNREADABLE = (GranaryError, KeyError, TypeError)  # what a damaged checkpoint raises


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, read back and matching its manifest."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


def folder_for(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:08d}"


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any], identity: dict[str, Any]
) -> Path:
    """Write `folder/step-…`; it appears whole or not at all. A whole one of this step is left as it is,
    a damaged one is replaced.

    Raises:
        StoreError: the disk is full; earlier checkpoints are intact.
    """
    target = folder_for(folder, step)
    if target.exists():
        try:
            return read_checkpoint(target).path
        except UNREADABLE:
            shutil.rmtree(target)
    aside = target.with_name(target.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        files = {}
        for name, group in tensors.items():
            path = aside / f"{name}.safetensors"
            write_file(path, save({key: value.detach().cpu().contiguous() for key, value in group.items()}))
            files[path.name] = file_sha256(path)
        write_json(aside / MANIFEST, {"format": FORMAT, "identity": identity, "facts": facts, "files": files})
        os.replace(aside, target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_error(error, target, sum(t.nbytes for group in tensors.values() for t in group.values())) from error
    return target


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check every hash.

    Raises:
        StoreError: a file is missing or does not match the manifest, or another version wrote it.
    """
    manifest = read_json(path / MANIFEST)
    if manifest["format"] != FORMAT:
        raise StoreError(f"{path}: format {manifest['format']} of checkpoints; this version reads {FORMAT}.")
    tensors = {}
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.exists():
            raise StoreError(f"{file}: missing from the checkpoint.")
        found = file_sha256(file)
        if found != expected:
            raise StoreError(f"{file}: sha256 {found[:12]}… but the manifest says {expected[:12]}….")
        tensors[file.stem] = load_file(file)
    return Checkpoint(path, tensors, manifest["facts"] | {"identity": manifest["identity"]})


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders under their final names, oldest first; what else somebody put beside them is none."""
    return sorted((path for path in folder.glob(f"{PREFIX}*") if NAME.fullmatch(path.name)), key=step_of)


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that reads back whole, and one line for each newer one that was skipped."""
    skipped: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return read_checkpoint(path), skipped
        except UNREADABLE as error:
            skipped.append(f"skipped {path.name}: {error}")
    return None, skipped


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def prune(folder: Path, best_step: int | None, keep_every: int | None) -> None:
    """Keep the last two, the best, and every k-th; remove the rest and what kills left aside."""
    for leftover in folder.glob(f"*{ASIDE}"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in checkpoints(folder)[:-2]:
        step = step_of(path)
        if step == best_step or (keep_every is not None and step % keep_every == 0):
            continue
        gone = path.with_name(path.name + ASIDE)  # renamed first: a kill never leaves half a checkpoint by its name
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
