"""Toys: the numbers they are said to have, and stores that the other commands take for any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, Interrupted, StoreError
from common.layout import acts_array
from common.sources import find_model
from common.stopping import Stop
from common.store import Store
from common.truth import TOYS, TRUTH_FILE, read_truth
from harvest.config import ToyConfig
from harvest.info import describe, first_texts
from harvest.synthesise import HOOK, synthesise
from harvest.toys import LONGEST, MAKERS, SHORTEST, TokenStream, make_toy
from harvest.verify import repair, verify
from tests.stores import flip_bit, unequal
from tests.warm import WarmServer

every_toy = pytest.mark.parametrize("name", TOYS)


def made(path: Path, **more: object) -> Store:
    """4,000 tokens of toy-m in 125 sequences of 32, chunks of 16: the last one has 13."""
    values: dict[str, object] = {"name": "toy-m", "tokens": 4000, "context": 32, "chunk_sequences": 16, "out": path}
    synthesise(ToyConfig(**(values | more)), Stop())  # type: ignore[arg-type]
    return Store.open(path)


def activity(name: str, documents: int = 300) -> np.ndarray:
    return make_toy(name, 0).activity(np.random.default_rng(1), documents)


def test_the_names_are_one_list() -> None:
    assert tuple(MAKERS) == TOYS


@every_toy
def test_any_stretch_is_the_same_numbers(name: str) -> None:
    whole = TokenStream(make_toy(name, 0), 0).take(0, 30_000)  # three blocks of about 10,000
    part = TokenStream(make_toy(name, 0), 0).take(9_000, 21_000)
    for field in ("activations", "documents", "tokens"):
        assert np.array_equal(getattr(whole, field)[9_000:21_000], getattr(part, field))
    other = TokenStream(make_toy(name, 1), 1).take(0, 100)
    assert not np.allclose(whole.activations[:100], other.activations)


@every_toy
def test_documents_lie_end_to_end_with_the_lengths_said(name: str) -> None:
    stretch = TokenStream(make_toy(name, 0), 0).take(0, 20_000)
    numbers, lengths = np.unique(stretch.documents, return_counts=True)
    assert np.array_equal(numbers, np.arange(len(numbers)))
    assert (np.diff(stretch.documents) >= 0).all()
    assert lengths[:-1].min() >= SHORTEST
    assert lengths.max() <= LONGEST


@pytest.mark.parametrize(("name", "n_edges"), [("toy-h", 110), ("toy-h-independent", 110), ("toy-h-tree", 96)])
def test_a_child_is_active_only_with_a_parent(name: str, n_edges: int) -> None:
    truth, active = make_toy(name, 0).truth, activity(name)
    assert len(truth.edges) == n_edges == len(np.unique(truth.edges, axis=0))  # 24 + 72 (+ 14 shared)
    assert [len(truth.members(group)) for group in truth.groups] == [8, 24, 72]
    for child in np.unique(truth.edges[:, 1]):
        parents = truth.edges[truth.edges[:, 1] == child, 0]
        any_parent = active[..., parents].any(-1)
        assert not (active[..., child] & ~any_parent).any()
    # L0 = 8·.15 + 24·.075 + 72·.0375 = 5.7; a shared low is active nearly twice as often, 14·.037 more
    expected = 5.7 + (0.5 if n_edges == 110 else 0)
    assert active.sum(-1).mean() == pytest.approx(expected, abs=0.15)


def test_composed_directions_are_sums_of_their_children() -> None:
    truth = make_toy("toy-h", 0).truth
    for parent in range(8 + 24):
        total = truth.directions[truth.edges[truth.edges[:, 0] == parent, 1]].sum(0)
        assert truth.directions[parent] == pytest.approx(total / np.linalg.norm(total), abs=1e-5)
    flat = make_toy("toy-h-independent", 0).truth
    assert np.abs(np.triu(flat.directions @ flat.directions.T, 1)).max() < 0.6  # random rows of 64 dimensions


def test_a_target_follows_its_source_nine_times_in_ten() -> None:
    truth, active = make_toy("toy-t", 0).truth, activity("toy-t")
    assert len(truth.relations) == 8
    for source, target, lag in truth.relations:
        followed = active[:, lag:, target][active[:, :-lag, source]]
        assert followed.mean() == pytest.approx(0.9 + 0.1 * 0.05, abs=0.03)  # 3,800 sources: 6 deviations of .005
        assert active[..., source].mean() == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("name", ["toy-t", "toy-m"])
def test_runs_have_the_length_said(name: str) -> None:
    truth, active = make_toy(name, 0).truth, activity(name)
    for group in truth.groups:
        members = truth.members(group)
        length = truth.run_length[members[0]]
        if not length:
            continue
        on = active[..., members]
        stays = (on[:, 1:] & on[:, :-1]).sum() / on[:, :-1].sum()
        assert stays == pytest.approx(1 - 1 / length, abs=0.01)
        assert on.mean() == pytest.approx(1 / 16 if name == "toy-m" else 0.1, abs=0.01)


def test_activations_are_active_directions_with_noise() -> None:
    toy = make_toy("toy-m", 0)
    stretch = TokenStream(toy, 0).take(0, 20_000)
    quiet = stretch.activations[stretch.tokens == 48]  # no feature is active
    assert len(quiet) > 300
    assert quiet.std() == pytest.approx(0.05, rel=0.03)
    strongest = toy.truth.directions[stretch.tokens[stretch.tokens < 48]]
    along = (stretch.activations[stretch.tokens < 48] * strongest).sum(1)
    assert 0.4 < np.median(along) < 1.6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_toy_store_is_a_store(tmp_path: Path, dtype: str) -> None:
    store = made(tmp_path / "x.zarr", dtype=dtype)
    report = verify(store.path, Stop())
    assert (report.problems, report.missing, report.checked) == ([], 0, 5 * 8)
    facts = describe(store)
    assert (facts["model"], facts["tokens"], facts["harvested"]) == ("toy-m", 4000, "100 %")
    assert len(first_texts(store, 1)[0].split()) == 32
    stretch = TokenStream(make_toy("toy-m", 0), 0).take(0, 4000)
    acts = store.rows(acts_array(HOOK), 0, 125).astype(np.float32).reshape(4000, 64)
    assert acts == pytest.approx(stretch.activations, abs=1e-2 if dtype == "bfloat16" else 0)
    moments = store.moments(HOOK)
    assert moments.count == 4000
    assert moments.mean == pytest.approx(acts.astype(np.float64).mean(0), abs=1e-9)
    truth = read_truth(store.path)
    assert np.array_equal(truth.directions, make_toy("toy-m", 0).truth.directions)
    assert truth.groups == ("run-1", "run-3", "run-9", "run-27")


def test_stopped_or_extended_it_is_the_same_store(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole.zarr")
    made(tmp_path / "grown.zarr", tokens=1000)  # 32 sequences: two chunks, and a third of 13 in the end
    grown = made(tmp_path / "grown.zarr")
    assert grown.id == whole.id
    assert unequal(whole.path, grown.path) == []
    stopped = Stop("SIGTERM")
    config = ToyConfig(name="toy-m", tokens=4000, context=32, chunk_sequences=16, out=tmp_path / "late.zarr")
    with pytest.raises(Interrupted, match="the same command goes on"):
        synthesise(config, stopped)
    synthesise(config, Stop())
    assert unequal(whole.path, tmp_path / "late.zarr") == []


def test_damage_is_repaired_with_the_same_bytes(tmp_path: Path) -> None:
    whole, store = made(tmp_path / "whole.zarr"), made(tmp_path / "x.zarr")
    flip_bit(store.chunk_path(acts_array(HOOK), 3))
    assert len(verify(store.path, Stop()).problems) == 1
    assert repair(store.path, Stop()).problems == []
    assert unequal(whole.path, store.path) == []


def test_a_lost_or_torn_truth_is_told_and_brought_back(tmp_path: Path) -> None:
    file = made(tmp_path / "x.zarr").path / TRUTH_FILE
    whole = file.read_bytes()
    for left, told in ((None, "the file is missing"), (b"torn", "it cannot be read")):
        file.unlink()
        if left is not None:
            file.write_bytes(left)
        assert [str(problem) for problem in verify(file.parent, Stop()).problems] == [f"{TRUTH_FILE}: {told}"]
        assert repair(file.parent, Stop()).problems == []
        assert file.read_bytes() == whole


def test_a_toy_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 8 chunks of 16 sequences of 32 tokens, each 8 bytes of ids, 4 of norm and 64 floats
    size = 8 * 16 * 32 * (8 + 4 + 64 * 4)
    monkeypatch.setattr("harvest.prepare.free_bytes", lambda path: size - 1)
    with pytest.raises(StoreError, match=f"{size:,} bytes to write, {size - 1:,} free on the disk"):
        made(tmp_path / "x.zarr")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("harvest.prepare.free_bytes", lambda path: size)
    made(tmp_path / "x.zarr")
    monkeypatch.setattr("harvest.prepare.free_bytes", lambda path: 0)
    made(tmp_path / "x.zarr")  # all is there


def test_another_toy_in_the_place_is_refused_with_the_difference(tmp_path: Path) -> None:
    made(tmp_path / "x.zarr")
    with pytest.raises(StoreError, match=r"model\.toy: toy-m → toy-t.*seed: 0 → 1"):
        made(tmp_path / "x.zarr", name="toy-t", seed=1)


def test_a_store_without_truth_is_told(tmp_path: Path, shared_store: Path) -> None:
    with pytest.raises(StoreError, match="only stores of 'harvest toy' have a truth"):
        read_truth(shared_store)
    store = made(tmp_path / "x.zarr")
    (store.path / TRUTH_FILE).write_bytes(b"torn")
    with pytest.raises(StoreError, match="damaged"):
        read_truth(store.path)


def test_a_toy_is_no_language_model() -> None:
    with pytest.raises(ConfigError, match=r"has no language model\. Make one: harvest toy toy-h"):
        find_model("toy-h")


def test_the_command_makes_a_store(warm: WarmServer, tmp_path: Path) -> None:
    ended = warm.run(["harvest", "toy", "toy-h", "--tokens", "2k", "--context", "64", "--json"], tmp_path)
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    assert (record["path"], record["tokens"], record["hooks"]) == ("cache/toy-h.zarr", 2048, [HOOK])


def test_toy_never_takes_a_store_of_activations_for_its_own(shared_store: Path) -> None:
    with pytest.raises(StoreError, match=r"another one \(stored → asked\): .*model\.toy: None → toy-m"):
        made(shared_store)
