"""What a toy store is made of: features whose directions, groups and relations are known (file: `docs/store.md`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import StoreError
from common.files import write_file

TOYS = ("toy-h", "toy-h-independent", "toy-h-tree", "toy-t", "toy-m")
TRUTH_FILE = "truth.safetensors"


@dataclass(frozen=True)
class Truth:
    """The features of a toy.

    Attributes:
        directions: unit rows, float32 [features, d_model].
        groups: names of levels or time scales.
        group: of each feature, its number in `groups`, int32 [features].
        run_length: mean length of a feature's active runs in tokens, float32 [features]; 0: tokens are independent.
        edges: parent and child, int32 [edges, 2]: a child is active only with one of its parents.
        relations: source, target and lag, int32 [relations, 3]: the target follows the source after `lag` tokens.
    """

    directions: np.ndarray
    groups: tuple[str, ...]
    group: np.ndarray
    run_length: np.ndarray
    edges: np.ndarray
    relations: np.ndarray

    def members(self, group: str) -> np.ndarray:
        """Numbers of the features of a group."""
        return np.flatnonzero(self.group == self.groups.index(group))


def write_truth(store: Path, truth: Truth) -> None:
    """Put `truth` into a store's folder."""
    tensors = {name: value for name, value in vars(truth).items() if name != "groups"}
    write_file(store / TRUTH_FILE, save(tensors, metadata={"groups": json.dumps(truth.groups)}))


def read_truth(store: str | Path) -> Truth:
    """The truth of a toy store.

    Raises:
        StoreError: not a toy store, or the file is damaged.
    """
    path = Path(store).expanduser() / TRUTH_FILE
    if not path.exists():
        raise StoreError(f"{path}: no such file; only stores of 'harvest toy' have a truth to compare with.")
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return Truth(groups=tuple(json.loads(file.metadata()["groups"])), **tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: damaged ({error}). Run the harvest toy command that made the store again.") from None
