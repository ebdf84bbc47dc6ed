"""Suite `cost`: counts against formulas; of times only that they are there."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import build
from common.errors import DataError
from common.files import read_json, write_json
from common.stopping import Stop
from tests.train import runs
from train.config import EvalConfig
from train.data.reader import Batches
from train.evaluate import timing
from train.evaluate.command import subject_of
from train.evaluate.cost import COST_METRICS, SHORT, cost, flops_per_token, parameters, some_activations
from train.evaluate.subject import Evaluation, Models
from train.evaluate.training_cost import batch_of, learner_like, peak_of_steps
from train.saes import REGISTRY, make_sae
from train.settings import saved_config

D, L = 16, 64
N, T = math.prod(SHORT), SHORT[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ENOUGH_S", 0.0)


@pytest.fixture(scope="module")
def run(shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of three learners on 16 dimensions, 32 latents."""
    out = tmp_path_factory.mktemp("cost") / "run"
    learners = (runs.learner("batchtopk"), runs.learner("predictor", window=32), runs.learner("mean"))
    runs.run(shared_store, out, *learners, steps=4, held_out=0.2)
    return out


def evaluated(folder: Path, **options: Any) -> Evaluation:
    config = build(EvalConfig, {"suite": "cost"} | options, "test")
    with subject_of(folder, config, Models(torch.device("cpu")), Stop()) as subject:
        return cost(subject)


# ---- the suite ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor(run: Path) -> Iterator[Evaluation]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ENOUGH_S", 0.0)
        yield evaluated(run / "predictor")


def test_metrics_are_those_of_the_table(predictor: Evaluation) -> None:
    assert list(predictor.metrics) == list(COST_METRICS)
    assert predictor.reasons == {}
    assert all(math.isfinite(value) and value >= 0 for value in predictor.metrics.values())
    times = predictor.more["times"]
    assert set(times) == {"encode", "forward", "long_encode", "long_forward", "training_step"}
    for name, described in times.items():
        assert described["repeats"] == 5
        assert predictor.metrics[f"{name}_ms"] == described["quartiles_ms"][1] > 0
        assert predictor.metrics[f"{name}_ratio"] == described["ratio_quartiles"][1] > 0


def test_figures_of_a_predictor_by_hand(predictor: Evaluation, run: Path) -> None:
    found, width = predictor.metrics, 32
    flat, extra = 2 * D * width + width + D, width * 32 + 32 * D + 16 * 32  # W_past, W_out, weights of 16 lags
    assert found["parameters"] == flat + extra
    assert found["parameters_encoder"] == found["parameters_decoder"] == D * width
    assert (found["parameters_biases"], found["parameters_other"]) == (width + D, extra)
    assert predictor.more["flat"]["parameters"] == flat
    assert found["bytes"] == (run / "predictor" / "sae" / "weights.safetensors").stat().st_size
    assert found["encode_peak_ratio"] == 1  # it encodes as the flat one
    assert found["training_peak_ratio"] > 1
    assert found["flops_ratio"] > 1


def test_recorded_speed_is_over_that_of_the_flat_learner(predictor: Evaluation, run: Path) -> None:
    results = {name: read_json(run / name / "result.json") for name in ("predictor", "batchtopk")}
    speeds = {name: result["tokens_seen"] / result["seconds"] for name, result in results.items()}
    assert predictor.metrics["training_tokens_per_s"] == speeds["predictor"]
    assert predictor.metrics["training_speed_ratio"] == speeds["predictor"] / speeds["batchtopk"]


def test_a_reference_is_not_trained_and_aims_at_nothing(run: Path) -> None:
    found = evaluated(run / "mean")
    assert found.metrics["training_step_ms"] is None
    assert found.metrics["training_peak_bytes"] is None
    assert found.reasons["training_peak_bytes"] == "mean is a reference: nothing is trained"
    assert "mean aims at no L0" in found.reasons["training_speed_ratio"]
    assert found.metrics["encode_ratio"] > 0


