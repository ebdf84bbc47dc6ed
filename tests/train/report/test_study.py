"""Which learners are one bar, what it is called, and its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.report.made import evaluation, made_learner, made_run
from train.report.figures import make_study
from train.report.figures.study import Study, figure_of, summary
from train.report.palette import HUES, colours
from train.report.runs import read_records


def study_of(*paths: Path) -> Study:
    return make_study(read_records(paths))


def grid(variant: str, k: int, seed: int, **more: Any) -> dict[str, Any]:
    options = {"d_sae": 32, "k": k}
    return made_learner(f"{variant}-k{k}-seed{seed}", variant, options=options, seed=seed, **more)


def test_learners_that_differ_in_seed_are_one_group(tmp_path: Path) -> None:
    learners = [grid(variant, k, seed) for variant in ("topk", "batchtopk") for k in (16, 8) for seed in (0, 1)]
    study = study_of(made_run(tmp_path / "r", *learners))
    labels = [group.label for group in study.groups]
    assert labels == ["batchtopk-k8", "batchtopk-k16", "topk-k8", "topk-k16"]
    assert [len(group.records) for group in study.groups] == [2, 2, 2, 2]
    assert list(study.kinds()) == ["batchtopk", "topk"]
    assert study.subtitle.endswith("/r: 8 learners · made blocks.1 · 40 steps asked for")


def test_a_label_has_k_where_names_have_it_or_the_kind_has_several(tmp_path: Path) -> None:
    small = made_learner("small", "gated", options={"d_sae": 32, "k": 8})
    large = made_learner("large", "gated", options={"d_sae": 32, "k": 16})
    study = study_of(made_run(tmp_path, grid("topk", 8, 0), made_learner("tree", "tree"), small, large))
    assert [group.label for group in study.groups] == ["gated-k8", "gated-k16", "topk-k8", "tree"]
    assert study.labels()[tmp_path / "large"] == "gated-k16"


def test_equal_names_of_two_runs_are_told_apart_by_the_run(tmp_path: Path) -> None:
    runs = [
        made_run(tmp_path / name, made_learner("topk", "topk"), batch_size=size) for name, size in (("a", 1), ("b", 2))
    ]
    assert [group.label for group in study_of(*runs).groups] == ["a/topk", "b/topk"]


def test_runs_that_differ_in_seed_alone_are_one_group(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / str(seed), made_learner("topk", "topk", seed=None), seed=seed) for seed in (1, 2)]
    (group,) = study_of(*runs).groups
    assert [record.seed for record in group.records] == [1, 2]


def test_equal_names_inside_one_run_are_numbered(tmp_path: Path) -> None:
    wide = made_learner("topk-seed1", "topk", options={"d_sae": 64, "k": 4})
    labels = [group.label for group in study_of(made_run(tmp_path, made_learner("topk-seed0", "topk"), wide)).groups]
    assert labels == [f"{tmp_path.name}/topk #1", f"{tmp_path.name}/topk #2"]


def test_colours_stay_whichever_figure_and_order(tmp_path: Path) -> None:
    one = made_run(tmp_path / "one", grid("topk", 8, 0), grid("topk", 16, 0), grid("standard", 8, 0))
    other = made_run(tmp_path / "other", grid("standard", 8, 1), grid("topk", 16, 1), grid("topk", 8, 1))
    first, second = study_of(one), study_of(other)
    assert first.colours == second.colours
    assert first.colours["standard"] == HUES[0]
    assert first.colours["topk"] == HUES[1]  # of a front; its points at an L0 are shades of it
    assert len({first.colours[name] for name in ("topk", "topk-k8", "topk-k16")}) == 3
    assert first.colours["topk-k8"] == colours({"topk": ["topk-k8", "topk-k16"], "standard": []})["topk-k8"]


def test_the_interval_is_that_over_seeds(tmp_path: Path) -> None:
    learners = [grid("topk", 8, seed, ev=ev) for seed, ev in ((0, 0.5), (1, 0.7), (2, 0.6))]
    (group,) = study_of(made_run(tmp_path, *learners)).groups
    found = summary(group, figure_of("heldout", "explained_variance"), "heldout", "explained_variance")
    assert found.value == pytest.approx(0.6)
    assert found.each == {"topk-k8-seed0": 0.5, "topk-k8-seed1": 0.7, "topk-k8-seed2": 0.6}
    half = 4.302653 * 0.1 / 3**0.5  # t(2) at .975, standard deviation .1
    assert (found.low, found.high) == (pytest.approx(0.6 - half), pytest.approx(0.6 + half))


@pytest.mark.parametrize(("ends", "expected"), [([0.2, 0.4], (0.2, 0.4)), (None, (None, None))])
def test_one_seed_has_the_interval_of_its_documents(
    tmp_path: Path, ends: list[float] | None, expected: tuple[float | None, float | None]
) -> None:
    evals = {"temporal": evaluation({"rho_8": 0.3}, intervals={"rho_8": ends})}
    (group,) = study_of(made_run(tmp_path, made_learner("a", evals=evals))).groups
    found = summary(group, figure_of("temporal", "rho_8"), "temporal", "rho_8")
    assert (found.low, found.high) == expected


def test_a_group_with_no_value_has_its_reasons_once(tmp_path: Path) -> None:
    wild = {"state": "diverged", "reason": "too wild"}
    learners = [grid("topk", 8, 0, **wild), grid("topk", 8, 1, **wild), grid("topk", 8, 2, state="running")]
    (group,) = study_of(made_run(tmp_path, *learners)).groups
    found = summary(group, figure_of("heldout", "l0"))
    assert (found.value, found.reason) == (None, "diverged: too wild; not finished yet")
