"""Suite `temporal` on a small run, and its figures on codes made by hand."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import build
from common.errors import ConfigError, DataError
from common.files import read_json, write_json
from common.stopping import Stop
from tests.train import runs
from train.config import EvalConfig
from train.data.reader import Batches
from train.evaluate.command import subject_of
from train.evaluate.matching import density_matched
from train.evaluate.persistence import mass_weighted, measure_persistence
from train.evaluate.subject import Evaluation, Models, Subject
from train.evaluate.temporal import TEMPORAL_METRICS, temporal
from train.saes import load_sae
from train.settings import saved_config

MATCHED = ("matched_rho_8", "matched_rho_8_baseline", "matched_difference", "matched_covered")


@pytest.fixture(scope="module")
def run(shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of a contrastive learner beside a flat one and a reference."""
    out = tmp_path_factory.mktemp("temporal") / "run"
    learners = (
        runs.learner("batchtopk"),
        runs.learner("contrastive", window=32, buffer=0, keys=64, anchors=16),
        runs.learner("mean"),
    )
    runs.run(shared_store, out, *learners, steps=4, held_out=0.2)
    return out


@contextmanager
def subject(folder: Path, **options: Any) -> Iterator[Subject]:
    config = build(EvalConfig, {"suite": "temporal"} | options, "test")
    with subject_of(folder, config, Models(torch.device("cpu")), Stop()) as found:
        yield found


def evaluated(folder: Path, **options: Any) -> Evaluation:
    with subject(folder, **options) as found:
        return temporal(found)


def holding_out(found: Subject, share: float) -> Subject:
    """The same with another share of the documents."""
    config = found.plan.config.model_copy(update={"held_out": share})
    plan = dataclasses.replace(found.plan, config=config)
    return dataclasses.replace(found, batches=Batches(found.store, plan))


@pytest.fixture(scope="module")
def contrastive(run: Path) -> Evaluation:
    return evaluated(run / "contrastive")


# ---- the suite ---------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_table_and_every_null_has_a_reason(run: Path, contrastive: Evaluation) -> None:
    for found in (contrastive, evaluated(run / "mean")):
        assert list(found.metrics) == list(TEMPORAL_METRICS)
        assert {key for key, value in found.metrics.items() if value is None} == set(found.reasons)
        assert all(value is None or math.isfinite(value) for value in found.metrics.values())


def test_figures_are_those_of_the_functions_they_come_from(run: Path, contrastive: Evaluation) -> None:
    found = contrastive
    with subject(run / "contrastive") as looked_at:
        sae, flat = looked_at.sae, load_sae(run / "batchtopk")
        batches = list(looked_at.held_out(looked_at.store.context))
    ours, theirs = measure_persistence(sae, batches), measure_persistence(flat, batches)
    tokens = sum(batch.n_valid for batch in batches)
    alive, flat_alive = (one.density * tokens >= 10 for one in (ours, theirs))
    matched = density_matched(ours, theirs, 8, alive, flat_alive)
    expected = {
        "tokens": tokens,
        "alive": int(alive.sum()),
        "rho_1": mass_weighted(ours.rho[1], ours.mass, alive),
        "rho_8": mass_weighted(ours.rho[8], ours.mass, alive),
        "rho_8_unweighted": float(ours.rho[8][alive].mean()),
        "matched_rho_8": matched.value,
        "matched_difference": matched.value - matched.reference,
    }
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    assert found.more["baseline"] == str(run / "batchtopk")
    curve = found.more["curve"]
    assert curve["lags"] == [1, 2, 4, 8, 16, 32]  # sequences of 64 have no pairs 64 apart
    assert curve["rho"][3] == pytest.approx(expected["rho_8"])
    assert {len(values) for values in curve.values()} == {6}
    bins = found.more["density_bins"]
    assert sum(bins["latents"]) == expected["alive"]
    assert sum(bins["baseline_mass"]) == pytest.approx(1)


def test_a_flat_learner_is_its_own_baseline(run: Path) -> None:
    found = evaluated(run / "batchtopk")
    assert found.metrics["matched_difference"] == 0
    assert found.metrics["matched_rho_8"] == pytest.approx(found.metrics["rho_8"])
    assert found.metrics["matched_covered"] == pytest.approx(1)
    assert found.more["groups"] == {}


