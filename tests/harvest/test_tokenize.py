"""The stage that tokenises: too little text, and tokens that are gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.checks import problems
from common.errors import DataError
from common.layout import DOCUMENTS, TOKENS, acts_array
from common.stopping import Stop
from common.store import Store
from harvest.info import describe
from harvest.run import harvest
from harvest.verify import verify
from tests.conftest import HOOK, harvest_config
from tests.harvest.conftest import go, small
from tests.stores import metadata_files, unequal
from tests.warm import WarmServer


def test_harvest_of_a_dry_corpus_says_both_numbers(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a" * 1000)  # with a BOS in each sequence of 32: 32 whole ones
    config = small(tiny_model, tmp_path / "x.txt", tmp_path / "x.zarr")
    message = r"it ran dry at 1,024 tokens, --tokens asked for 1,600\. Say --allow-fewer, or --tokens 1024\."
    with pytest.raises(DataError, match=message):
        go(config)
    with pytest.raises(DataError, match=message):  # what was tokenised stays, and still is not enough
        go(config)
    assert go(config.model_copy(update={"tokens": 1024})).tokens == 1024
    outcome = go(small(tiny_model, tmp_path / "x.txt", tmp_path / "y.zarr", allow_fewer=True))
    assert (outcome.tokens, outcome.sequences) == (1024, 32)
    assert unequal(tmp_path / "x.zarr", tmp_path / "y.zarr") == []


def test_harvest_that_took_fewer_still_refuses_more_unless_allowed(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a" * 1000)
    config = small(tiny_model, tmp_path / "x.txt", tmp_path / "x.zarr", allow_fewer=True)
    go(config)
    assert go(config).tokens_harvested_now == 0
    with pytest.raises(DataError, match="it ran dry at 1,024 tokens, --tokens asked for 1,600"):
        go(config.model_copy(update={"allow_fewer": False}))


def test_harvest_of_an_empty_text_leaves_nothing_behind(warm: WarmServer, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n")
    ended = warm.run(
        ["harvest", "run", "--model", str(tiny_model), "--layer", "1", "--corpus", "x.txt", "--out", "out/x.zarr"],
        tmp_path,
    )
    assert ended.code == 4
    assert "not even one sequence of 128 tokens of text in it" in ended.err
    assert not (tmp_path / "out" / "x.zarr").exists()


def test_harvest_extension_that_the_corpus_cannot_fill_leaves_the_store_as_it_was(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text("a" * 1000)  # 32 sequences of 32
    config = small(tiny_model, tmp_path / "x.txt", tmp_path / "x.zarr", tokens=640)  # 20: the second chunk has 4
    go(config)
    store, metadata = Store.open(config.store_path()), metadata_files(config.store_path())
    before = {array: store.rows(array, 0, 20).tobytes() for array in (TOKENS, DOCUMENTS, acts_array(HOOK))}
    with pytest.raises(DataError, match="it ran dry at 1,024 tokens, --tokens asked for 1,600"):
        go(config.model_copy(update={"tokens": 1600, "layer": (1, 2)}))
    after = metadata_files(config.store_path())
    assert {name: after[name] for name in metadata} == metadata
    store = Store.open(config.store_path())
    assert {array: store.rows(array, 0, 20).tobytes() for array in before} == before
    assert store.usable_chunks(HOOK) == [0, 1]
    assert list(problems(store)) == []
    assert go(config).tokens_harvested_now == 0


def test_tokens_beyond_the_length_of_a_store_are_not_counted(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a" * 1600)  # 51 sequences of 32: three whole chunks
    config = small(tiny_model, tmp_path / "x.txt", tmp_path / "x.zarr", tokens=640)
    size = go(config).bytes
    checked, shown = verify(config.store_path(), Stop()).checked, describe(Store.open(config.store_path()))
    with pytest.raises(DataError, match="it ran dry at 1,632 tokens"):
        go(config.model_copy(update={"tokens": 3200}))
    assert (TOKENS, 2) in Store.open(config.store_path()).journal.entries
    assert go(config).bytes == size
    assert verify(config.store_path(), Stop()).checked == checked
    assert describe(Store.open(config.store_path())) == shown


def test_the_same_command_restores_a_tokens_file_that_is_gone(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.zarr"
    harvest(harvest_config(tiny_model, texts, out), Stop())
    path = Store.open(out).chunk_path("tokens", 2)
    data = path.read_bytes()
    path.unlink()
    harvest(harvest_config(tiny_model, texts, out), Stop())
    assert path.read_bytes() == data
