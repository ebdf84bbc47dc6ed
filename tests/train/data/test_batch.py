"""Batches from elsewhere."""

from __future__ import annotations

import torch

from train.data.batch import Batch


def test_windows_without_documents_are_a_document_each() -> None:
    batch = Batch.of(torch.zeros(3, 2, 4))
    assert batch.doc.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert batch.pos.eq(-1).all()
    assert batch.n_valid == 6