def test_groups_share_the_mass_and_have_figures_of_their_own(contrastive: Evaluation) -> None:
    found = contrastive
    groups = found.more["groups"]
    assert list(groups) == ["high", "low"]
    assert sum(group["latents"] for group in groups.values()) == 32
    assert sum(group["mass"] for group in groups.values()) == pytest.approx(1)
    assert sum(group["l0"] for group in groups.values()) == pytest.approx(found.metrics["l0"])
    masses = [group["mass"] for group in groups.values()]
    rhos = [group["rho_8"] for group in groups.values()]
    assert rhos[0] != rhos[1]
    assert sum(m * r for m, r in zip(masses, rhos, strict=True)) == pytest.approx(found.metrics["rho_8"], abs=1e-3)
    for group in groups.values():
        assert (group["correlation_time"] is None) == bool(group["reason"])


def test_dead_latents_leave_everything_but_counts_out(run: Path) -> None:
    found = evaluated(run / "mean")
    assert (found.metrics["l0"], found.metrics["alive"], found.metrics["dense_share"]) == (0, 0, 0)
    assert found.reasons["rho_8"] == "no latent is active on enough of these tokens"
    assert found.more["intervals"] == {"rho_8": None, "matched_difference": None}


def test_one_short_document_has_no_null_and_no_interval(run: Path) -> None:
    with subject(run / "contrastive", max_tokens=40) as many:
        found = temporal(holding_out(many, 1e-9))  # one document at least is held out; of it one sequence is read
    assert found.metrics["documents"] == 1
    assert found.metrics["rho_8"] is not None
    assert found.metrics["rho_8_null"] is None
    assert "the null needs several documents" in found.reasons["rho_8_null"]
    assert "none of different documents" in found.reasons["correlation_time"]
    assert found.reasons["sequence_l0"] == "no held-out document has 128 tokens"
    assert set(found.more["intervals"].values()) == {None}


def test_no_held_out_token_is_refused(run: Path) -> None:
    with subject(run / "batchtopk") as found, pytest.raises(DataError, match="no held-out token"):
        temporal(holding_out(found, 0))


def test_the_same_command_gives_the_same_file(run: Path, contrastive: Evaluation) -> None:
    assert evaluated(run / "contrastive") == contrastive


# ---- baselines ---------------------------------------------------------------------------------------------------


def test_without_a_flat_learner_the_matched_figures_have_a_reason(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "run"
    shutil.copytree(run, alone)
    shutil.rmtree(alone / "batchtopk")
    found = evaluated(alone / "contrastive")
    assert [found.metrics[name] for name in MATCHED] == [None] * 4
    assert f"no finished batchtopk of L0 4 and seed 0 in {alone}" in found.reasons["matched_rho_8"]
    assert found.more["baseline"] is None
    assert found.more["intervals"]["rho_8"] is not None
    # a folder of a learner, and a folder of a run
    named = evaluated(alone / "contrastive", baseline=str(run / "batchtopk"))
    chosen = evaluated(alone / "contrastive", baseline=str(run))
    assert named == chosen
    assert named.more["baseline"] == str(run / "batchtopk")


def test_a_baseline_may_be_any_learner_of_the_run(run: Path) -> None:
    found = evaluated(run / "batchtopk", baseline="contrastive")
    assert found.more["baseline"] == str(run / "contrastive")
    back = evaluated(run / "contrastive", baseline="contrastive")
    assert found.metrics["matched_rho_8_baseline"] != found.metrics["matched_rho_8"]
    assert back.metrics["matched_difference"] == 0


def test_what_is_no_learner_is_refused_as_baseline(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"--baseline nobody: no trained learner, neither in .* nor at that path"):
        evaluated(run / "batchtopk", baseline="nobody")


def test_a_baseline_of_other_activations_is_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "flat"
    shutil.copytree(run / "batchtopk", other)
    facts = read_json(other / "sae" / "config.json")
    write_json(other / "sae" / "config.json", facts | {"hook": "blocks.9.hook_resid_post"})
    with pytest.raises(ConfigError, match=r"trained on hook blocks\.9\.hook_resid_post, .* their codes do not compare"):
        evaluated(run / "contrastive", baseline=str(other))


def test_a_baseline_that_was_trained_on_held_out_documents_is_refused(run: Path, tmp_path: Path) -> None:
    for share, seen in ((0.3, False), (0.1, True)):
        other = tmp_path / f"run-{share}"
        shutil.copytree(run, other)
        file = other / "run.toml"
        file.write_text(file.read_text().replace("held_out = 0.2", f"held_out = {share}"))
        assert saved_config(other).held_out == share
        if not seen:
            assert evaluated(run / "contrastive", baseline=str(other)).metrics["matched_rho_8"] is not None
            continue
        with pytest.raises(
            ConfigError, match=r"trained on documents that are held out here \(--held-out 0\.1, here 0\.2"
        ):
            evaluated(run / "contrastive", baseline=str(other))
