"""Proxies by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.store import Store
from tests.train.evaluate.samples import sample_of
from tests.train.evaluate.test_subject import subject_on
from train.evaluate.proxies import (
    AROUND,
    Attributes,
    Neighbours,
    around,
    best_attribute,
    context_embeddings,
    entropy_bits,
    figures_at,
    mean_cosine,
    purity,
    random_places,
    top_places,
)
from train.evaluate.sample import read_sample
from train.evaluate.targets import Target

TOKEN = [5, 6, 7, 5, 6, 6, 8, 5, 9, 9]
DOC = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
VALUES = [1.0, 0, 4, 3, 2, 2, 0, 0, 0, 9]


def test_top_places_are_the_strongest_of_each_document() -> None:
    codes = np.array([VALUES]).T
    assert top_places(sample_of(TOKEN, DOC, codes), 0).tolist() == [9, 2, 4]  # of equals the earlier
    valid = [True] * 9 + [False]
    assert top_places(sample_of(TOKEN, DOC, codes, valid), 0).tolist() == [2, 4]


def test_top_places_are_a_hundred_at_most() -> None:
    n = 150
    found = top_places(sample_of([0] * n, list(range(n)), np.arange(1.0, n + 1)[:, None]), 0)
    assert found.tolist() == list(range(149, 49, -1))


def test_neighbours_are_of_the_same_document() -> None:
    near = Neighbours.of(sample_of(TOKEN, DOC, np.zeros((10, 1))))
    assert near.previous.tolist() == [-1, 5, 6, 7, -1, 6, 6, -1, 5, 9]
    assert near.following.tolist() == [6, 7, 5, -1, 6, 8, -1, 9, 9, -1]


def test_entropy_and_purity_by_hand() -> None:
    ids = np.array([3, 3, 3, 3, 1, 1, 2, 7])  # ½, ¼, ⅛, ⅛
    assert entropy_bits(ids) == pytest.approx(1.75)
    assert purity(ids) == 0.5
    assert entropy_bits(np.array([4, 4])) == 0
    assert str(entropy_bits(np.array([4]))) == "0.0"


def test_figures_are_of_the_places_and_their_neighbours() -> None:
    sample = sample_of(TOKEN, DOC, np.array([VALUES]).T)
    found = figures_at(sample, Neighbours.of(sample), None, np.array([0, 3, 4, 7]))  # 5, 5, 6, 5
    assert found["purity"] == 0.75
    assert found["token_entropy"] == pytest.approx(0.75 * np.log2(4 / 3) + 0.5)
    assert found["previous_entropy"] == pytest.approx(0.75 * np.log2(4 / 3) + 0.5)  # none, 7, none, none
    assert found["next_entropy"] == pytest.approx(1.5)  # 6, none, 6, 9
    assert found["attribute_auc"] is None


def test_best_attribute_is_the_one_that_sets_places_apart() -> None:
    labels = np.array([[1, 0, 0, 1, 0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, -1, 0]], np.int8)
    targets = [Target("five", "fast", labels[0]), Target("common", "fast", labels[1])]
    found = Attributes.of(targets, sample_of(TOKEN, DOC, np.zeros((10, 1)), [True] * 9 + [False]))
    assert found.share.tolist() == pytest.approx([3 / 9, 8 / 9])
    assert best_attribute(found, np.array([0, 3, 4])) == ("five", pytest.approx(0.5 + (2 / 3 - 3 / 9) / 2))
    assert best_attribute(found, np.array([1, 2])) == ("common", pytest.approx(0.5 + (1 - 8 / 9) / 2))


def test_random_places_are_tokens_that_count_of_the_documents() -> None:
    valid = [True, False, True, True, False, True, False, True, True, False]
    sample = sample_of(TOKEN, DOC, np.zeros((10, 1)), valid)
    documents = np.array([2, 0, 1] * 200)
    found = random_places(sample, documents, np.random.default_rng(0))
    assert np.array_equal(sample.doc[found], documents)
    assert np.unique(found).tolist() == np.flatnonzero(valid).tolist()


def test_mean_cosine_is_that_of_all_pairs() -> None:
    rows = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [float(rows[i] @ rows[j]) for i in range(5) for j in range(5) if i != j]
    assert mean_cosine(rows) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert np.isnan(mean_cosine(rows[:1]))


def test_weights_are_of_the_document_around_without_special_tokens() -> None:
    tokens, documents = torch.tensor([[0, 7, 8, 0, 9, 4]]), torch.tensor([[1, 1, 1, 2, 2, 2]])
    found = around(tokens, documents, [0])[0]
    expected = [[0, 0.5, 0.5, 0, 0, 0]] * 3 + [[0, 0, 0, 0, 0.5, 0.5]] * 3
    assert torch.allclose(found, torch.tensor(expected))
    wide = around(torch.ones(1, 40), torch.zeros(1, 40), [])[0]
    assert (wide[20] > 0).nonzero().flatten().tolist() == list(range(20 - AROUND, 20 + AROUND + 1))


def test_embeddings_are_means_of_the_middle_layer(store: Store) -> None:
    subject = subject_on(store, max_tokens=300)
    sample, model = read_sample(subject), subject.language_model()
    assert model.n_layers == 3
    places = np.array([40, 3, 200, 41])
    found = context_embeddings(model, sample, places, store.special_tokens)
    for number, place in enumerate(places):
        row, column = sample.row[place], sample.column[place]
        acts = model.capture(torch.from_numpy(sample.rows[row : row + 1]), ["blocks.1.hook_resid_post"])
        inside = [
            other
            for other in range(max(column - 10, 0), min(column + 11, store.context))
            if sample.doc_rows[row, other] == sample.doc[place] and sample.rows[row, other] not in store.special_tokens
        ]
        mean = acts["blocks.1.hook_resid_post"][0, inside].mean(0)
        assert torch.allclose(found[number], mean / mean.norm(), atol=1e-5)
