"""The harvest as a whole: create, continue, extend, add hooks, refuse."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config import build
from common.errors import ConfigError, DataError, StoreError
from common.models import LanguageModel, find_model, load_model
from common.stopping import Stop
from common.store import DOCUMENTS, TOKENS, Store, acts_array, norms_array
from harvest import run as module
from harvest.config import HarvestConfig
from harvest.run import Outcome, default_chunk, harvest
from tests.conftest import HOOK, harvest_config
from tests.stores import array_files, metadata_files, unequal
from tests.warm import WarmServer

OTHER = "blocks.0.hook_mlp_out"


def small(model: Path, texts: Path, out: Path, **more: Any) -> HarvestConfig:
    """1,600 tokens in 50 sequences of 32, chunks of 16: the last one has 2."""
    values = {"tokens": 1600, "context": 32, "chunk_sequences": 16, "batch_size": 8}
    return harvest_config(model, texts, out, **(values | more))


def go(config: HarvestConfig) -> Outcome:
    return harvest(config, Stop())


@pytest.fixture(scope="module")
def finished(tiny_model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished store. Only read."""
    out = tmp_path_factory.mktemp("finished") / "x.zarr"
    go(small(tiny_model, texts, out))
    return out


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model, with the byte `g` embedded as 1e20: far over what float16 holds."""
    folder = tmp_path_factory.mktemp("overflow") / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][ord("g")] = 1e20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- what a store holds ---------------------------------------------------------------------------------------


def test_harvest_store_is_complete_and_true(finished: Path, tiny_model: Path, texts: Path) -> None:
    store = Store.open(finished)
    assert (store.n_sequences, store.n_chunks, store.sequences_in(3)) == (50, 4, 2)
    assert store.usable_chunks(HOOK) == [0, 1, 2, 3]
    assert list(store.problems()) == []
    assert store.leftovers() == []
    tokens = store.rows(TOKENS, 0, 50)
    documents = store.rows(DOCUMENTS, 0, 50)
    first = next(iter(module.open_corpus(small(tiny_model, texts, finished).corpus_options()).documents()))
    assert tokens[0].tolist() == [256, *first.encode()[:31]]
    assert tokens[1].tolist() == [256, *first.encode()[31:62]]
    assert (documents[:2] == 0).all()
    model = load_model(find_model(str(tiny_model)), "cpu")
    acts = model.capture(torch.from_numpy(tokens.astype(np.int64)), [HOOK])[HOOK]
    stored = store.rows(acts_array(HOOK), 0, 50).astype(np.float32)
    assert np.allclose(stored, acts.numpy(), rtol=2**-8, atol=1e-5)  # bfloat16 keeps 8 bits
    assert np.allclose(store.rows(norms_array(HOOK), 0, 50), np.linalg.norm(stored, axis=-1), rtol=1e-5)


def test_harvest_a_second_time_does_nothing(finished: Path, tiny_model: Path, texts: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("c/*/**") if file.is_file()}
    outcome = go(small(tiny_model, texts, finished))
    assert (outcome.tokens, outcome.tokens_harvested_now, outcome.tokens_per_s) == (1600, 0, None)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_harvest_twice_gives_the_same_bytes(finished: Path, tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    go(small(tiny_model, texts, tmp_path / "x.zarr", writers=1))
    assert unequal(finished, tmp_path / "x.zarr") == []
    assert metadata_files(finished).keys() == metadata_files(tmp_path / "x.zarr").keys()


def test_harvest_two_hooks_later_equal_both_at_once(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    go(small(tiny_model, texts, tmp_path / "both.zarr", layer=(1, 2), hook=(OTHER,)))
    go(small(tiny_model, texts, tmp_path / "later.zarr"))
    outcome = go(small(tiny_model, texts, tmp_path / "later.zarr", layer=(2,), hook=(OTHER,)))
    assert outcome.tokens_harvested_now == 1600
    assert sorted(outcome.hooks) == sorted([HOOK, "blocks.2.hook_resid_post", OTHER])
    assert unequal(tmp_path / "both.zarr", tmp_path / "later.zarr") == []
    assert len(array_files(tmp_path / "later.zarr")) == 2 * 4 + 3 * (3 * 4 + 5)


@pytest.mark.parametrize("packing", ["packed", "document"])
def test_harvest_extended_equals_a_fresh_store_of_that_size(
    tiny_model: Path, texts: Path, tmp_path: Path, packing: str
) -> None:
    # "document" has 40 of them: 25 sequences first, 38 after
    sizes = (1600, 3000) if packing == "packed" else (25 * 32, 38 * 32)
    go(small(tiny_model, texts, tmp_path / "x.zarr", tokens=sizes[0], packing=packing))
    store = Store.open(tmp_path / "x.zarr")
    n = store.n_sequences
    before = {array: store.rows(array, 0, n).tobytes() for array in (TOKENS, DOCUMENTS, acts_array(HOOK))}
    outcome = go(small(tiny_model, texts, tmp_path / "x.zarr", tokens=sizes[1], packing=packing))
    store = Store.open(tmp_path / "x.zarr")
    assert store.n_sequences == -(-sizes[1] // 32)
    assert {array: store.rows(array, 0, n).tobytes() for array in before} == before
    go(small(tiny_model, texts, tmp_path / "fresh.zarr", tokens=sizes[1], packing=packing))
    assert unequal(tmp_path / "x.zarr", tmp_path / "fresh.zarr") == []
    assert list(store.problems()) == []
    whole = n // 16 * 16  # only the unfinished last chunk is done again
    assert outcome.tokens_harvested_now == (store.n_sequences - whole) * 32


def test_harvest_with_fewer_tokens_leaves_the_store_as_it_is(
    finished: Path, tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "x.zarr")
    assert go(small(tiny_model, texts, tmp_path / "x.zarr", tokens=320)).tokens == 1600
    assert unequal(finished, tmp_path / "x.zarr") == []


def test_harvest_dtypes_and_compression_hold_the_same_values(
    finished: Path, tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    go(small(tiny_model, texts, tmp_path / "f32.zarr", dtype="float32"))
    exact = Store.open(tmp_path / "f32.zarr").rows(acts_array(HOOK), 0, 50)
    rounded = torch.from_numpy(exact).bfloat16().float().numpy()
    assert np.array_equal(Store.open(finished).rows(acts_array(HOOK), 0, 50).astype(np.float32), rounded)
    go(small(tiny_model, texts, tmp_path / "zstd.zarr", compression="zstd"))
    packed = Store.open(tmp_path / "zstd.zarr")
    assert (
        packed.rows(acts_array(HOOK), 0, 50).tobytes() == Store.open(finished).rows(acts_array(HOOK), 0, 50).tobytes()
    )
    assert list(packed.problems()) == []


def test_harvest_without_bos_has_none(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    go(small(tiny_model, texts, tmp_path / "x.zarr", bos=False))
    store = Store.open(tmp_path / "x.zarr")
    assert not (store.rows(TOKENS, 0, 50) == 256).any()
    assert store.identity["bos"] is False


def test_default_chunk_is_about_64_mib() -> None:
    size = default_chunk(128, 2304, "bfloat16")
    assert size % 16 == 0
    assert 0.9 * 2**26 < size * 128 * 2304 * 2 <= 2**26
    assert default_chunk(2**20, 2**12, "float32") == 16


# ---- not enough text ------------------------------------------------------------------------------------------


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


def test_harvest_never_writes_into_a_folder_of_other_things(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "x.zarr").mkdir()
    (tmp_path / "x.zarr" / ".zgroup").write_text("a zarr of somebody else")
    with pytest.raises(StoreError, match=r"x\.zarr: other files are here, and no store\. Choose another --out\."):
        go(small(tiny_model, tmp_path / "x.txt", tmp_path / "x.zarr"))
    assert (tmp_path / "x.zarr" / ".zgroup").read_text() == "a zarr of somebody else"


# ---- refused --------------------------------------------------------------------------------------------------


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


def test_harvest_over_max_bytes_is_refused_before_it_begins(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    # 64 padded sequences of 32 tokens at 8 + 4 + 16 * 2 bytes
    size = 64 * 32 * (8 + 4 + 32)
    with pytest.raises(ConfigError, match=rf"--max-bytes {size - 1:,}: this store takes {size:,}\."):
        go(small(tiny_model, texts, tmp_path / "x.zarr", max_bytes=size - 1))
    assert not (tmp_path / "x.zarr").exists()
    outcome = go(small(tiny_model, texts, tmp_path / "x.zarr", max_bytes=size))
    assert outcome.bytes == size + 4 * 2 * 16 * 8  # and the partial sums, which depend on no token


def test_harvest_without_room_is_refused_before_it_begins(
    tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda path: 1000)
    with pytest.raises(StoreError, match=r"90,112 bytes to write, 1,000 free on the disk\."):
        go(small(tiny_model, texts, tmp_path / "x.zarr"))
    assert not (tmp_path / "x.zarr").exists()


def test_harvest_of_another_hook_counts_the_hooks_that_are_there(
    finished: Path, tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "x.zarr")
    config = small(tiny_model, texts, tmp_path / "x.zarr", layer=(2,))
    both = 64 * 32 * (8 + 2 * (4 + 32))
    with pytest.raises(ConfigError, match=rf"--max-bytes {both - 1:,}: this store takes {both:,}\."):
        go(config.model_copy(update={"max_bytes": both - 1}))
    monkeypatch.setattr(module, "free_bytes", lambda path: 50_000)  # the new hook takes 73,728
    with pytest.raises(StoreError, match=r"bytes to write, 50,000 free on the disk"):
        go(config)
    assert list(Store.open(tmp_path / "x.zarr").hooks) == [HOOK]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"context": 256, "tokens": 2560}, r"--context 256: .* takes at most 128 tokens"),
        ({"layer": (3,)}, r"layer 3, but .* has layers 0 to 2"),
        ({"hook": ("blocks.1.hook_resid_pots",)}, r"Did you mean 'blocks\.1\.hook_resid_post'\?"),
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


# ---- values that are not finite -------------------------------------------------------------------------------


def test_harvest_of_values_that_are_not_finite_is_an_error(overflowing: Path, texts: Path, tmp_path: Path) -> None:
    config = small(overflowing, texts, tmp_path / "x.zarr", dtype="float16")
    pattern = (
        r"x\.zarr blocks\.1\.hook_resid_post: [\d,]+ values are not finite, first in sequence \d+ "
        r"\(float16 storage\)\. Say --on-nonfinite mask"
    )
    with pytest.raises(StoreError, match=pattern):
        go(config)
    assert Store.open(config.store_path()).committed(acts_array(HOOK)) == []


def test_harvest_masks_values_that_are_not_finite(overflowing: Path, texts: Path, tmp_path: Path) -> None:
    config = small(overflowing, texts, tmp_path / "x.zarr", dtype="float16", on_nonfinite="mask")
    outcome = go(config)
    store = Store.open(config.store_path())
    tokens, acts = store.rows(TOKENS, 0, 50), store.rows(acts_array(HOOK), 0, 50)
    norms = store.rows(norms_array(HOOK), 0, 50)
    bad = np.isnan(norms)
    assert bad[tokens == ord("g")].all()
    assert 0 < bad.sum() < bad.size
    assert (acts[bad] == 0).all()
    assert np.isfinite(acts).all()
    assert outcome.nonfinite >= bad.sum()
    assert store.moments(HOOK).count == (~bad & (tokens != 256)).sum()
    assert list(store.problems()) == []


# ---- the command line -----------------------------------------------------------------------------------------


def arguments(model: Path, texts: Path, out: str, *more: str) -> list[str]:
    sizes = ["--tokens", "1600", "--context", "32", "--chunk-sequences", "16", "--batch-size", "8", "--device", "cpu"]
    places = ["--model", str(model), "--layer", "1", "--corpus", str(texts), "--out", out]
    return ["harvest", "run", *places, *sizes, *more]


def test_cli_dry_run_writes_nothing(warm: WarmServer, tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    ended = warm.run(arguments(tiny_model, texts, "x.zarr", "--dry-run", "--json"), tmp_path)
    assert ended.code == 0, ended.err
    facts = json.loads(ended.out)
    assert {key: facts[key] for key in ("path", "hooks", "sequences", "tokens", "chunks", "bytes")} == {
        "path": "x.zarr",
        "hooks": {HOOK: 16},
        "sequences": 50,
        "tokens": 1600,
        "chunks": 4,
        "bytes": 64 * 32 * 44,
    }
    assert facts["tokens_per_s"] > 0
    assert list(tmp_path.iterdir()) == []
    ended = warm.run(arguments(tiny_model, texts, "x.zarr", "--dry-run"), tmp_path)
    assert "50 in 4 chunks" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_cli_json_record_has_every_key(
    warm: WarmServer, finished: Path, tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    ended = warm.run(arguments(tiny_model, texts, "x.zarr", "--json"), tmp_path)
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    assert set(record) == {field.name for field in dataclasses.fields(Outcome)}
    assert (record["tokens"], record["hooks"], record["nonfinite"]) == (1600, [HOOK], 0)
    assert record["id"] == Store.open(finished).id
    assert unequal(finished, tmp_path / "x.zarr") == []


def test_cli_says_what_was_done_and_that_nothing_is_left(
    warm: WarmServer, tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    command = arguments(tiny_model, texts, "x")  # .zarr is added
    first = warm.run(command, tmp_path)
    assert (first.code, first.out) == (0, "")
    assert "x.zarr: 1,600 tokens at blocks.1.hook_resid_post" in first.err
    assert "tokens/s" in first.err
    again = warm.run(command, tmp_path)
    assert again.code == 0
    assert "nothing left to do" in again.err


def test_cli_errors_are_one_line_with_their_code(
    warm: WarmServer, tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    cases = [
        (["--hook", "blocks.7.hook_out"], 2, "ConfigError: --hook blocks.7.hook_out: layer 7"),
        (["--tokens", "many"], 2, "ConfigError: harvest run: tokens = 'many'"),
        (["--corpus", "none.txt"], 2, "ConfigError: --corpus none.txt: no such file or folder."),
        (["--tokens", "10M"], 4, "it ran dry at "),
    ]
    for number, (more, code, message) in enumerate(cases):
        ended = warm.run(arguments(tiny_model, texts, f"{number}.zarr", *more), tmp_path)
        assert ended.code == code
        assert message in ended.err
        assert "Traceback" not in ended.err
        assert ended.out == ""


# ---- the disk is full -----------------------------------------------------------------------------------------


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_harvest_on_a_full_disk_says_so_and_goes_on_with_more_room(
    little_disk: Path, tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "check_room", lambda plan: None)  # the disk fills while the harvest runs
    config = small(tiny_model, texts, little_disk / "x.zarr", tokens=12_800)
    with pytest.raises(StoreError, match=r"no space left on the disk: [\d,]+ bytes to write, [\d,]+ free\."):
        go(config)
    store = Store.open(config.store_path())
    assert store.journal.entries
    assert list(store.problems()) == []
    subprocess.run(["mount", "-o", "remount,size=8m", str(little_disk)], check=True)
    go(config)
    go(small(tiny_model, texts, tmp_path / "straight.zarr", tokens=12_800))
    assert unequal(config.store_path(), tmp_path / "straight.zarr") == []


def test_model_is_loaded_once_per_harvest(
    tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[LanguageModel] = []

    def counted(*args: Any, **options: Any) -> LanguageModel:
        loads.append(load_model(*args, **options))
        return loads[-1]

    monkeypatch.setattr(module, "load_model", counted)
    go(small(tiny_model, texts, tmp_path / "x.zarr"))
    assert len(loads) == 1


# ---- an extension that cannot be ------------------------------------------------------------------------------


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
    assert list(store.problems()) == []
    assert go(config).tokens_harvested_now == 0


def test_harvest_without_tokens_keeps_the_length_of_the_store(
    finished: Path, tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "x.zarr")
    sizes = {"context": 32, "chunk_sequences": 16, "batch_size": 8}
    places = {"model": str(tiny_model), "corpus": str(texts), "out": tmp_path / "x.zarr"}
    outcome = go(build(HarvestConfig, places | sizes | {"layer": (2,), "device": "cpu"}, "test"))
    assert (outcome.sequences, outcome.tokens_harvested_now) == (50, 1600)
    assert sorted(outcome.hooks) == [HOOK, "blocks.2.hook_resid_post"]


def test_harvest_never_takes_a_file_for_a_store(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "x.zarr").write_text("mine")
    with pytest.raises(StoreError, match=r"x\.zarr: a file, not a store\. Choose another --out\."):
        go(small(tiny_model, texts, tmp_path / "x.zarr"))
    assert (tmp_path / "x.zarr").read_text() == "mine"


def test_from_anywhere_keeps_names_that_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["gpt2", "a/b", "demo", "stdlib", "bytes", None]
    assert [module.from_anywhere(name) for name in names] == names
    assert module.from_anywhere("books") == str(tmp_path / "books")
    assert module.from_anywhere("books/x.txt") == str(tmp_path / "books" / "x.txt")


def test_the_same_command_restores_a_tokens_file_that_is_gone(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.zarr"
    harvest(harvest_config(tiny_model, texts, out), Stop())
    path = Store.open(out).chunk_path("tokens", 2)
    data = path.read_bytes()
    path.unlink()
    harvest(harvest_config(tiny_model, texts, out), Stop())
    assert path.read_bytes() == data
