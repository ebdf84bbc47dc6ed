"""What latents respond to, against a plain reading of the whole store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import build
from common.errors import DataError, Interrupted
from common.stopping import Stop
from common.store import Store
from tests.conftest import HOOK
from tests.train.evaluate.test_subject import subject_on
from train.config import DataConfig
from train.data.reader import Batches
from train.data.split import held_out_documents
from train.evaluate import METRICS, write_evaluation
from train.evaluate.latents import N_BINS, edges, latents, sample, shares, totals_of
from train.evaluate.subject import Evaluation, Subject
from train.evaluate.top_contexts import AFTER, BEFORE
from train.saes import make_sae
from train.saes.base import SAE

FACTS = {"variant": "topk", "model": "tiny", "hook": HOOK}
HELD_OUT = 0.9  # more than ten of the fifteen documents


def subject_of(store: Store, sae: SAE | None = None, **options: object) -> Subject:
    subject = subject_on(store, **options)
    return replace(subject, facts=FACTS, sae=sae or subject.sae, batches=batches_of(store))


def batches_of(store: Store, **settings: object) -> Batches:
    return Batches.of(store, build(DataConfig, {"held_out": HELD_OUT} | settings, "test"))


@pytest.fixture(scope="module")
def opened(shared_store: Path) -> Store:
    return Store.open(shared_store)


@pytest.fixture(scope="module")
def found(opened: Store) -> tuple[Subject, Evaluation]:
    subject = subject_of(opened)
    return subject, latents(subject)


@pytest.fixture(scope="module")
def plain(found: tuple[Subject, Evaluation], opened: Store) -> dict[str, np.ndarray]:
    """Every held-out token of the store with its codes: activations [n, 32], documents, rows, tokens."""
    read = opened.sequences(0, opened.n_sequences)
    held_out = held_out_documents(found[0].plan.n_documents, HELD_OUT)
    x = torch.from_numpy(read["activations"].astype(np.float32))
    with torch.no_grad():
        codes = found[0].sae.encode(x.flatten(0, 1)).view(*x.shape[:2], -1).numpy()
    special = np.isin(read["tokens"], opened.special_tokens)
    outlier = x.norm(dim=-1).numpy() > found[0].plan.max_norm
    valid = held_out[read["documents"]] & ~special & ~outlier
    return {"codes": np.where(valid[..., None], codes, 0), "valid": valid} | read


def test_totals_are_those_of_a_plain_reading(found: tuple[Subject, Evaluation], plain: dict[str, np.ndarray]) -> None:
    metrics, more = found[1].metrics, found[1].more
    rows = plain["codes"][plain["valid"]]
    fired = (rows > 0).sum(0)
    alive = np.flatnonzero(fired)
    assert list(metrics) == list(METRICS["latents"])
    assert metrics["tokens"] == more["tokens"] == len(rows) > 1000
    assert (metrics["alive"], metrics["dead"], metrics["listed"]) == (len(alive), 32 - len(alive), len(alive))
    assert metrics["median_density"] == pytest.approx(np.median(fired[alive] / len(rows)))
    assert [latent["index"] for latent in more["latents"]] == alive.tolist()
    for latent in more["latents"]:
        values = rows[:, latent["index"]]
        values = values[values > 0].astype(np.float64)
        assert latent["density"] == pytest.approx(len(values) / len(rows), rel=1e-5)
        assert latent["mean"] == pytest.approx(values.mean(), rel=1e-3)  # four digits
        assert latent["max"] == pytest.approx(values.max(), rel=1e-3)
        assert latent["group"] is None


def test_histograms_count_every_positive_activation(
    found: tuple[Subject, Evaluation], plain: dict[str, np.ndarray]
) -> None:
    rows = plain["codes"][plain["valid"]]
    for latent in found[1].more["latents"]:
        values = rows[:, latent["index"]]
        values = np.log(values[values > 0].astype(np.float64))
        counts, borders = np.histogram(values, N_BINS)
        assert latent["histogram"]["edges"] == pytest.approx(np.exp(borders), rel=1e-4)
        assert sum(latent["histogram"]["counts"]) == len(values)
        off = np.abs(np.array(latent["histogram"]["counts"]) - counts)
        assert off.sum() <= 2  # a value on a border may fall to either side in float32


def expected_contexts(plain: dict[str, np.ndarray], latent: int) -> list[dict[str, Any]]:
    """The ten documents with the largest activations, by looking at every place of every document."""
    codes, documents = plain["codes"][..., latent], plain["documents"]
    best: dict[int, tuple[float, int, int]] = {}
    for row, column in zip(*np.nonzero(codes), strict=True):
        place = (float(codes[row, column]), int(row), int(column))
        document = int(documents[row, column])
        if document not in best or place[0] > best[document][0]:
            best[document] = place
    chosen = sorted(best.items(), key=lambda item: (-item[1][0], item[1][1:]))[:10]
    contexts = []
    for document, (value, row, column) in chosen:
        around = range(max(column - BEFORE, 0), min(column + AFTER + 1, codes.shape[1]))
        inside = [c for c in around if documents[row, c] == document]
        tokens = [int(plain["tokens"][row, c]) for c in inside]
        values = [float(codes[row, c]) for c in inside]
        contexts.append(
            {
                "document": document,
                "activation": value,
                "peak": inside.index(column),
                "tokens": tokens,
                "values": values,
            }
        )
    return contexts


def test_contexts_are_the_strongest_places_of_different_documents(
    found: tuple[Subject, Evaluation], plain: dict[str, np.ndarray]
) -> None:
    names = found[0].tokenizer()
    n = []
    for latent in found[1].more["latents"]:
        expected = expected_contexts(plain, latent["index"])
        assert [context["document"] for context in latent["contexts"]] == [c["document"] for c in expected]
        n.append(len(expected))
        for got, wanted in zip(latent["contexts"], expected, strict=True):
            assert got["peak"] == wanted["peak"]
            assert got["tokens"] == [names.decode([token]) or f"<{token}>" for token in wanted["tokens"]]
            assert got["activation"] == got["values"][got["peak"]] == pytest.approx(wanted["activation"], rel=1e-3)
            assert got["values"] == pytest.approx(wanted["values"], rel=1e-3)
    assert found[1].metrics["contexts"] == pytest.approx(np.mean(n))
    assert max(n) == 10  # of more held-out documents than that, or nothing would be left out


def test_directions_are_those_of_the_decoder(found: tuple[Subject, Evaluation]) -> None:
    subject, evaluation = found
    rows = subject.sae.W_dec.detach().double().numpy()
    W_U = subject.language_model().bridge.unembed.W_U.double().numpy()
    indices = [latent["index"] for latent in evaluation.more["latents"]]
    names = subject.tokenizer()
    nearest = []
    for latent in evaluation.more["latents"]:
        row = rows[latent["index"]]
        cosines = {i: float(rows[i] @ row / np.linalg.norm(rows[i]) / np.linalg.norm(row)) for i in indices}
        del cosines[latent["index"]]
        expected = sorted(cosines.items(), key=lambda item: -item[1])[:10]
        assert [index for index, _ in latent["neighbours"]] == [index for index, _ in expected]
        assert [value for _, value in latent["neighbours"]] == pytest.approx([v for _, v in expected], rel=1e-3)
        nearest.append(expected[0][1])
        logits = row @ W_U
        for key, order in (("promoted", np.argsort(-logits)), ("suppressed", np.argsort(logits))):
            assert [value for _, value in latent[key]] == pytest.approx(logits[order[:10]].tolist(), rel=1e-3)
            first = int(order[0])
            assert latent[key][0][0] == (chr(first) if 31 < first < 127 else latent[key][0][0])
            assert names.name(first) in (latent[key][0][0], f"<0x{first:02X}>")
    assert evaluation.metrics["nearest_cosine"] == pytest.approx(np.median(nearest), rel=1e-6)


def test_a_sample_is_always_the_same_and_describes_its_latents_alike(
    found: tuple[Subject, Evaluation], opened: Store
) -> None:
    whole = {latent["index"]: latent for latent in found[1].more["latents"]}
    few = latents(subject_of(opened, latents=5))
    assert few.metrics["listed"] == len(few.more["latents"]) == 5
    assert few.metrics["alive"] == found[1].metrics["alive"]
    assert all(latent == whole[latent["index"]] for latent in few.more["latents"])


def test_groups_are_named_and_windows_are_the_saes_own(opened: Store) -> None:
    sae = make_sae("multiscale", {"d_sae": 32, "k": 4, "window": 24}, 16, 0, "test").eval()
    subject = subject_of(opened, sae)
    totals = totals_of(subject)
    count, tokens = torch.zeros(32, dtype=torch.int64), 0
    with torch.no_grad():
        for batch in subject.held_out():  # windows of 24 tokens: the last 16 of 64 are in none
            count += (sae.encode(batch)[batch.valid] > 0).sum(0)
            tokens += batch.n_valid
    assert totals.tokens == tokens
    assert torch.equal(totals.count, count)
    listed = latents(subject).more["latents"]
    places = sae.groups()
    assert {latent["group"] for latent in listed} == set(places)
    assert all(places[latent["group"]].start <= latent["index"] < places[latent["group"]].stop for latent in listed)
    assert max(context["peak"] for latent in listed for context in latent["contexts"]) <= BEFORE


def test_whole_sequences_are_read_where_training_windows_keep_to_documents(opened: Store) -> None:
    within = replace(subject_of(opened), batches=batches_of(opened, within_document=True))
    assert totals_of(within).tokens == totals_of(subject_of(opened)).tokens


def test_without_the_model_tokens_are_ids_and_it_is_said_why(opened: Store) -> None:
    found = latents(subject_of(opened, model="/nowhere/model", latents=2))
    assert "no such folder" in found.reasons["promoted"]
    assert "no such folder" in found.reasons["text"]
    for latent in found.more["latents"]:
        assert latent["promoted"] is latent["suppressed"] is None
        assert all(token[0] + token[-1] == "[]" for token in latent["contexts"][0]["tokens"])


def test_directions_outside_the_residual_stream_have_no_logit_effects(opened: Store) -> None:
    subject = replace(subject_of(opened, latents=2), facts=FACTS | {"hook": "blocks.1.attn.hook_z"})
    found = latents(subject)
    assert found.reasons["promoted"].startswith("blocks.1.attn.hook_z is not the residual stream")
    assert found.more["latents"][0]["promoted"] is None
    assert "text" not in found.reasons


def test_latents_that_never_fire_are_counted_and_nothing_else(opened: Store) -> None:
    subject = subject_of(opened, make_sae("mean", {}, 16, 0, "test").eval())
    found = latents(subject)
    assert (found.metrics["alive"], found.metrics["dead"], found.more["latents"]) == (0, 32, [])
    empty = {name for name, value in found.metrics.items() if value is None}
    assert empty == {"median_density", "contexts", "nearest_cosine"} == set(found.reasons)


def test_no_held_out_token_is_refused(opened: Store) -> None:
    with pytest.raises(DataError, match="no held-out token"):
        latents(replace(subject_of(opened), batches=batches_of(opened, held_out=0)))


def test_a_stop_is_heeded(opened: Store) -> None:
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        latents(replace(subject_of(opened), stop=Stop("SIGINT")))


def test_the_file_has_a_line_for_each_latent(found: tuple[Subject, Evaluation], tmp_path: Path) -> None:
    written = write_evaluation(tmp_path / "run" / "topk", "latents", found[1])
    text = (tmp_path / "run" / "topk" / "eval" / "latents.json").read_text()
    assert json.loads(text) == written
    assert sum(line.startswith('    {"index":') for line in text.splitlines()) == found[1].metrics["listed"]


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ((10, 20), 100, [10, 20]),
        ((100, 300), 40, [10, 30]),
        ((1, 0, 998), 10, [1, 0, 9]),  # a group that is alive has at least one
        ((5, 5, 5), 2, [1, 1, 0]),
    ],
)
def test_groups_share_the_places(sizes: tuple[int, ...], most: int, expected: list[int]) -> None:
    assert shares(sizes, most) == expected


def test_a_sample_takes_its_share_of_each_group_from_the_alive() -> None:
    alive = torch.ones(100, dtype=torch.bool)
    alive[:10] = False
    chosen = sample(alive, {"low": slice(0, 40), "high": slice(40, 100)}, 30)
    assert (len(chosen), sum(index < 40 for index in chosen), min(chosen) >= 10) == (30, 10, True)
    assert chosen == sorted(set(chosen))
    assert chosen != list(range(10, 20)) + list(range(40, 60))  # drawn, not the first


def test_equal_activations_are_in_the_last_bin() -> None:
    assert edges(4.0, 4.0)[0] == 2.0
    assert edges(4.0, 4.0)[-1] == 4.0
