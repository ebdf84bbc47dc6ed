"""Which tokens suite core takes, which of them count, and what an SAE is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import build
from common.corpus import CorpusOptions, open_corpus
from common.errors import ConfigError, DataError
from common.packing import Cursor, Packer
from common.store import Store
from tests.train.evaluate.test_subject import subject_on
from train.config import EvalConfig
from train.data.batch import Batch
from train.data.split import held_out_documents, positions_in_document
from train.evaluate.core_text import (
    SEQUENCES,
    Contexts,
    as_arrays,
    contexts_of,
    recut,
    settle_batches,
    stored_activations,
    text_of,
)
from train.evaluate.subject import Subject
from train.saes import REGISTRY, make_sae

BOS = 256


def subject(store: Store, **options: Any) -> Subject:
    return subject_on(store, **options)  # a fifth of 40 documents is held out


def test_held_out_sequences_are_those_with_a_held_out_token_in_order(store: Store) -> None:
    text = text_of(subject(store, batches="2,1"), None)
    held_out = held_out_documents(40, 0.2)
    wanted = []
    for row in range(store.n_sequences):
        tokens, documents = store.rows("tokens", row, row + 1)[0], store.rows("documents", row, row + 1)[0]
        if (held_out[documents] & (tokens != BOS)).any():
            wanted.append((tokens, documents))
    assert len(wanted) > 48
    contexts = text.contexts
    assert len(contexts) == 48
    assert (len(text.reconstruction), len(text.sparsity)) == (32, 16)
    for row, (tokens, documents) in enumerate(wanted[:48]):
        assert np.array_equal(contexts.tokens[row], tokens)
        assert np.array_equal(contexts.documents[row], documents)
        assert np.array_equal(contexts.special[row], tokens == BOS)
        assert np.array_equal(contexts.counted[row], held_out[documents] & (tokens != BOS))
        assert np.array_equal(contexts.positions[row], positions_in_document(documents, 64))
    assert torch.equal(text.sparsity.tokens, contexts.tokens[32:])
    assert not contexts.counted.all(-1).all()  # neighbours that are trained on do not count
    assert text.source == {"store": store.id, "held_out": 0.2}


def test_stored_activations_are_those_of_the_sparsity_batches(store: Store) -> None:
    looked_at = subject(store, batches="1,2")
    text = text_of(looked_at, None)
    found = list(stored_activations(looked_at, text))
    assert [tuple(x.shape) for x in found] == [(16, 64, 16)] * 2
    tokens = {store.rows("tokens", row, row + 1).tobytes(): row for row in range(store.n_sequences)}
    for row, x in zip(text.sparsity.tokens, torch.cat(found), strict=True):
        number = tokens[row.int().numpy().tobytes()]
        stored = store.rows("acts/blocks.1.hook_resid_post", number, number + 1)[0]
        assert np.array_equal(x.numpy(), stored.astype(np.float32))


def test_recut_gives_every_row_in_order_and_drops_the_rest() -> None:
    parts = torch.arange(23).split([5, 1, 9, 8])
    assert [part.tolist() for part in recut(iter(parts), 4)] == [list(range(s, s + 4)) for s in range(0, 20, 4)]
    assert list(recut(iter([torch.arange(3)]), 4)) == []


@pytest.mark.parametrize(
    ("batches", "sequences", "expected"),
    [
        (None, 999, (10, 1, 16)),
        (None, 176, (10, 1, 16)),
        (None, 175, (9, 1, 16)),
        (None, 32, (1, 1, 16)),
        (None, 31, (1, 1, 15)),
        (None, 2, (1, 1, 1)),
        ("1,1", 32, (1, 1, 16)),
        ("3,4", 112, (3, 4, 16)),
        ("3,4", 999, (3, 4, 16)),
    ],
)
def test_batches_are_those_asked_for_or_what_there_is(
    batches: str | None, sequences: int, expected: tuple[int, int, int]
) -> None:
    assert settle_batches(config(batches), blank(sequences), "x fills") == expected


@pytest.mark.parametrize(
    ("batches", "sequences", "message"),
    [
        (None, 1, "suite core: x fills 1 sequences of 8 tokens; one of each kind of batch needs 2. Ask for fewer"),
        ("3,4", 111, "suite core: x fills 111 sequences of 8 tokens; --batches 3,4 needs 112. Ask for fewer"),
    ],
)
def test_too_few_tokens_are_told_with_both_numbers(batches: str | None, sequences: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        settle_batches(config(batches), blank(sequences), "x fills")


@pytest.mark.parametrize("batches", ["", "10", "0,1", "1,0", "1,2,3", "-1,2", "1, 2", "many"])
def test_batches_are_two_numbers_above_0(batches: str) -> None:
    with pytest.raises(ConfigError, match="two numbers above 0 are needed, such as 200,2000"):
        config(batches)


def config(batches: str | None) -> EvalConfig:
    return build(EvalConfig, {"batches": batches}, "test")


def blank(sequences: int) -> Contexts:
    nothing = torch.zeros(sequences, 8, dtype=torch.int32)
    return contexts_of(nothing, nothing, [])


def test_without_held_out_documents_there_is_nothing_to_look_at(store: Store) -> None:
    looked_at = subject(store, max_tokens=1)
    with pytest.raises(DataError, match=r"the held-out documents of .* \(--max-tokens 1\) fill 1 sequences"):
        text_of(looked_at, None)


def test_a_corpus_is_packed_in_sequences_of_128(store: Store, tmp_path: Path) -> None:
    names = ["wheat", "rye", "oats"] * 40
    words = [f"{name} grows here and there. " * (3 + number % 5) for number, name in enumerate(names)]
    (tmp_path / "x.jsonl").write_text("".join(f'{{"words": "{text}"}}\n' for text in words))
    looked_at = subject(store, corpus=str(tmp_path / "x.jsonl"), column="words", batches="1,1")
    model = looked_at.language_model()
    text = text_of(looked_at, model)
    corpus = open_corpus(CorpusOptions(name=str(tmp_path / "x.jsonl"), column="words"))
    packed = Packer(corpus, model.tokenizer, 128, "packed", BOS, Cursor()).take(32)
    assert np.array_equal(text.contexts.tokens, packed.tokens)
    assert np.array_equal(text.contexts.documents, packed.documents)
    assert torch.equal(text.contexts.counted, text.contexts.tokens != BOS)
    assert text.source == {"corpus": corpus.identity()}
    boundaries = (np.diff(packed.documents, axis=1) > 0).sum()
    assert int(text.contexts.separators.sum()) == boundaries > 10
    arrays = as_arrays(text)
    assert arrays["tokens"].dtype == np.int32
    assert np.array_equal(arrays["mask"], packed.tokens != BOS)
    with pytest.raises(
        DataError, match=r"--corpus .*x\.jsonl fills \d+ sequences of 128 tokens; --batches 99,1 needs 1600"
    ):
        text_of(subject(store, corpus=str(tmp_path / "x.jsonl"), column="words", batches="99,1"), model)


def test_a_corpus_for_a_model_of_short_sequences_is_refused(store: Store, tmp_path: Path) -> None:
    looked_at = subject(store, corpus="stdlib")
    model = looked_at.language_model()
    assert model.context == 128
    model.context = 64
    with pytest.raises(ConfigError, match=r"--corpus packs 128 tokens, .* takes at most 64"):
        text_of(looked_at, model)


# ---- what an SAE is told ---------------------------------------------------------------------------------------


def two_documents() -> Contexts:
    tokens = torch.tensor([[BOS, 5, 6, 7, BOS, 8, 9, 4]], dtype=torch.int32)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]], dtype=torch.int32)
    return contexts_of(tokens, documents, [BOS])


def test_padding_is_special_and_separators_are_where_documents_begin() -> None:
    text = two_documents()
    assert text.special[0].tolist() == [True, False, False, False, True, False, False, True]
    assert text.separators[0].nonzero().flatten().tolist() == [4]
    assert text.positions[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]


def drawn(variant: str) -> Any:
    """An SAE whose every weight says something."""
    options = {"k": 4} if "k" in REGISTRY[variant].Config.model_fields else {}
    sae = make_sae(variant, {"d_sae": 64} | options, 4, 0, "test")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.mark.parametrize("variant", list(REGISTRY))
def test_sees_past_is_whether_earlier_tokens_have_a_say(variant: str) -> None:
    sae = drawn(variant)
    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[:, :5] += 1.0
    last = [torch.cat([sae.encode(v)[:, 5], sae(v)[:, 5]], dim=-1) for v in (x, changed)]
    assert (not torch.equal(*last)) == sae.sees_past


@pytest.mark.parametrize("variant", ["multiscale", "relational"])
def test_an_sae_that_looks_back_is_told_documents_and_special_tokens(variant: str) -> None:
    sae, text = drawn(variant), two_documents()
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(1))
    latents, out = text.coded(sae, x)
    batch = Batch.of(x, text.documents, text.positions, ~text.special)
    assert torch.equal(latents, sae.encode(batch))
    assert torch.equal(out, sae.decode(latents, batch))
    before = x.clone()
    before[:, :5] += 1.0  # the first document, and the BOS of the second
    assert torch.equal(text.coded(sae, before)[1][:, 5:7], out[:, 5:7])
    assert not torch.equal(sae(before)[:, 5:7], sae(x)[:, 5:7])  # which it would not know by itself


@pytest.mark.parametrize("variant", ["topk", "compositional"])
def test_any_other_sae_codes_special_tokens_as_well(variant: str) -> None:
    sae, text = drawn(variant), two_documents()
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(1))
    latents, out = text.coded(sae, x)
    assert torch.equal(latents, sae.encode(x))
    assert torch.equal(out, sae(x))


def test_pieces_are_all_there_is() -> None:
    pieces = list(blank(SEQUENCES + 3).pieces(SEQUENCES))
    assert [len(piece) for piece in pieces] == [SEQUENCES, 3]
