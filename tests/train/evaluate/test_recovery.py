"""Scores of recovery on dictionaries whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.stopping import Stop
from common.truth import Truth, read_truth
from harvest.config import ToyConfig
from harvest.synthesise import synthesise
from tests.train.runs import learner, run
from train.evaluate.recovery import Matching, cosines, edge_f1, edges_of, match, mmcs, recovery
from train.saes import load_sae, make_sae


def truth_of(directions: np.ndarray) -> Truth:
    """Two features of group a, the others of group b."""
    group = np.int32([0, 0] + [1] * (len(directions) - 2))
    edges, relations = np.zeros((0, 2), np.int32), np.zeros((0, 3), np.int32)
    return Truth(directions.astype(np.float32), ("a", "b"), group, np.zeros(len(group), np.float32), edges, relations)


def test_cosines_take_no_notice_of_sign_or_length() -> None:
    rows = torch.tensor([[2.0, 0.0], [-3.0, -4.0], [0.0, 0.0]])
    got = cosines(rows, np.array([[1.0, 0.0], [0.0, 5.0]]))
    assert got == pytest.approx(np.array([[1, 0.6, 0], [0, 0.8, 0]]))


def test_mmcs_lets_one_latent_serve_twice_and_the_pairing_does_not() -> None:
    cosine = np.array([[0.9, 0.2], [0.8, 0.1]])
    assert mmcs(cosine) == pytest.approx(0.85)
    found = match(cosine)  # .9 + .1 = 1.0 and .2 + .8 = 1.0 tie but for a hair
    cosine[1, 0] = 0.81
    found = match(cosine)
    assert found.latent.tolist() == [1, 0]
    assert found.cosine.tolist() == [0.2, 0.81]


def test_with_too_few_latents_some_feature_has_none() -> None:
    found = match(np.array([[0.5], [0.9], [0.7]]))
    assert found.latent.tolist() == [-1, 0, -1]
    assert found.cosine.tolist() == [0, 0.9, 0]
    assert found.matched().tolist() == [False, True, False]


def test_recovery_says_what_was_found_and_where() -> None:
    sae = make_sae("batchtopk", {"d_sae": 4, "k": 1}, 4, 0, "test")
    with torch.no_grad():  # features 0, 1, 2 are latents 3, 0, 1; feature 3 is seen only at cosine .6
        sae.W_dec.copy_(torch.tensor([[0, 1.0, 0, 0], [0, 0, -1, 0], [0, 0, 0.8, 0.6], [1, 0, 0, 0]]))
    got = recovery(sae, truth_of(np.eye(4)), {"first": slice(0, 2), "last": slice(2, None)})
    assert got == {
        "mmcs": pytest.approx(0.9),
        "matched_cosine": pytest.approx(0.9),
        "matched": 0.75,
        "matched_a": 1.0,
        "matched_b": 0.5,
        "placed": {"a": {"first": 0.5, "last": 0.5}, "b": {"first": 0.5, "last": 0.0}},
    }


def test_edge_f1_counts_edges_between_matched_latents() -> None:
    # features 0, 1, 2 are latents 5, 6, 7; feature 3 was not found (its latent 8 is not like it)
    matching = Matching(np.array([5, 6, 7, 8]), np.array([1.0, 0.9, 0.85, 0.3]))
    true = np.array([[0, 1], [0, 2], [0, 3]])
    said = [(5, 6), (6, 7), (5, 8), (1, 2)]  # right, wrong, and two that touch no matched latent
    assert edge_f1(said, true, matching) == {"precision": 0.5, "recall": pytest.approx(1 / 3), "f1": pytest.approx(0.4)}
    assert edge_f1([], true, matching) == {"precision": 0, "recall": 0, "f1": 0}


def test_edges_are_the_strongest_children() -> None:
    weights = torch.tensor([[0.5, 0.0], [0.1, 0.0], [0.3, 0.2]])
    assert edges_of(weights, first_parent=10, first_child=20, per_parent=2) == {(10, 20), (10, 22), (11, 22)}


def test_a_trained_sae_recovers_the_features_of_a_toy(tmp_path: Path) -> None:
    """Through the store and the trainer: a flat SAE of twice the features finds nearly all (spec §3: MMCS 1.00)."""
    store = tmp_path / "toy-m.zarr"
    synthesise(ToyConfig(name="toy-m", tokens=300_000, out=store), Stop())
    settings = {"steps": 400, "batch_size": 512, "log_every": 100, "checkpoint_every": 400}
    outcome = run(store, tmp_path / "r", learner("batchtopk", d_sae=96, k=3), **settings)
    truth = read_truth(store)
    got = recovery(load_sae(tmp_path / "r" / "batchtopk"), truth)
    # by chance: 96 random rows of 64 dimensions have a largest |cos| near .3
    chance = recovery(make_sae("batchtopk", {"d_sae": 96, "k": 3}, 64, 0, "test"), truth)
    assert chance["mmcs"] < 0.45
    assert got["mmcs"] > 0.9
    assert got["matched"] > 0.85
    assert outcome.learners["batchtopk"]["metrics"]["explained_variance"] > 0.85
