"""The sample against what the store holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import DataError
from common.layout import DOCUMENTS, TOKENS
from common.store import Store
from tests.train.evaluate.test_subject import subject_on
from train.data.split import held_out_documents
from train.evaluate.sample import compressed, read_sample, runs_of


def test_sample_is_the_held_out_documents_and_their_codes(store: Store) -> None:
    subject = subject_on(store, max_tokens=3000)
    found = read_sample(subject)
    tokens, documents = (store.rows(name, 0, store.n_sequences).ravel() for name in (TOKENS, DOCUMENTS))
    special = np.isin(tokens, store.special_tokens)
    held_out = held_out_documents(subject.plan.n_documents, 0.2)[documents] & (documents >= 0)
    there = np.flatnonzero(held_out & ~special)[: len(found.token)]
    assert 3000 <= found.valid.sum() < 3000 + 64 * 64  # whole sequences
    assert np.array_equal(found.token, tokens[there])
    assert np.array_equal(found.doc, documents[there])
    assert np.array_equal(found.rows[found.row, found.column], found.token)
    assert np.array_equal(found.doc_rows[found.row, found.column], found.doc)
    acts = store.sequences(0, store.n_sequences)["activations"].astype(np.float32)
    acts = torch.from_numpy(acts.reshape(len(tokens), -1)[there])
    assert torch.equal(found.x.float(), acts)
    with torch.no_grad():
        codes = subject.sae.encode(acts)  # flat: what stands beside a token does not matter
    assert np.allclose(found.codes.toarray(), codes.clamp_min(0).numpy(), atol=1e-6)
    assert len(found.documents()) == len(np.unique(found.doc))


def test_column_of_leaves_out_what_does_not_count(store: Store) -> None:
    found = read_sample(subject_on(store, max_tokens=500))
    latent = int(np.diff(found.codes.indptr).argmax())
    places, values = found.column_of(latent)
    assert np.array_equal(found.codes.toarray()[places, latent], values)
    assert np.array_equal(places, np.flatnonzero((found.codes.toarray()[:, latent] > 0) & found.valid))
    found.valid[places[:3]] = False
    assert np.array_equal(found.column_of(latent)[0], places[3:])


def test_sample_without_a_limit_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.evaluate.sample.SAMPLE_TOKENS", 200)
    assert 200 <= read_sample(subject_on(store)).valid.sum() < 200 + 64


def test_codes_are_kept_where_above_zero() -> None:
    codes = torch.tensor([[0.0, 2.0, -1.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    found = compressed(codes)
    assert found.nnz == 3
    assert np.array_equal(found.toarray(), codes.clamp_min(0).numpy())


def test_runs_are_equal_neighbours() -> None:
    assert runs_of(np.array([1, 1, 0, 1])) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert runs_of(np.array([])) == []


def test_no_held_out_token_is_refused(store: Store) -> None:
    subject = subject_on(store)
    subject.batches._held_out[:] = False
    with pytest.raises((DataError, ValueError), match="no held-out token"):
        read_sample(subject)
