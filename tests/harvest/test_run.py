"""The harvest as a whole: create, continue, extend, add hooks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checks import problems
from common.corpus import open_corpus
from common.layout import DOCUMENTS, TOKENS, acts_array, norms_array
from common.models import load_model
from common.places import local_path
from common.sources import find_model
from common.store import Store
from harvest.run import Outcome, describe_dry_run, dry_run
from tests.conftest import HOOK
from tests.harvest.conftest import go, small
from tests.stores import array_files, metadata_files, unequal
from tests.warm import WarmServer

OTHER = "blocks.0.hook_mlp_out"


def test_harvest_store_is_complete_and_true(finished: Path, tiny_model: Path, texts: Path) -> None:
    store = Store.open(finished)
    assert (store.n_sequences, store.n_chunks, store.sequences_in(3)) == (50, 4, 2)
    assert store.usable_chunks(HOOK) == [0, 1, 2, 3]
    assert list(problems(store)) == []
    assert store.leftovers() == []
    tokens = store.rows(TOKENS, 0, 50)
    documents = store.rows(DOCUMENTS, 0, 50)
    first = next(iter(open_corpus(small(tiny_model, texts, finished).corpus_options()).documents()))
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
    assert list(problems(store)) == []
    whole = n // 16 * 16  # only the unfinished last chunk is done again
    assert outcome.tokens_harvested_now == (store.n_sequences - whole) * 32


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
    assert list(problems(packed)) == []


def test_harvest_without_bos_has_none(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    go(small(tiny_model, texts, tmp_path / "x.zarr", bos=False))
    store = Store.open(tmp_path / "x.zarr")
    assert not (store.rows(TOKENS, 0, 50) == 256).any()
    assert store.identity["bos"] is False


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
        (["--tokens", "many"], 2, "ConfigError: --tokens many: a whole number is needed, such as 4096, 64k or 10M."),
        (["--corpus", "none.txt"], 2, "ConfigError: --corpus none.txt: no such file or folder."),
        (["--tokens", "10M"], 4, "it ran dry at "),
    ]
    for number, (more, code, message) in enumerate(cases):
        ended = warm.run(arguments(tiny_model, texts, f"{number}.zarr", *more), tmp_path)
        assert ended.code == code
        assert message in ended.err
        assert "Traceback" not in ended.err
        assert ended.out == ""


def test_layer_is_the_hidden_state_after_it_and_the_last_one_comes_before_the_final_norm(
    tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    go(small(tiny_model, texts, tmp_path / "x.zarr", layer=(1, 2), dtype="float32"))
    found = Store.open(tmp_path / "x.zarr")
    model = AutoModel.from_pretrained(tiny_model).eval()
    with torch.inference_mode():
        states = model(torch.from_numpy(found.rows(TOKENS, 0, 4)).long(), output_hidden_states=True).hidden_states
    inner, last = (torch.from_numpy(found.rows(acts_array(f"blocks.{n}.hook_resid_post"), 0, 4).copy()) for n in (1, 2))
    assert torch.allclose(inner, states[2], atol=1e-5)
    assert not torch.allclose(last, states[3], atol=0.1)
    with torch.inference_mode():
        assert torch.allclose(model.final_layer_norm(last), states[3], atol=1e-4)


def test_dry_run_of_a_url_names_it_and_no_disk(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    facts = dry_run(small(tiny_model, texts, local_path("memory://grain/x.zarr")))
    assert (facts["path"], facts["free_bytes"]) == ("memory://grain/x.zarr", None)
    rows = dict(describe_dry_run(facts))
    assert (rows["store"], rows["size"]) == ("memory://grain/x.zarr", "90.1 kB")
