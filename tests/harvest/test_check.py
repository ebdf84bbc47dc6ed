"""`harvest info --check`: figures computed again from the data, and the mistakes that it must see."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.arrays import encode_chunk
from common.files import crc32c
from common.layout import TOKENS, acts_array, norms_array, partial_array, summary_array
from common.store import Store
from harvest.check import recompute
from tests.conftest import HOOK
from tests.harvest.conftest import go, small
from tests.stores import filled
from tests.warm import WarmServer


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Store:
    shutil.copytree(finished, tmp_path / "x.zarr")
    return Store.open(tmp_path / "x.zarr")


def wrong(store: Store) -> list[tuple[str, int | None]]:
    return [(problem.array, problem.chunk) for problem in recompute(store)]


def alter(store: Store, array: str, chunk: int, position: int, factor: float) -> None:
    """Change one value of a chunk, with a journal that agrees: no checksum tells."""
    data = store.map_chunk(array, chunk).copy()
    data.reshape(-1)[position] *= factor
    encoded = encode_chunk(store.spec(array), data)
    store.chunk_path(array, chunk).write_bytes(encoded)
    entry = store.journal.entries[array, chunk]
    store.journal.append([replace(entry, crc32c=crc32c(np.frombuffer(encoded, np.uint8)))])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_recompute_agrees_with_a_true_store(tiny_model: Path, texts: Path, tmp_path: Path, dtype: str) -> None:
    go(small(tiny_model, texts, tmp_path / "x.zarr", dtype=dtype, packing="document", tokens=1000, allow_fewer=True))
    assert wrong(Store.open(tmp_path / "x.zarr")) == []


def test_recompute_agrees_with_a_store_half_harvested(copy: Store) -> None:
    copy.journal.rewrite(drop=[(acts_array(HOOK), 1), (acts_array(HOOK), 3)])
    assert wrong(Store.open(copy.path)) == []


def test_recompute_sees_what_no_checksum_tells(copy: Store) -> None:
    alter(copy, acts_array(HOOK), 1, 16 * 7 + 3, 2.0)
    assert wrong(Store.open(copy.path))[:2] == [(norms_array(HOOK), 1), (partial_array(HOOK), 1)]
    alter(copy, acts_array(HOOK), 1, 16 * 7 + 3, 0.5)
    assert wrong(Store.open(copy.path)) == []
    alter(copy, norms_array(HOOK), 2, 5, 1.001)
    assert wrong(Store.open(copy.path)) == [(norms_array(HOOK), 2)]
    alter(copy, norms_array(HOOK), 2, 5, 1 / 1.001)
    alter(copy, partial_array(HOOK), 0, 3, 1.0001)
    assert wrong(Store.open(copy.path)) == [(partial_array(HOOK), 0)]
    alter(copy, partial_array(HOOK), 0, 3, 1 / 1.0001)
    entry = copy.journal.entries[partial_array(HOOK), 0]
    copy.journal.append([replace(entry, extra=entry.extra | {"count": entry.extra["count"] - 1})])
    assert wrong(Store.open(copy.path)) == [(partial_array(HOOK), 0)]


def test_recompute_sees_a_wrong_summary_and_a_short_file(copy: Store) -> None:
    file = copy.chunk_path(summary_array(HOOK, "mean"), 0)
    values = np.frombuffer(file.read_bytes(), np.float64).copy()
    values[4] += 0.01
    file.write_bytes(values.tobytes())
    assert wrong(Store.open(copy.path)) == [(summary_array(HOOK, "mean"), None)]
    copy.chunk_path(acts_array(HOOK), 2).write_bytes(b"short")
    assert wrong(Store.open(copy.path)) == [(acts_array(HOOK), 2)]
    copy.chunk_path(TOKENS, 1).write_bytes(b"short")
    assert wrong(Store.open(copy.path)) == [(TOKENS, 1), (acts_array(HOOK), 2)]


def test_recompute_names_a_hook_that_cannot_be_decompressed(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr", compression="zstd")
    file = store.chunk_path(acts_array("a"), 1)
    file.write_bytes(b"x" * file.stat().st_size)
    assert next(str(problem) for problem in recompute(store)).startswith("acts/a: it cannot be read (")


def test_recompute_sees_norms_that_were_made_up(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr", dtype="float32")  # random norms, and special tokens counted as text
    assert {(norms_array("a"), chunk) for chunk in range(3)} <= set(wrong(store))


def test_cli_info_check_says_so_and_exits_3(warm: WarmServer, copy: Store) -> None:
    ended = warm.run(["harvest", "info", str(copy.path), "--check"], copy.path.parent)
    assert ended.code == 0, ended.err
    assert "moments and norms agree with the data" in ended.err
    alter(copy, acts_array(HOOK), 1, 16 * 7 + 3, 2.0)
    ended = warm.run(["harvest", "info", str(copy.path), "--check", "--json"], copy.path.parent)
    assert ended.code == 3
    assert [problem["array"] for problem in json.loads(ended.out)["check"]][:1] == [norms_array(HOOK)]
    assert "figures that are not those of the data. Run: harvest verify" in ended.err
