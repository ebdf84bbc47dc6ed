"""What can be said of a store without a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.layout import TOKENS, acts_array
from common.store import Store
from harvest.info import describe, first_texts
from tests.conftest import HOOK
from tests.stores import filled
from tests.warm import WarmServer


def test_describe_gives_progress_and_moments(store: Store) -> None:
    facts = describe(store)
    assert (facts["sequences"], facts["context"], facts["tokens"], facts["chunks"]) == (469, 64, 469 * 64, 8)
    assert facts["harvested"] == "100 %"
    hook = facts["hooks"][0]
    assert (hook["hook"], hook["d_model"], hook["chunks"]) == (HOOK, 16, 8)
    moments = store.moments(HOOK)
    assert hook["trainable_tokens"] == moments.count
    assert hook["variance_share"] == pytest.approx(moments.variance / moments.mean_squared_norm)


def test_describe_of_a_half_harvested_store_says_how_far_it_is(shared_store: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_store, tmp_path / "x.zarr")
    store = Store.open(tmp_path / "x.zarr")
    store.journal.rewrite(drop=[(acts_array(HOOK), chunk) for chunk in range(6)])
    assert describe(store)["harvested"] == "25 %"
    store.journal.rewrite(drop=list(store.journal.entries))
    facts = describe(store)
    assert facts["harvested"] == "0 %"
    assert facts["hooks"][0]["mean_squared_norm"] is None
    assert first_texts(store, 2) == []


def test_describe_rounds_down_to_what_is_harvested(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "x.zarr", n_sequences=4 * 300)
    store.journal.rewrite(drop=[(acts_array("a"), 7)])
    store.header = store.header | {"settings": {"model": "none"}}
    assert describe(store)["harvested"] == "99 %"  # 299 of 300 chunks


def test_first_texts_are_decoded_or_ids_when_the_model_is_gone(store: Store, tmp_path: Path) -> None:
    row = store.rows(TOKENS, 0, 1)[0]
    assert first_texts(store, 1) == [bytes(row[row < 256].astype(np.uint8)).decode()]
    store.header = store.header | {"settings": store.header["settings"] | {"model": str(tmp_path / "gone")}}
    assert first_texts(store, 1) == [" ".join(map(str, row))]


def test_cli_info_prints_tables_and_a_record(warm: WarmServer, shared_store: Path, tmp_path: Path) -> None:
    shown = warm.run(["harvest", "info", str(shared_store)], tmp_path)
    assert shown.code == 0, shown.err
    for text in ("identity", HOOK, "sequence 0: ", "30,016", "chunk_sequences"):
        assert text in shown.out
    record = json.loads(warm.run(["harvest", "info", str(shared_store), "--json"], tmp_path).out)
    assert record["id"] == Store.open(shared_store).id
    assert len(record["first_texts"]) == 2
    missing = warm.run(["harvest", "info", "none.zarr"], tmp_path)
    assert missing.code == 3
    assert missing.err == "StoreError: none.zarr: no store here. 'harvest list' shows the stores there are.\n"


def test_cli_list_shows_every_store_below_and_names_what_is_none(
    warm: WarmServer, shared_store: Path, tmp_path: Path
) -> None:
    empty = warm.run(["harvest", "list", "--json"], tmp_path)
    assert (empty.code, json.loads(empty.out)) == (0, [])
    empty = warm.run(["harvest", "list"], tmp_path)
    advice = "cache: no store here. Make one: harvest run --model demo --layer 3 --tokens 1M\n"
    assert (empty.code, empty.out, empty.err) == (0, "", advice)
    missing = warm.run(["harvest", "list", "nowhere"], tmp_path)
    assert (missing.code, missing.err) == (2, "ConfigError: nowhere: no such folder.\n")
    shutil.copytree(shared_store, tmp_path / "cache" / "deep" / "one.zarr")
    shutil.copytree(shared_store, tmp_path / "cache" / "two.zarr")
    (tmp_path / "cache" / "foreign.zarr").mkdir()
    (tmp_path / "cache" / "foreign.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    shutil.copytree(shared_store, tmp_path / "cache" / "other.zarr")
    changed = tmp_path / "cache" / "other.zarr" / "zarr.json"
    changed.write_text(changed.read_text().replace('"context": 64', '"context": 32'))
    (tmp_path / "cache" / "odd.zarr" / "zarr.json").mkdir(parents=True)
    listed = warm.run(["harvest", "list", "--json"], tmp_path)
    assert listed.code == 0, listed.err
    assert [store["path"] for store in json.loads(listed.out)] == ["cache/deep/one.zarr", "cache/two.zarr"]
    assert "foreign.zarr: a zarr group, but not one that harvest wrote" in listed.err
    assert "other.zarr: zarr.json was changed: the id is not that of the identity." in listed.err
    assert "odd.zarr/zarr.json: Is a directory" in listed.err
    itself = warm.run(["harvest", "list", "cache/two.zarr", "--json"], tmp_path)
    assert [store["path"] for store in json.loads(itself.out)] == ["cache/two.zarr"]
    damaged = warm.run(["harvest", "list", "cache/odd.zarr"], tmp_path)
    assert (damaged.code, damaged.out, damaged.err) == (0, "", "cache/odd.zarr/zarr.json: Is a directory\n")
    table = warm.run(["harvest", "list"], tmp_path).out
    assert "cache/two.zarr" in table
    assert HOOK in table
