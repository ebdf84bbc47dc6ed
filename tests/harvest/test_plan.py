"""What is asked made exact, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from common.config import build
from common.errors import ConfigError, StoreError
from common.layout import acts_array
from common.models import LanguageModel, load_model
from common.store import Store
from harvest import plan
from harvest.config import HarvestConfig
from harvest.plan import default_chunk
from tests.conftest import HOOK
from tests.harvest.conftest import go, small
from tests.stores import array_files, metadata_files


@pytest.mark.parametrize(
    ("n_sequences", "context", "widths", "dtype", "expected"),
    [
        (10**6, 128, (2304,), "bfloat16", 112),  # of 589,824 bytes each: 113.8 fill 64 MiB
        (10**6, 128, (2304, 4608), "bfloat16", 48),  # the widest hook counts: 56.9 fill 64 MiB
        (10**6, 2**20, (2**12,), "float32", 16),
        (3, 2**20, (2**12,), "float32", 3),
        (50, 128, (2304,), "bfloat16", 50),  # a small store is one chunk
        (50, 32, (16,), "bfloat16", 52),  # 1,024 bytes each: a page holds 4
        (50, 32, (16, 8), "bfloat16", 56),  # 8 at the other hook
        (50, 127, (2305,), "bfloat16", 50),  # 585,470 bytes each: only 2,048 would make whole pages
    ],
)
def test_default_chunk_is_about_64_mib_or_the_store_in_whole_pages(
    n_sequences: int, context: int, widths: tuple[int, ...], dtype: str, expected: int
) -> None:
    assert default_chunk(n_sequences, context, widths, dtype) == expected


def test_a_tiny_store_takes_little_room_and_keeps_its_chunks_when_extended(
    tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.zarr"
    assert go(small(tiny_model, texts, out, chunk_sequences=None)).sequences == 50
    store = Store.open(out)
    assert (store.chunk_sequences, store.n_chunks) == (52, 1)
    assert store.chunk_path(acts_array(HOOK), 0).stat().st_size == 52 * 32 * 16 * 2 == 13 * 4096
    go(small(tiny_model, texts, out, chunk_sequences=None, tokens=3200))
    store = Store.open(out)
    assert (store.n_sequences, store.chunk_sequences, store.n_chunks) == (100, 52, 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"context": 256, "tokens": 2560}, r"--context 256: .* takes at most 128 tokens"),
        ({"layer": (3,)}, r"^--layer 3: .* has layers 0 to 2\.$"),
        ({"layer": (-1,)}, r"^--layer -1: .* has layers 0 to 2\.$"),
        (
            {"layer": (), "hook": ("blocks.3.hook_resid_post",)},
            r"^--hook blocks\.3.*: layer 3, but .* has layers 0 to 2",
        ),
        ({"hook": ("blocks.1.hook_resid_pots",)}, r"Did you mean 'blocks\.1\.hook_resid_post'\?"),
        ({"split": "heldout"}, r"^--split has no effect with --corpus .*texts.*: leave it out\.$"),
        ({"corpus": "stdlib", "separator": "x"}, r"^--separator has no effect with --corpus stdlib: leave it out\.$"),
        ({"revision": "main"}, r"^--revision has no effect with --model .*, a folder: leave it out\.$"),
        ({"device": "warp"}, r"--device warp: not on this machine\. There is: cpu"),
    ],
)
def test_harvest_names_what_cannot_be(
    tiny_model: Path, texts: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        go(small(tiny_model, texts, tmp_path / "x.zarr", **more))
    assert not (tmp_path / "x.zarr").exists()


def test_harvest_needs_a_layer_or_a_hook(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="name at least one --layer or --hook"):
        build(HarvestConfig, {"model": str(tiny_model)}, "harvest run")


def test_model_is_loaded_once_per_harvest(
    tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[LanguageModel] = []

    def counted(*args: Any, **options: Any) -> LanguageModel:
        loads.append(load_model(*args, **options))
        return loads[-1]

    monkeypatch.setattr(plan, "load_model", counted)
    go(small(tiny_model, texts, tmp_path / "x.zarr"))
    assert len(loads) == 1


def test_harvest_never_takes_a_file_for_a_store(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "x.zarr").write_text("mine")
    with pytest.raises(StoreError, match=r"x\.zarr: a file, not a store\. Choose another --out\."):
        go(small(tiny_model, texts, tmp_path / "x.zarr"))
    assert (tmp_path / "x.zarr").read_text() == "mine"


def test_harvest_of_another_identity_is_refused_with_the_difference(
    finished: Path, tiny_model: Path, texts: Path, overflowing: Path
) -> None:
    before = metadata_files(finished) | array_files(finished)
    with pytest.raises(
        StoreError, match=r"another one \(stored → asked\): context: 32 → 64; dtype: bfloat16 → float32\."
    ):
        go(small(tiny_model, texts, finished, context=64, dtype="float32"))
    with pytest.raises(StoreError, match=r"corpus\.content: [0-9a-f]{12}… → [0-9a-f]{12}…; .*seed: 0 → 1"):
        go(small(tiny_model, texts, finished, seed=1))
    with pytest.raises(StoreError, match=r"model\.weights: [0-9a-f]{12}… → [0-9a-f]{12}…\. Choose another --out"):
        go(small(overflowing, texts, finished))
    assert metadata_files(finished) | array_files(finished) == before


def test_harvest_without_tokens_keeps_the_length_of_the_store(
    finished: Path, tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "x.zarr")
    sizes = {"context": 32, "chunk_sequences": 16, "batch_size": 8}
    places = {"model": str(tiny_model), "corpus": str(texts), "out": tmp_path / "x.zarr"}
    outcome = go(build(HarvestConfig, places | sizes | {"layer": (2,), "device": "cpu"}, "test"))
    assert (outcome.sequences, outcome.tokens_harvested_now) == (50, 1600)
    assert sorted(outcome.hooks) == [HOOK, "blocks.2.hook_resid_post"]


@pytest.mark.parametrize(
    ("device", "asked", "size"), [("cpu", None, 128), ("cuda", None, 1024), ("cuda", 5, 5)]
)  # 4,096 and 32,768 tokens in sequences of 32
def test_batch_size_follows_from_the_kind_of_device(
    tiny_model: Path, texts: Path, tmp_path: Path, device: str, asked: int | None, size: int
) -> None:
    made = plan.make_plan(small(tiny_model, texts, tmp_path / "x.zarr", batch_size=asked), elsewhere=device)
    assert made.batch_size == size
    assert made.identity["model_dtype"] == ("float32" if device == "cpu" else "bfloat16")


def test_plan_for_repair_asks_for_the_revisions_of_then(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HarvestConfig] = []

    def noted(config: HarvestConfig) -> object:
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "make_plan", noted)
    store = Store.open(finished)
    hub = {"model": {"name": "a/b", "revision": "f00d"}, "corpus": {"name": "c/d", "revision": "beef"}}
    store.header = store.header | {"identity": store.identity | hub}
    with pytest.raises(KeyboardInterrupt):
        plan.plan_for_repair(store)
    assert (asked[0].revision, asked[0].corpus_revision) == ("f00d", "beef")
