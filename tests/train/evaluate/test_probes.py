"""Probes on codes by hand: what a latent is, what it cannot be, and whose tokens it is judged on."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tests.train.evaluate.samples import sample_of
from train.evaluate.probe import FIGURES, KINDS, accuracies, mean_over, rows_of, summary, sums_of
from train.evaluate.probes import (
    Judged,
    Probed,
    balanced_sample,
    control_labels,
    most_telling,
    probe_latents,
    probe_target,
    split_documents,
    too_few,
)
from train.evaluate.sample import Sample
from train.evaluate.targets import Target

N_DOCUMENTS, LENGTH, KINDS_OF_TOKENS = 12, 100, 40


def example(seed: int = 0) -> tuple[Sample, Target]:
    """Twelve documents of 100 tokens; latent 3 is active exactly where the target is, the others at random."""
    generator = np.random.default_rng(seed)
    n = N_DOCUMENTS * LENGTH
    labels = (generator.random(n) < 0.2).astype(np.int8)
    codes = np.where(generator.random((n, 30)) < 0.3, generator.random((n, 30)), 0)
    codes[:, 3] = 5.0 * labels
    token = generator.integers(0, KINDS_OF_TOKENS, n)
    sample = sample_of(token.tolist(), np.repeat(np.arange(N_DOCUMENTS), LENGTH).tolist(), codes)
    return sample, Target("known", "fast", labels)


def halves_of(sample: Sample) -> np.ndarray:
    return split_documents(sample.doc, np.zeros(len(sample.doc), np.int64))


def accuracy(judged: Judged) -> float:
    right_yes, yes, right_no, no = judged.sums.sum(0)
    return float(right_yes / yes + right_no / no) / 2


def test_a_latent_that_is_the_target_is_found_and_random_labels_are_not() -> None:
    sample, target = example()
    found = probe_target(sample, target, halves_of(sample))
    assert found.reason is None
    assert found.real[1].latents == [3]
    assert [accuracy(judged) for judged in found.real.values()] == [1.0, 1.0, 1.0]
    assert found.real[1].auc == 1.0
    assert found.share == pytest.approx(target.labels.mean())
    assert all(abs(accuracy(judged) - 0.5) < 0.1 for judged in found.control.values())
    assert found.x is not None
    assert accuracy(found.x) == 1.0  # here x is the codes


def test_a_latent_for_each_kind_of_token_learns_random_labels_too() -> None:
    sample, target = example()
    codes = np.eye(KINDS_OF_TOKENS)[sample.token]
    by_heart = sample_of(sample.token.tolist(), sample.doc.tolist(), codes)
    found = probe_target(by_heart, target, halves_of(sample))
    assert accuracy(found.control[20]) > 0.9  # the yes kinds are a fifth of forty: twenty latents hold them all
    assert accuracy(found.real[20]) < 0.65


def test_documents_are_for_training_or_for_judging_never_both() -> None:
    sample, target = example()
    training = halves_of(sample)
    documents = {number: np.unique(training[sample.doc == number]).tolist() for number in range(N_DOCUMENTS)}
    assert sorted(documents.values()) == [[False]] * 6 + [[True]] * 6
    found = probe_target(sample, target, training)
    test = [number for number, halves in documents.items() if halves == [False]]
    yes = [int((target.labels[sample.doc == number] == 1).sum()) for number in test]
    assert found.real[1].sums[:, 1].tolist() == yes
    assert found.real[1].sums[:, [1, 3]].sum(1).tolist() == [LENGTH] * 6


def test_judged_tokens_have_no_part_in_the_probe() -> None:
    sample, target = example()
    training = halves_of(sample)
    before = probe_target(sample, target, training)
    labels = np.where(training, target.labels, 1 - target.labels).astype(np.int8)
    after = probe_target(sample, Target("turned", "fast", labels), training)
    assert after.real[1].latents == before.real[1].latents
    assert accuracy(after.real[1]) == 0.0


def test_every_topic_lies_in_both_halves() -> None:
    doc = np.repeat(np.arange(13), 3)
    topic = np.repeat([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3], 3)
    training = split_documents(doc, topic)
    share = [training[topic == number].mean() for number in range(4)]
    assert all(0 < value < 1 for value in share[:3])
    assert len(np.unique(doc[training])) == 6
    assert np.array_equal(training, split_documents(doc, topic))


def test_control_labels_are_of_kinds_of_tokens_with_as_many_yes() -> None:
    sample, target = example()
    target.labels[:50] = -1
    found = control_labels(target, sample, halves_of(sample))
    assert np.array_equal(found == -1, target.labels == -1)
    for kind in range(KINDS_OF_TOKENS):
        assert len(np.unique(found[(sample.token == kind) & (found >= 0)])) == 1
    yes, wanted = int((found == 1).sum()), int((target.labels == 1).sum())
    assert wanted - 25 <= yes <= wanted
    assert np.corrcoef(found[50:], target.labels[50:])[0, 1] < 0.3


def test_control_labels_of_documents_change_places_in_each_half() -> None:
    sample, _ = example()
    training = halves_of(sample)
    labels = (sample.doc % 3 == 0).astype(np.int8)
    found = control_labels(Target("topic/0", "slow", labels, True), sample, training)
    for half in (training, ~training):
        assert int((found[half] == 1).sum()) == int((labels[half] == 1).sum())
    for number in range(N_DOCUMENTS):
        assert len(np.unique(found[sample.doc == number])) == 1
    assert not np.array_equal(found, labels)


def test_ranking_is_by_difference_of_means() -> None:
    codes = np.array([[1, 0, 4, 2], [3, 0, 0, 2], [0, 5, 0, 2], [0, 7, 0, 2.0]])
    labels, among = np.array([1, 1, 0, 0], np.int8), np.array([True] * 4)
    # means of yes less of no: 2, −6, 2, 0
    assert most_telling(sample_of([0] * 4, [0] * 4, codes).codes, labels, among, 4).tolist() == [1, 0, 2, 3]
    among[3] = False  # 2, −5, 2, 0
    assert most_telling(sample_of([0] * 4, [0] * 4, codes).codes, labels, among, 1).tolist() == [1]


def test_training_tokens_are_balanced_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.array([1] * 30 + [0] * 70 + [-1] * 5, np.int8)
    among = labels >= 0
    found = balanced_sample(labels, among)
    assert (labels[found] == 1).sum() == (labels[found] == 0).sum() == 30
    monkeypatch.setattr("train.evaluate.probes.TRAINING_TOKENS", 20)
    assert len(balanced_sample(labels, among)) == 20
    assert len(np.unique(balanced_sample(labels, among))) == 20


def test_probe_on_five_is_the_regression_of_those_five() -> None:
    sample, _ = example()
    generator = np.random.default_rng(1)
    dense = sample.codes.toarray()
    labels = (dense[:, 7] + dense[:, 9] + 0.3 * generator.random(len(dense)) > 0.7).astype(np.int8)
    training, asked = halves_of(sample), sample.valid
    found = probe_latents(sample, labels, asked, training)[5]
    assert set(found.latents[:2]) == {7, 9}
    fit = balanced_sample(labels, training)
    values = dense[:, found.latents] / np.sqrt((dense[fit][:, found.latents] ** 2).mean(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = LogisticRegression().fit(values[fit], labels[fit]).predict(values[~training])
    truth = labels[~training]
    expected = ((told[truth == 1] == 1).mean() + (told[truth == 0] == 0).mean()) / 2
    assert accuracy(found) == pytest.approx(expected)
    assert 0.8 < accuracy(found) < 1


def test_tokens_that_do_not_count_are_not_asked() -> None:
    sample, target = example()
    sample.valid[:] = sample.doc != 5
    training = halves_of(sample)
    training[sample.doc == 5] = False
    assert probe_target(sample, target, training).real[1].sums.sum(0)[[1, 3]].sum() == (sample.valid & ~training).sum()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (np.zeros(1200, bool), "0 tokens in 0 training documents are a yes; 50 in 2 are needed"),
        (np.arange(1200) % 100 < 15, " training documents are a yes; 50 in 2 are needed"),
    ],
)
def test_a_target_with_too_few_tokens_says_so(keep: np.ndarray, message: str) -> None:
    sample, target = example()
    rare = Target("rare", "fast", (target.labels * keep).astype(np.int8))
    found = probe_target(sample, rare, halves_of(sample))
    assert (found.real, found.control, found.x) == ({}, {}, None)
    assert message in str(found.reason)
    assert rows_of([found]) == [{"target": "rare", "family": "fast", "share": found.share, "reason": found.reason}]


def test_a_yes_in_one_document_alone_is_too_few() -> None:
    labels = (np.arange(400) < 200).astype(np.int8)
    doc, training = np.repeat([0, 1, 2, 3], 100), np.repeat([True, False, True, False], 100)
    found = too_few(labels, np.ones(400, bool), training, doc, "tokens")
    assert found == "100 tokens in 1 training documents are a yes; 50 in 2 are needed"


# ---- means and tables ------------------------------------------------------------------------------------------------


def probed(name: str, right: float, family: str = "fast") -> Probed:
    """Two test documents of ten yes and ten no, `right` of them told right by latents, half by the control."""

    def judged(share: float) -> Judged:
        return Judged(np.array([[10 * share, 10, 10 * share, 10]] * 2), 0.7, list(range(20)))

    real = {k: judged(right) for k in (1, 5, 20)}
    control = {k: judged(0.5) for k in (1, 5, 20)}
    return Probed(Target(name, family, np.zeros(40, np.int8)), 0.5, real, control, judged(1.0))  # type: ignore[arg-type]


def test_accuracies_are_balanced_and_selectivity_is_a_difference() -> None:
    found = accuracies(sums_of([probed("a", 0.8)]).sum(0))
    assert dict(zip(FIGURES, found[0].tolist(), strict=True)) == pytest.approx(
        {f"k{k}": 0.8 for k in (1, 5, 20)} | {f"k{k}_control": 0.5 for k in (1, 5, 20)}
        | {"x": 1.0} | {f"k{k}_selectivity": 0.3 for k in (1, 5, 20)}
    )  # fmt: skip
    assert [*FIGURES[: len(KINDS)]] == KINDS
    lopsided = sums_of([probed("a", 0.8)]).sum(0)
    lopsided[..., 0] = 20  # all of yes, .8 of no
    assert float(accuracies(lopsided)[0, 0]) == pytest.approx(0.9)


def test_classes_of_a_target_count_as_one_and_missing_ones_not() -> None:
    results = [probed("a", 0.9), probed("topic/0", 0.6), probed("topic/1", 0.8)]
    mean, sums = mean_over(["a", "topic", "topic"]), sums_of(results).sum(0)
    assert float(mean(sums)[0]) == pytest.approx((0.9 + 0.7) / 2)
    sums[2, :, :2] = 0  # no yes was drawn
    assert float(mean(sums)[0]) == pytest.approx((0.9 + 0.6) / 2)


def test_summary_has_means_intervals_and_reasons() -> None:
    sample, _ = example()
    found = summary(sample, [probed("a", 0.8), probed("b", 0.6)], {"topic": "too few"})
    assert found.metrics["fast_k5"] == pytest.approx(0.7)
    assert found.metrics["fast_targets"] == 2
    assert found.metrics["fast_k5_selectivity"] == pytest.approx(0.2)
    assert found.more["intervals"]["fast_k5"] == pytest.approx([0.7, 0.7])  # both documents are alike
    assert found.metrics["slow_k5"] is None
    assert "no slow target has 50 tokens in 2 documents of yes" in found.reasons["slow_k5"]
    assert set(found.reasons) == {name for name, value in found.metrics.items() if value is None}
    assert found.more["missing"] == {"topic": "too few"}
    row = found.more["targets"][1]
    assert row["accuracy"]["k1"] == pytest.approx(0.6)
    assert row["intervals"]["k1"] == pytest.approx([0.6, 0.6])
    assert row["auc"]["x"] == 0.7
    assert len(row["latents"]) == 20