def test_speeds_of_other_runs_and_unrecorded_ones_do_not_compare(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    found = evaluated(other / "predictor", baseline=str(run))
    assert found.metrics["training_speed_ratio"] is None
    assert "of another run" in found.reasons["training_speed_ratio"]
    for name in ("predictor", "batchtopk"):
        file = other / name / "result.json"
        write_json(file, read_json(file) | {"tokens_seen": 0})
        found = evaluated(other / "predictor", baseline="batchtopk")
        assert found.reasons["training_speed_ratio"].startswith(f"{other / 'predictor'}")
        assert "no steps and seconds" in found.reasons["training_tokens_per_s"]


def test_no_held_out_token_is_refused(run: Path) -> None:
    config = build(EvalConfig, {}, "test")
    with subject_of(run / "batchtopk", config, Models(torch.device("cpu")), Stop()) as subject:
        nothing = subject.plan.config.model_copy(update={"held_out": 0.0})
        batches = Batches(subject.store, dataclasses.replace(subject.plan, config=nothing))
        with pytest.raises(DataError, match="no held-out token"):
            cost(dataclasses.replace(subject, batches=batches))


def test_few_activations_are_taken_over_again(run: Path) -> None:
    config = build(EvalConfig, {"max_tokens": 30}, "test")
    with subject_of(run / "batchtopk", config, Models(torch.device("cpu")), Stop()) as subject:
        x = some_activations(subject, 100)
    assert x.shape == (100, D)
    assert torch.equal(x[30:60], x[:30])
    assert torch.equal(x[90:], x[:10])
    assert not torch.equal(x[0], x[1])


# ---- counts ------------------------------------------------------------------------------------------------------


def extra_flops(variant: str) -> tuple[float, float]:
    """What encode and decode multiply for a token beyond [D] by [D, L] and [L] by [L, D], by the formulas of docs."""
    n = L // 4
    match variant:
        case "compositional":
            high, mid = round(L / 7), round(2 * L / 7)
            return 2 * mid * (L - mid - high) + 2 * high * mid, 0
        case "predictor":
            return 0, 2 * L * 32 + 2 * 16 * 32 + 2 * 32 * D  # W_past, 16 lags of 32 values, W_out
        case "relational":
            heads, rank, buckets, low = 4, 16, 32, 8
            attention = 3 * 2 * D * heads * rank + 2 * 2 * T * heads * rank + 2 * heads * rank * n
            position = 2 * buckets * low + 2 * low * n
            reading = 2 * n * (16 + 16 + 32) + 2 * T * (16 + 32) + 2 * 32 * D
            return attention + position, reading
    return 0, 0


@pytest.mark.parametrize("variant", list(REGISTRY))
def test_flops_are_those_of_the_formula(variant: str) -> None:
    sae = make_sae(variant, {"d_sae": L}, D, 0, "test").eval().requires_grad_(False)
    batch = batch_of(torch.randn(N, D, generator=torch.Generator().manual_seed(0)), SHORT)
    encode, decode = flops_per_token(sae, batch)
    width = sae.d_sae  # a reference has 2 D
    more_encode, more_decode = extra_flops(variant)
    # most multiply b_dec too, once for all tokens
    once = 0 if variant in ("multiscale", "jumprelu") else 2 * D * width / N
    assert encode == pytest.approx(2 * D * width + more_encode + once)
    assert decode == pytest.approx(2 * D * width + more_decode)


@pytest.mark.parametrize("variant", list(REGISTRY))
def test_parts_add_up_to_all_parameters(variant: str) -> None:
    sae = make_sae(variant, {"d_sae": L}, D, 0, "test")
    found = parameters(sae)
    total = sum(parameter.numel() for parameter in sae.parameters())
    assert found.pop("parameters") == total == sum(found.values())
    assert found["parameters_encoder"] == D * sae.d_sae
    composed = variant == "compositional"  # upper rows are made from lower ones
    assert found["parameters_decoder"] == D * (sae.d_sae - (sae.d_sae // 7 * 3 if composed else 0))


@pytest.mark.parametrize("variant", [name for name, cls in REGISTRY.items() if cls.trained])
def test_a_training_step_of_every_variant_can_be_taken(variant: str, run: Path) -> None:
    options = {"d_sae": L} | ({"window": 32} if REGISTRY[variant].Config.model_fields["window"].default > 1 else {})
    sae = make_sae(variant, options, D, 0, "test")
    config = build(EvalConfig, {}, "test")
    x = torch.randn(512, D, generator=torch.Generator().manual_seed(0))
    with subject_of(run / "batchtopk", config, Models(torch.device("cpu")), Stop()) as subject:
        learner = learner_like(sae, subject, x, saved_config(run))
    peak = peak_of_steps(learner, batch_of(x, (512 // sae.window, sae.window)))
    trained = sum(parameter.numel() for parameter in learner.sae.parameters() if parameter.requires_grad)
    assert peak > 4 * 4 * trained  # weights, gradients and two averages, and then some
    if variant != "contrastive":  # which holds similarities of 512 keys with 8,192 negatives
        assert peak < 4 * (4 * trained + 40 * 512 * L) + sum(buffer.nbytes for buffer in learner.sae.buffers())
    assert learner.step == 9902
