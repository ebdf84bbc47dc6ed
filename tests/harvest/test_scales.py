"""int8 stores: what is in them is what the model said, to a ten-thousandth; whoever made them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from common.checks import problems
from common.files import fingerprint
from common.layout import acts_array, norms_array, token_scales_array
from common.store import Store
from harvest.chunks import HookBuffer
from harvest.info import describe
from harvest.moments import PartialSums
from tests.conftest import HOOK
from tests.harvest.conftest import go, small
from tests.stores import metadata_files, unequal
from train.data.reader import Batches

N, CONTEXT = 50, 32


@pytest.fixture(scope="module")
def exact(tiny_model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The activations in float32: [50, 32, 16]."""
    out = tmp_path_factory.mktemp("exact") / "x.zarr"
    go(small(tiny_model, texts, out, dtype="float32"))
    return Store.open(out).activations(HOOK, 0, N)


@pytest.fixture(scope="module")
def eight(tiny_model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as int8. Only read."""
    out = tmp_path_factory.mktemp("eight") / "x.zarr"
    go(small(tiny_model, texts, out, dtype="int8"))
    return out


def trainable(store: Store) -> np.ndarray:
    return ~np.isin(store.rows("tokens", 0, N), store.special_tokens)


def test_int8_store_gives_back_what_the_model_said(eight: Path, exact: np.ndarray) -> None:
    store = Store.open(eight)
    assert list(problems(store)) == []
    assert store.map_chunk(acts_array(HOOK), 0).dtype == np.int8
    back = store.activations(HOOK, 0, N)
    assert back.dtype == np.float32
    error = float(((back - exact) ** 2).sum() / (exact**2).sum())
    assert 0 < error < 2e-4
    assert np.allclose(store.rows(norms_array(HOOK), 0, N), np.linalg.norm(back, axis=-1), rtol=1e-5)
    kept = back[trainable(store)].astype(np.float64)
    moments = store.moments(HOOK)
    assert moments.count == len(kept)
    assert np.allclose(moments.mean, kept.mean(0), atol=1e-6)
    assert np.allclose(moments.second_moment, (kept**2).mean(0), rtol=1e-5)


def test_int8_store_knows_its_error(eight: Path, exact: np.ndarray) -> None:
    store = Store.open(eight)
    kept = trainable(store)
    back = store.activations(HOOK, 0, N)[kept].astype(np.float64)
    expected = ((back - exact[kept]) ** 2).sum() / (back**2).sum()
    assert describe(store)["hooks"][0]["storage_error"] == pytest.approx(expected, rel=1e-4)


def test_int8_scales_are_those_of_the_first_tokens_and_part_of_the_identity(eight: Path, exact: np.ndarray) -> None:
    store = Store.open(eight)
    scales = store.dimension_scales(HOOK)
    assert scales is not None
    first = exact[:16][trainable(store)[:16]].astype(np.float64)  # the first chunk is smaller than the sample
    assert np.allclose(scales, np.sqrt((first**2).mean(0)), rtol=1e-5)
    info = store.hooks[HOOK]
    assert info["id"] == fingerprint({"store": store.id, "hook": HOOK, "scales": info["scales"]})
    assert store.identity["dtype"] == "int8"


def test_int8_store_opens_in_zarr_alone(eight: Path) -> None:
    group: Any = zarr.open_group(eight, mode="r")
    stored = group[f"acts/{HOOK}"][:]
    token = group[f"token_scales/{HOOK}"][:]
    scales = np.asarray(group.attrs["granary"]["hooks"][HOOK]["scales"], np.float32)
    assert stored.dtype == np.int8
    assert np.array_equal(stored * token[..., None] * scales, Store.open(eight).activations(HOOK, 0, N))


def test_int8_store_is_extended_and_repaired_with_its_own_scales(
    eight: Path, tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.zarr"
    shutil.copytree(eight, path)
    store = Store.open(path)
    before = store.activations(HOOK, 0, N)
    store.chunk_path(token_scales_array(HOOK), 1).write_bytes(b"")
    go(small(tiny_model, texts, path, dtype="int8"))
    assert unequal(path, eight) == []
    assert metadata_files(path) == metadata_files(eight)
    go(small(tiny_model, texts, path, dtype="int8", tokens=3000))
    longer = Store.open(path)
    assert longer.hooks[HOOK]["id"] == store.hooks[HOOK]["id"]
    assert np.array_equal(longer.activations(HOOK, 0, N), before)


def test_int8_batches_are_what_the_store_gives(eight: Path) -> None:
    store = Store.open(eight)
    batches = Batches.of(store)
    batch = batches.batch(0, 64)
    again = batches.batch(0, 64, reuse=True)
    batches.close()
    assert batch.x.dtype == torch.float32
    assert torch.equal(batch.x, again.x)
    rows = {row.tobytes() for row in store.activations(HOOK, 0, N).reshape(-1, 16)}
    assert all(row.tobytes() in rows for row in batch.x.view(-1, 16).numpy())


def test_int8_token_that_is_not_finite_is_masked_and_counted() -> None:
    sums = PartialSums(2, torch.device("cpu"))
    memory = (torch.empty(1, 3, 2, dtype=torch.int8), torch.empty(1, 3), sums, torch.ones(2), torch.empty(1, 3))
    buffer = HookBuffer(*memory)
    buffer.reset()
    x = torch.tensor([[[1.0, -1.0], [torch.nan, 1.0], [2.0, 0.1]]])
    pairs = buffer.encode(x, torch.ones(1, 3, dtype=torch.bool))
    q, norms, token = (values for _, values in pairs)
    assert q.tolist() == [[[127, -127], [0, 0], [127, 6]]]
    assert norms.isnan().tolist() == [[False, True, False]]
    assert token[0, 1] == 0
    _, facts = buffer.partial.result()
    assert (facts["count"], facts["nonfinite"], facts["first_nonfinite_sequence"]) == (2, 1, 0)
    assert buffer.squared_error is not None
    assert float(buffer.squared_error) == pytest.approx((0.1 - 6 * 2 / 127) ** 2, rel=1e-4)
