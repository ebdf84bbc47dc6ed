"""Suite probe on a small store."""

from __future__ import annotations

import pytest

from common.errors import Interrupted
from common.store import Store
from tests.train.evaluate.test_subject import subject_on
from train.evaluate import METRICS
from train.evaluate.probe import PROBE_METRICS, probe
from train.evaluate.targets import FAST, SLOW


def test_suite_probes_every_target_and_repeats(store: Store) -> None:
    found = probe(subject_on(store, 0.6, max_tokens=8000))
    assert list(found.metrics) == list(METRICS["probe"])
    assert {name for name, value in found.metrics.items() if value is None} == set(found.reasons)
    assert [row["target"] for row in found.more["targets"]] == [*FAST, *SLOW]
    assert set(found.more["missing"]) == {"topic"}  # fewer than sixteen documents
    assert found.metrics["fast_targets"] >= 3  # plain words: spaces between them, and what follows
    assert found.metrics["fast_x"] > 0.9 > found.metrics["fast_k1_control"]  # the model knows its own token
    low, high = found.more["intervals"]["fast_k5"]
    assert low <= found.metrics["fast_k5"] <= high
    assert probe(subject_on(store, 0.6, max_tokens=8000)) == found


def test_suite_without_a_tokenizer_has_nothing_but_reasons(store: Store) -> None:
    found = probe(subject_on(store, model="/nowhere/model"))
    assert list(found.metrics) == list(found.reasons) == list(PROBE_METRICS)
    assert set(found.metrics.values()) == {None}
    assert all("no such folder" in reason for reason in found.reasons.values())


def test_suite_stops_when_asked(store: Store) -> None:
    subject = subject_on(store)
    subject.stop.signal_name = "SIGINT"
    with pytest.raises(Interrupted):
        probe(subject)
