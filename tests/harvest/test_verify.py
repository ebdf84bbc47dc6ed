"""Find and mend: every kind of damage is named, and the mended store has the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError, Interrupted, StoreError
from common.files import exclusive
from common.layout import SUMMARY, TOKENS, acts_array, norms_array, partial_array, summary_array
from common.stopping import Stop
from common.store import Store
from harvest import verify as module
from harvest.run import harvest
from harvest.verify import repair, verify
from tests.conftest import HOOK, harvest_config
from tests.harvest.conftest import go, small
from tests.harvest.conftest import overflowing as overflowing
from tests.stores import flip_bit, metadata_files, unequal
from tests.warm import WarmServer

ACTS = acts_array(HOOK)


@pytest.fixture
def copy(shared_store: Path, tmp_path: Path) -> Path:
    """A copy of the shared store, to be damaged."""
    shutil.copytree(shared_store, tmp_path / "x.zarr")
    return tmp_path / "x.zarr"


def chunk_file(path: Path, array: str, chunk: int) -> Path:
    return Store.open(path).chunk_path(array, chunk)


def damage_line(path: Path, array: str, chunk: int) -> int:
    """Change a digit in the middle of a chunk's journal line; the line's number."""
    lines = (path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    keys = [(record["array"], record["chunk"]) for record in map(json.loads, lines)]
    number = keys.index((array, chunk))
    lines[number] = lines[number].replace(b'"sequences":', b'"sequencez":')
    (path / "journal.jsonl").write_bytes(b"".join(lines))
    return number + 1


def flip_activation(path: Path) -> list[str]:
    flip_bit(chunk_file(path, ACTS, 2), 1000)
    return [f"{ACTS} chunk 2: checksum "]


def cut_chunk(path: Path) -> list[str]:
    file = chunk_file(path, ACTS, 0)
    file.write_bytes(file.read_bytes()[:-10])
    return [f"{ACTS} chunk 0: 131,062 bytes, but the journal says 131,072"]


def remove_norms(path: Path) -> list[str]:
    chunk_file(path, norms_array(HOOK), 7).unlink()
    return [f"{norms_array(HOOK)} chunk 7: the file is missing, but the journal has it"]


def flip_moments(path: Path) -> list[str]:
    flip_bit(chunk_file(path, partial_array(HOOK), 3))
    return [f"{partial_array(HOOK)} chunk 3: checksum "]


def flip_tokens(path: Path) -> list[str]:
    flip_bit(chunk_file(path, TOKENS, 4))
    return ["tokens chunk 4: checksum "]


def flip_documents_and_activations(path: Path) -> list[str]:
    flip_bit(chunk_file(path, "documents", 1))
    flip_bit(chunk_file(path, ACTS, 6))
    return [f"{ACTS} chunk 6: checksum ", "documents chunk 1: checksum "]


def wrong_token_with_a_right_checksum(path: Path) -> list[str]:
    store = Store.open(path)
    tokens = np.array(store.map_chunk(TOKENS, 5))
    tokens[3, 4] = 7_000
    store.commit([(TOKENS, 5, tokens, store.journal.entries[TOKENS, 5].extra)])
    return ["tokens chunk 5: token ids 10 to 7000, the vocabulary has 260"]


def tear_journal(path: Path) -> list[str]:
    with (path / "journal.jsonl").open("ab") as file:
        file.write(b'{"array":"tok')
    return ["journal.jsonl: unfinished last line (13 bytes)"]


def damage_line_of_activations(path: Path) -> list[str]:
    number = damage_line(path, ACTS, 2)
    return [f"journal.jsonl: line {number} does not match its checksum"]


def damage_line_of_tokens(path: Path) -> list[str]:
    number = damage_line(path, TOKENS, 3)
    return [f"journal.jsonl: line {number} does not match its checksum"]


def lose_two_neighbours(path: Path) -> list[str]:
    chunk_file(path, TOKENS, 4).unlink()
    number = damage_line(path, TOKENS, 3)
    return [f"journal.jsonl: line {number} does not match its checksum", "tokens chunk 4: the file is missing"]


def lose_tokens_with_their_line_and_damage_what_follows(path: Path) -> list[str]:
    chunk_file(path, "documents", 2).unlink()
    chunk_file(path, TOKENS, 2).unlink()
    flip_bit(chunk_file(path, TOKENS, 3))
    numbers = sorted(damage_line(path, array, 2) for array in (TOKENS, "documents"))
    lines = [f"journal.jsonl: line {number} does not match its checksum" for number in numbers]
    return [*lines, "tokens chunk 3: checksum "]


def spoil_metadata(path: Path) -> list[str]:
    (path / ACTS / "zarr.json").unlink()
    (path / "tokens" / "zarr.json").write_text("{")
    root = path / "zarr.json"
    root.write_text(root.read_text().replace('"consolidated_metadata"', '"consolidated_metadatum"'))
    return [
        "zarr.json: it is not what its header says",
        "tokens/zarr.json: it is missing, or not what the header says",
        f"{ACTS}/zarr.json: it is missing, or not what the header says",
    ]


def flip_summary(path: Path) -> list[str]:
    flip_bit(path / summary_array(HOOK, "mean") / "c" / "0", 6)  # in the exponent
    return [f"{summary_array(HOOK, 'mean')}: it does not hold the merged partial sums"]


def lose_and_cut_summaries(path: Path) -> list[str]:
    (path / summary_array(HOOK, "count") / "c" / "0").unlink()
    (path / summary_array(HOOK, "max_abs") / "c" / "0").write_bytes(b"")
    return [
        f"{summary_array(HOOK, 'count')}: the file is missing",
        f"{summary_array(HOOK, 'max_abs')}: 0 bytes, expected 8",
    ]


def flip_tokens_and_summary(path: Path) -> list[str]:
    return [*flip_tokens(path), *flip_summary(path)]


DAMAGE: list[Callable[[Path], list[str]]] = [
    flip_activation,
    cut_chunk,
    remove_norms,
    flip_moments,
    flip_tokens,
    flip_documents_and_activations,
    wrong_token_with_a_right_checksum,
    tear_journal,
    damage_line_of_activations,
    damage_line_of_tokens,
    lose_two_neighbours,
    lose_tokens_with_their_line_and_damage_what_follows,
    spoil_metadata,
    flip_summary,
    lose_and_cut_summaries,
    flip_tokens_and_summary,
]


def test_verify_of_a_whole_store_finds_nothing(shared_store: Path) -> None:
    report = verify(shared_store, Stop())
    assert (report.problems, report.missing) == ([], 0)
    assert report.checked == 8 * 5  # tokens, documents, activations, norms, partial sums


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_the_damage_and_repair_gives_the_same_bytes(
    damage: Callable[[Path], list[str]], copy: Path, shared_store: Path
) -> None:
    expected = damage(copy)
    found = [str(problem) for problem in verify(copy, Stop()).problems]
    assert len(found) == len(expected), found
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)
    report = repair(copy, Stop())
    assert (report.problems, report.missing) == ([], 0)
    assert unequal(copy, shared_store) == []
    assert metadata_files(copy) == metadata_files(shared_store)
    assert verify(copy, Stop()).problems == []


def test_repair_touches_only_what_is_damaged(copy: Path) -> None:
    flip_activation(copy)
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*") if "/c/" in file.as_posix() and file.is_file()}
    repair(copy, Stop())
    changed = {str(file.relative_to(copy)) for file, at in before.items() if file.stat().st_mtime_ns != at}
    summary = {f"moments/{HOOK}/{name}/c/0" for name in SUMMARY}
    assert changed - summary == {
        f"{ACTS}/c/2/0/0",
        f"{norms_array(HOOK)}/c/2/0",
        f"{partial_array(HOOK)}/c/2/0/0",
    }


def test_repair_of_a_whole_store_does_nothing(copy: Path) -> None:
    journal = (copy / "journal.jsonl").read_bytes()
    assert repair(copy, Stop()).problems == []
    assert (copy / "journal.jsonl").read_bytes() == journal


def test_repair_of_a_summary_needs_no_model(copy: Path, shared_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_summary(copy)
    monkeypatch.setattr(module, "plan_for_repair", None)
    assert repair(copy, Stop()).problems == []
    assert unequal(copy, shared_store) == []


def test_verify_of_a_longer_store_leaves_out_the_summaries_of_its_earlier_length(copy: Path) -> None:
    store = Store.open(copy)
    store.header = store.header | {"n_sequences": store.n_sequences + 64}
    store.write_metadata()
    flip_summary(copy)
    report = verify(copy, Stop())
    assert (report.problems, report.missing) == ([], 2)  # the last chunk has grown, and one is new


def test_repair_of_a_store_with_tokens_only_mends_its_journal(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    stop = Stop()
    config = harvest_config(tiny_model, texts, tmp_path / "x.zarr", tokens=4096)
    harvest(config, stop)
    store = Store.open(tmp_path / "x.zarr")
    store.journal.rewrite(drop=[key for key in store.journal.entries if "/" in key[0]])
    tear_journal(store.path)
    report = repair(store.path, stop)
    assert (report.problems, report.missing) == ([], 1)


def test_repair_refuses_when_the_corpus_has_changed(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    shutil.copytree(texts, tmp_path / "texts")
    harvest(harvest_config(tiny_model, tmp_path / "texts", tmp_path / "x.zarr", tokens=4096), Stop())
    (tmp_path / "texts" / "00.txt").write_text("other words\n")
    flip_bit(chunk_file(tmp_path / "x.zarr", ACTS, 0))
    with pytest.raises(StoreError, match=r"another one \(stored → asked\): corpus\.content: "):
        repair(tmp_path / "x.zarr", Stop())


def test_harvest_puts_a_file_back_that_is_gone_or_short(
    tiny_model: Path, texts: Path, copy: Path, shared_store: Path
) -> None:
    cut_chunk(copy)
    remove_norms(copy)
    outcome = harvest(harvest_config(tiny_model, texts, copy), Stop())
    assert outcome.tokens_harvested_now == (64 + 469 - 7 * 64) * 64
    assert unequal(copy, shared_store) == []


def test_harvest_refuses_tokens_that_do_not_match_their_checksum(tiny_model: Path, texts: Path, copy: Path) -> None:
    flip_tokens(copy)
    chunk_file(copy, ACTS, 4).unlink()
    with pytest.raises(StoreError, match=r"tokens chunk 4: checksum .* Run: harvest verify .* --repair"):
        harvest(harvest_config(tiny_model, texts, copy), Stop())


def test_verify_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store here"):
        verify(tmp_path / "x.zarr", Stop())


def test_cli_verify_names_damage_exits_3_and_repairs(warm: WarmServer, copy: Path, shared_store: Path) -> None:
    whole = warm.run(["harvest", "verify", str(copy)], copy.parent)
    assert whole.code == 0
    assert "40 chunk files checked, no problem" in whole.out
    flip_activation(copy)
    bad = warm.run(["harvest", "verify", str(copy)], copy.parent)
    assert bad.code == 3
    assert f"{ACTS} chunk 2: checksum " in bad.out
    assert bad.out.count("\n") == 1  # the count is told once, on stderr
    assert bad.err == f"StoreError: {copy}: 40 chunk files checked, 1 problem. Run: harvest verify {copy} --repair\n"
    record = warm.run(["harvest", "verify", str(copy), "--json"], copy.parent)
    assert record.code == 3
    assert json.loads(record.out)["problems"][0]["array"] == ACTS
    mended = warm.run(["harvest", "verify", str(copy), "--repair", "--json"], copy.parent)
    assert mended.code == 0, mended.err
    assert json.loads(mended.out) == {"problems": [], "checked": 40, "missing": 0}
    assert unequal(copy, shared_store) == []


def test_moments_of_a_damaged_store_are_refused(copy: Path) -> None:
    flip_moments(copy)
    with pytest.raises(StoreError, match="partial chunk 3: checksum"):
        Store.open(copy).moments(HOOK)
    with pytest.raises(DataError):
        Store.open(copy).moments(HOOK, [])


@pytest.mark.parametrize(
    ("damage", "stage", "left"),
    [
        (flip_documents_and_activations, "tokenise", {ACTS, "documents"}),
        (flip_documents_and_activations, "forward", {ACTS}),
        (damage_line_of_activations, "tokenise", {"journal.jsonl"}),
        (damage_line_of_activations, "forward", {"journal.jsonl"}),
    ],
)
def test_repair_that_is_killed_forgets_no_damage(
    damage: Callable[[Path], list[str]],
    stage: str,
    left: set[str],
    copy: Path,
    shared_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    damage(copy)
    monkeypatch.setattr(module, stage, killed)
    with pytest.raises(KeyboardInterrupt):
        repair(copy, Stop())
    monkeypatch.undo()
    assert {problem.array for problem in verify(copy, Stop()).problems} == left
    assert repair(copy, Stop()).problems == []
    assert unequal(copy, shared_store) == []


def test_repair_looks_only_when_no_other_process_writes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Path] = []
    monkeypatch.setattr(module, "verify", lambda path, stop: looked.append(path))
    with exclusive(copy, "store"), pytest.raises(StoreError, match="another process is writing this store"):
        repair(copy, Stop())
    assert looked == []


def test_repair_of_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store here"):
        repair(tmp_path / "x.zarr", Stop())
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize("command", [verify, repair])
def test_verify_ends_when_asked_to_stop(command: Callable[[Path, Stop], object], copy: Path) -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM while checking"):
        command(copy, Stop("SIGTERM"))


def test_repair_from_another_folder_finds_model_and_texts(
    tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "texts").symlink_to(texts)
    monkeypatch.chdir(tmp_path)
    harvest(harvest_config(Path("model"), Path("texts"), tmp_path / "x.zarr", tokens=4096), Stop())
    flip_bit(chunk_file(tmp_path / "x.zarr", ACTS, 0))
    monkeypatch.chdir(tmp_path / "here")
    assert repair(tmp_path / "x.zarr", Stop()).problems == []


def test_repair_masks_what_was_masked_in_a_second_try(overflowing: Path, texts: Path, tmp_path: Path) -> None:
    config = small(overflowing, texts, tmp_path / "x.zarr", dtype="float16")
    with pytest.raises(StoreError, match="Say --on-nonfinite mask"):
        go(config)
    go(config.model_copy(update={"on_nonfinite": "mask"}))
    shutil.copytree(tmp_path / "x.zarr", tmp_path / "whole.zarr")
    flip_bit(chunk_file(tmp_path / "x.zarr", ACTS, 1))
    assert repair(tmp_path / "x.zarr", Stop()).problems == []
    assert unequal(tmp_path / "x.zarr", tmp_path / "whole.zarr") == []


def test_repair_of_a_store_from_a_gpu_that_is_not_here_takes_what_there_is(copy: Path, shared_store: Path) -> None:
    store = Store.open(copy)
    store.header = store.header | {"settings": store.header["settings"] | {"device": "cuda:99"}}
    store.write_metadata()
    flip_activation(copy)
    assert repair(copy, Stop()).problems == []
    assert unequal(copy, shared_store) == []
