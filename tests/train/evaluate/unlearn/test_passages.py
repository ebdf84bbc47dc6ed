"""Texts as rows: halves, cuts, and what counts."""

from __future__ import annotations

import torch

from common.tokenizers import ByteTokenizer
from train.evaluate.unlearn.passages import Passages, rows_each, rows_of, split_halves

TOKENIZER = ByteTokenizer(257)
BOS = 256


def text_of(passages: Passages, row: int) -> str:
    return TOKENIZER.decode(passages.tokens[row, : passages.lengths[row]].tolist())


def test_every_other_document_goes_to_each_half() -> None:
    halves = split_halves(iter(["aaa", "bbb", "ccc", "ddd", "eee"]), TOKENIZER, 8, BOS, 1000)
    assert [[text_of(half, row) for row in range(len(half.tokens))] for half in halves] == [
        ["aaa", "ccc", "eee"],
        ["bbb", "ddd"],
    ]
    assert [half.n_documents for half in halves] == [3, 2]


def test_halves_stop_at_their_size_with_as_many_documents_as_may_be() -> None:
    selection, evaluation = split_halves(iter(["x" * 500] * 400), TOKENIZER, 9, BOS, 640)
    for half in (selection, evaluation):
        assert half.n_documents == 32  # 640 / 32 = 20 tokens of each, in rows of 8 + BOS
        assert half.document.bincount().tolist() == [3] * 32


def test_few_documents_give_more_of_each_spread_over_it() -> None:
    text = "".join(chr(65 + i) * 4 for i in range(10))
    half, _ = split_halves(iter([text, "other", "short"]), TOKENIZER, 5, BOS, 20)
    assert [text_of(half, row) for row in range(len(half.tokens))] == ["AAAA", "DDDD", "GGGG", "JJJJ", "shor"]
    assert half.document.tolist() == [0, 0, 0, 0, 1]


def test_rows_each_is_the_least_that_suffices() -> None:
    assert [rows_each([5, 1, 3], wanted) for wanted in (1, 3, 4, 5, 7, 8, 9, 100)] == [1, 1, 2, 2, 3, 4, 5, 5]


def test_rows_begin_with_bos_and_pieces_that_predict_nothing_are_left_out() -> None:
    documents = [TOKENIZER.encode([text])[0] for text in ("abcdefg", "i", "jk")]
    passages = rows_of(documents, 4, BOS, (BOS,), 100)
    rows = [passages.tokens[row, : passages.lengths[row]].tolist() for row in range(len(passages.tokens))]
    assert rows == [[BOS, 97, 98, 99], [BOS, 100, 101, 102], [BOS, 106, 107]]  # neither g nor i is followed by any
    assert passages.document.tolist() == [0, 0, 1]
    assert passages.counted.tolist() == [[False, True, True, True]] * 2 + [[False, True, True, False]]
    assert passages.predicting.tolist() == [[False, True, True]] * 2 + [[False, True, False]]


def test_rows_without_bos_use_the_whole_context() -> None:
    passages = rows_of(TOKENIZER.encode(["abcdef"]), 4, None, (), 100)
    assert passages.tokens.tolist() == [[97, 98, 99, 100], [101, 102, 0, 0]]
    assert passages.predicting.sum() == 4


def test_batches_hold_every_row_once_like_lengths_together() -> None:
    passages = rows_of(TOKENIZER.encode(["abc", "abcdefg", "ab", "abcde"]), 8, BOS, (BOS,), 100)
    cut = list(passages.batches(2))
    assert [numbers.tolist() for numbers in cut] == [[2, 0], [3, 1]]
    assert passages.of(cut[0]).tokens.shape == (2, 4)
    assert [numbers.tolist() for numbers in passages.batches(2, torch.tensor([1, 2]))] == [[2, 1]]


def test_batch_tells_the_sae_what_belongs_together() -> None:
    passages = rows_of(TOKENIZER.encode(["abc", "de"]), 4, BOS, (BOS,), 100)
    batch = passages.batch(torch.zeros(2, 4, 3))
    assert len(batch.doc.unique(dim=1)[0]) == 1
    assert batch.doc[0, 0] != batch.doc[1, 0]
    assert batch.pos.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.valid.tolist() == passages.counted.tolist()


def test_batch_of_mixed_rows_begins_a_document_at_special_tokens() -> None:
    tokens = torch.tensor([[9, 1, 1, 8, 1, 1]])
    passages = Passages(tokens, torch.tensor([6]), torch.tensor([0]), (8, 9), mixed=True)
    batch = passages.batch(torch.zeros(1, 6, 3))
    assert batch.doc.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert batch.pos.tolist() == [[0, 1, 2, 0, 1, 2]]
