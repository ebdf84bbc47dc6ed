"""Means by learner and agreement, by hand."""

from __future__ import annotations

import pytest

from train.rate.answers import Answer
from train.rate.summary import krippendorff_alpha, summarise


def said(rater: str, learner: str, latent: int, score: int | None) -> Answer:
    return Answer(rater, learner, latent, score, "", 0.0)


def test_latents_count_once_however_many_raters_they_have() -> None:
    answers = [
        said("ada", "r/a", 1, 5),
        said("bob", "r/a", 1, 3),  # latent 1: 4
        said("ada", "r/a", 2, 2),  # latent 2: 2
        said("ada", "r/a", 3, None),
        said("ada", "r/b", 1, 5),
        said("ada", "elsewhere", 1, 1),
    ]
    b, a, everything = summarise(answers, ["r/a", "r/b"])
    assert (b.learner, b.latents, b.raters, b.score, b.interval, b.agreement) == ("r/b", 1, 1, 5.0, None, None)
    assert (a.latents, a.raters, a.score, a.clear_share, a.skipped) == (2, 2, 3.0, 0.5, 1)
    assert a.interval == pytest.approx(12.706 * 1.0, rel=1e-3)  # t(0.975, 1) times sd / √2, sd = √2
    assert (everything.learner, everything.latents, everything.score) == ("all", 3, pytest.approx(11 / 3))


def test_alpha_of_full_agreement_is_one_and_of_chance_below() -> None:
    assert krippendorff_alpha([[1, 1], [5, 5], [3, 3]]) == 1.0
    assert krippendorff_alpha([[2, 2], [2, 2]]) == 1.0
    assert krippendorff_alpha([[1], [2]]) is None


def test_alpha_by_hand() -> None:
    # pairs of one latent: (1, 2), (4, 4): mean squared difference over ordered pairs (1 + 1) / 4 values = .5
    # all pairs of 1 2 4 4: squares 1 9 9 4 4 0, twice their sum over 4 · 3 = 54 / 12 = 4.5
    assert krippendorff_alpha([[1, 2], [4, 4]]) == pytest.approx(1 - 0.5 / 4.5)


def test_alpha_leaves_latents_with_one_score_out() -> None:
    assert krippendorff_alpha([[1, 2], [4, 4], [5]]) == krippendorff_alpha([[1, 2], [4, 4]])


def test_nothing_said_is_a_row_of_nothing() -> None:
    row, everything = summarise([], ["r/a"])
    assert (row.score, row.clear_share, everything.latents) == (None, None, 0)
