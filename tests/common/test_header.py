"""What the header of a store says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError
from common.store import Store
from tests.stores import filled, header


def test_hook_is_the_only_one_or_must_be_named(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr")
    assert store.hook() == "a"
    assert store.hook("a") == "a"
    with pytest.raises(ConfigError, match=r"no hook 'b'\. Known: a\."):
        store.hook("b")
    store.header = store.header | {"hooks": store.hooks | {"b": store.hooks["a"]}}
    with pytest.raises(ConfigError, match=r"it holds 2 hooks; choose one with --hook\. Known: a, b\."):
        store.hook()


def test_id_follows_the_identity_alone(tmp_path: Path) -> None:
    one = Store.create(tmp_path / "1.zarr", header(n_sequences=10))
    two = Store.create(tmp_path / "2.zarr", header(n_sequences=20))
    three = Store.create(tmp_path / "3.zarr", header(dtype="float32"))
    assert one.id == two.id != three.id
    assert len(one.id) == 64
