"""What the header of a store says of it: its length, its hooks, the shapes of its arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.arrays import ArraySpec
from common.errors import ConfigError, nearest
from common.layout import array_names, array_spec
from common.places import url_of


class Described:
    """Something with the header of a store.

    Attributes:
        path: the `.zarr` folder.
        header: the `granary` attributes of the root group; `docs/store.md` lists them.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header

    @property
    def name(self) -> str:
        """What people call it: its URL, or its path as it was given."""
        return url_of(self.path) or str(self.path)

    @property
    def id(self) -> str:
        """sha256 of the identity: two stores with one id hold the same sequences."""
        return str(self.header["id"])

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self.header["identity"])

    @property
    def context(self) -> int:
        """Tokens per sequence."""
        return int(self.identity["context"])

    @property
    def chunk_sequences(self) -> int:
        return int(self.identity["chunk_sequences"])

    @property
    def n_sequences(self) -> int:
        """Sequences planned; what is committed may still be less."""
        return int(self.header["n_sequences"])

    @property
    def n_chunks(self) -> int:
        return -(-self.n_sequences // self.chunk_sequences)

    @property
    def special_tokens(self) -> list[int]:
        """Ids of BOS, EOS, padding and the like: left out of training and of every metric."""
        return list(self.header["special_tokens"])

    @property
    def hooks(self) -> dict[str, dict[str, Any]]:
        """Hook name to {"d_model", "dtype", "id"}."""
        return dict(self.header["hooks"])

    def hook(self, name: str | None = None) -> str:
        """`name` if the store has it, or the only hook when none is named.

        Raises:
            ConfigError: no such hook, or several to choose from.
        """
        if name is None and len(self.hooks) == 1:
            return next(iter(self.hooks))
        if name is None:
            raise ConfigError(
                f"{self.name}: it holds {len(self.hooks)} hooks; choose one with --hook.{nearest('', self.hooks)}"
            )
        if name not in self.hooks:
            raise ConfigError(f"{self.name}: no hook '{name}'.{nearest(name, self.hooks)}")
        return name

    def d_model(self, hook: str) -> int:
        return int(self.hooks[hook]["d_model"])

    def dimension_scales(self, hook: str) -> np.ndarray | None:
        """Scale of each dimension of an int8 hook, float32 [d_model]; None for other types, which need none."""
        scales = self.hooks[hook].get("scales")
        return None if scales is None else np.asarray(scales, np.float32)

    def array_names(self) -> list[str]:
        return array_names(self.header)

    def spec(self, array: str) -> ArraySpec:
        """Shape, type and chunks of one of the store's arrays."""
        return array_spec(self.header, array)

    def sequences_in(self, chunk: int) -> int:
        """True sequences of a chunk; only the last one may have fewer than `chunk_sequences`."""
        return min(self.chunk_sequences, self.n_sequences - chunk * self.chunk_sequences)
