"""The suite from a store to its figures, for SAEs with levels and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import build
from common.errors import ConfigError, Interrupted
from common.store import Store
from tests.train.evaluate.made_codes import few_resamples
from tests.train.evaluate.test_subject import subject_on
from train.config import DataConfig
from train.data.reader import Batches
from train.evaluate import METRICS, path_figures, write_evaluation
from train.evaluate.hierarchy import hierarchy
from train.evaluate.level_pair import PAIR_METRICS
from train.evaluate.path_figures import PATH_METRICS
from train.evaluate.structure import edges_of, hierarchy_scores
from train.evaluate.subject import Evaluation, Subject
from train.saes import REGISTRY, make_sae
from train.saes.tree import Tree

__all__ = ["few_resamples"]  # holds for every test here

TOKENS = 12_000  # six documents


@pytest.fixture(scope="module")
def opened(shared_store: Path) -> Store:
    return Store.open(shared_store)


def subject_of(store: Store, variant: str, **options: object) -> Subject:
    subject = subject_on(store, max_tokens=TOKENS, **options)
    options = {"d_sae": 32, "k": 4, "pretrain": 0.0}  # compositional: all levels from the beginning
    known = REGISTRY[variant].Config.model_fields
    settings = {name: value for name, value in options.items() if name in known}
    sae = make_sae(variant, settings, 16, 0, "test", store.context)
    batches = Batches.of(store, build(DataConfig, {"held_out": 0.9}, "test"))  # more documents than a fifth
    batch = next(batches.held_out(sae.window, TOKENS))
    with torch.no_grad():
        sae.start(float(batch.n_valid**0.5 / batch.x[batch.valid].float().norm()), batch.x[batch.valid].float().mean(0))
        sae.b_dec.mul_(sae.scale)
        sae.calibrate(lambda: [batch.with_x(batch.x.float() * sae.scale)])
    return replace(subject, sae=sae.eval(), batches=batches)


@pytest.fixture(scope="module")
def few_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_figures, "MOST_ROWS", 2)
        yield


@pytest.fixture(scope="module")
def tree(opened: Store, few_rows: None) -> tuple[Subject, Evaluation]:
    subject = subject_of(opened, "tree")
    return subject, hierarchy(subject)


@pytest.fixture(scope="module")
def flat(opened: Store, few_rows: None) -> tuple[Subject, Evaluation]:
    subject = subject_of(opened, "batchtopk", levels="1,2,4")
    return subject, hierarchy(subject)


def complete(found: Evaluation) -> None:
    """Every metric in order, and a reason for just those that are None."""
    assert list(found.metrics) == list(METRICS["hierarchy"])
    assert {name for name, value in found.metrics.items() if value is None} == set(found.reasons)
    json.dumps([found.metrics, found.reasons, found.more], allow_nan=False)


def test_tree_has_its_own_levels_edges_and_paths(tree: tuple[Subject, Evaluation]) -> None:
    subject, found = tree
    complete(found)
    assert found.more["own_levels"]
    assert [level["name"] for level in found.more["levels"]] == ["top", "mid", "leaf"]
    assert [(pair["upper"], pair["lower"]) for pair in found.more["pairs"]] == [("top", "mid"), ("mid", "leaf")]
    assert {pair["links"] for pair in found.more["pairs"]} == {"the variant's"}
    assert found.metrics["tokens"] >= TOKENS
    assert found.metrics["level_ev_1"] == found.more["levels"][0]["explained_variance"]
    assert found.metrics["level_ev_all"] == found.more["levels"][2]["explained_variance"]
    sae = subject.sae
    assert isinstance(sae, Tree)
    # streaming scores of the same edges on the same tokens; latents on fewer than ten tokens hardly count
    for number, edges in enumerate(edges_of(sae.parent, sae.edge_weights(), sae.forest.spans), start=1):
        own, _ = hierarchy_scores(sae, edges, lambda: subject.held_out(subject.store.context))
        assert found.metrics[f"hcs_up_{number}"] == pytest.approx(own.hcs(), abs=1e-3)
        assert found.metrics[f"coverage_down_{number}"] == pytest.approx(own.coverage_down, abs=1e-3)


def test_paths_of_the_tree_add_up_and_are_told(tree: tuple[Subject, Evaluation]) -> None:
    subject, found = tree
    assert float(found.metrics["path_split_error"]) < 1e-5  # rounding of float32 products
    assert float(found.metrics["path_completeness_error"]) < 0.2
    assert len(found.more["paths"]) == 2
    sae = subject.sae
    assert isinstance(sae, Tree)
    for example in found.more["paths"]:
        assert len(example["paths"]) == 10
        sizes = [abs(path["attribution"]) for path in example["paths"]]
        assert sizes == sorted(sizes, reverse=True)
        whole = example["logit_difference"] - example["from_b_dec_alone"]
        assert example["from_paths"] + example["from_error"] == pytest.approx(whole, abs=0.2 * abs(whole) + 0.01)
        for path in example["paths"]:
            top, mid, leaf = path["latents"].values()
            assert mid is None or top is None or sae.parent[mid] == top
            assert leaf is None or mid is None or sae.parent[leaf] == mid
            assert path["position"] <= example["position"]
        assert 1 <= len(example["context"]) <= 24
    curve = found.more["faithfulness"]
    assert [point["kept"] for point in curve][:3] == [0, 1, 2]
    assert curve[0]["ce"] == curve[0]["random_ce"]
    assert curve[-1]["ce"] == pytest.approx(curve[-1]["random_ce"])
    assert curve[-1]["kl"] < curve[0]["kl"]
    removal = {point["removed"]: point for point in found.more["removal"]}
    assert found.metrics["path_removed"] == removal[5]["ce_rise"]
    assert found.metrics["path_removed_random"] == removal[5]["random_ce_rise"]
    assert -1 <= found.metrics["path_correlation"] <= 1


def test_flat_sae_has_pseudo_levels_a_post_hoc_tree_and_latents_for_paths(flat: tuple[Subject, Evaluation]) -> None:
    found = flat[1]
    complete(found)
    assert not found.more["own_levels"]
    assert [level["latents"] for level in found.more["levels"]] == [5, 9, 18]
    l0 = [level["l0"] / level["latents"] for level in found.more["levels"]]
    assert l0 == sorted(l0, reverse=True)  # the densest first
    assert {pair["links"] for pair in found.more["pairs"]} == {"post-hoc tree"}
    assert all(set(path["latents"]) == {"latent"} for one in found.more["paths"] for path in one["paths"])
    assert found.metrics["coverage_up_2"] is not None


@pytest.mark.parametrize("variant", ["compositional", "matryoshka", "relational"])
def test_suite_goes_without_the_model_and_says_why_paths_are_missing(variant: str, opened: Store) -> None:
    levels = "1,3"  # for those that have none
    found = hierarchy(subject_of(opened, variant, levels=levels, model="/nowhere"))
    complete(found)
    reason = found.reasons["path_completeness_error"]
    assert {found.reasons[name] for name in PATH_METRICS} == {reason}
    if variant == "relational":
        assert reason.startswith("relational: x̂ depends on other positions")
    else:
        assert "/nowhere" in reason
    assert "paths" not in found.more
    assert found.more["own_levels"] == (variant != "relational")
    assert len(found.more["pairs"]) == {"compositional": 2, "matryoshka": 4, "relational": 1}[variant]
    if variant == "relational":
        assert found.metrics["nmi_1"] is not None
        assert found.reasons["nmi_2"] == "there are 2 levels"
        assert found.metrics["level_ev_2"] == found.metrics["level_ev_all"]


def test_sae_without_active_latents_has_reasons_and_no_figures(opened: Store) -> None:
    subject = subject_of(opened, "mean", model="/nowhere")
    found = hierarchy(subject)
    complete(found)
    assert all(found.metrics[f"{name}_1"] is None for name in PAIR_METRICS)
    assert found.reasons["hcs_up_2"].startswith("0 upper and 0 lower latents are alive on")


def test_result_is_the_same_again_and_is_written(
    flat: tuple[Subject, Evaluation], tmp_path: Path, opened: Store
) -> None:
    again = hierarchy(subject_of(opened, "batchtopk", levels="1,2,4", model="/nowhere"))
    same = [name for name in METRICS["hierarchy"] if name not in PATH_METRICS]
    assert {name: again.metrics[name] for name in same} == {name: flat[1].metrics[name] for name in same}
    assert again.more["intervals"] == flat[1].more["intervals"]
    written = write_evaluation(tmp_path / "x", "hierarchy", again, TOKENS)
    assert json.loads((tmp_path / "x" / "eval" / f"hierarchy-{TOKENS}.json").read_text()) == json.loads(
        json.dumps(written)
    )


def test_wrong_levels_and_a_stop_are_raised(opened: Store) -> None:
    with pytest.raises(ConfigError, match="--levels 1: at least two"):
        hierarchy(subject_of(opened, "batchtopk", levels="1"))
    subject = subject_of(opened, "batchtopk")
    subject.stop.signal_name = "SIGINT"
    with pytest.raises(Interrupted, match="stopped by SIGINT in an evaluation"):
        hierarchy(subject)


def test_explained_variance_of_levels_is_that_of_their_latents(flat: tuple[Subject, Evaluation]) -> None:
    subject, found = flat
    x = torch.cat([batch.x[batch.valid] for batch in subject.held_out()]).float()
    with torch.no_grad():
        codes = subject.sae.encode(x)
        order = np.argsort(-(codes > 0).double().mean(0).numpy(), kind="stable")
        kept = torch.zeros(32)
        kept[order[:14].copy()] = 1
        error = (x - subject.sae.decode(codes * kept)).double().square().sum()
    share = 1 - error / (x.double() - x.double().mean(0)).square().sum()
    assert found.metrics["level_ev_2"] == pytest.approx(float(share), abs=1e-3)
