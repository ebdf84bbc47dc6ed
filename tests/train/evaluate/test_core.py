"""Suite core on a small model: known SAEs, no model, a corpus, and what is written."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import build
from common.errors import ConfigError, DataError, Interrupted
from common.models import LanguageModel, load_model
from common.sources import find_model
from common.stopping import Stop
from common.store import Store
from tests.conftest import HOOK
from tests.train.evaluate.test_subject import subject_on
from train.config import EvalConfig
from train.data.batch import Batch
from train.evaluate import METRICS, write_evaluation
from train.evaluate.core import CORE_METRICS, DOWNSTREAM, core
from train.evaluate.core_text import Text
from train.evaluate.subject import Evaluation, Models, Subject
from train.saes import make_sae
from train.saes.base import SAE

D = 16
BATCHES = "2,1"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return load_model(find_model(str(tiny_model)), "cpu")


@pytest.fixture(scope="module")
def models(model: LanguageModel) -> Models:
    """The model, loaded already."""
    loaded = Models(torch.device("cpu"))
    loaded.load = lambda *_, **__: model  # type: ignore[method-assign]
    return loaded


def subject(store: Store, models: Models, sae: SAE, **options: Any) -> Subject:
    facts = {"model": "tiny", "training_tokens": 1234}
    made = subject_on(store, **({"batches": BATCHES} | options))
    return dataclasses.replace(made, sae=sae, facts=facts, models=models, folder=Path("runs/x/topk"))


def known(variant: str, b_dec: torch.Tensor | None = None, gain: float = 1.0) -> SAE:
    """`identity` or `mean` with an offset of choice, their decoder rows times `gain`."""
    sae = make_sae(variant, {}, D, 0, "test")
    with torch.no_grad():
        sae.W_dec.mul_(gain)
        if b_dec is not None:
            sae.b_dec.copy_(b_dec)
    return sae


def evaluated(found: Evaluation, model: LanguageModel) -> torch.Tensor:
    """The activations [tokens, d] that the sparsity figures of a result are about."""
    tokens, mask = (torch.from_numpy(found.arrays[name])[32:] for name in ("tokens", "mask"))
    return model.capture(tokens.long(), [HOOK])[HOOK][mask]


# ---- SAEs whose figures are known --------------------------------------------------------------------------------


def test_the_identity_changes_nothing(store: Store, models: Models) -> None:
    found = core(subject(store, models, known("identity"))).metrics
    assert abs(found["kl_div_with_sae"]) < 1e-7
    for name in ("ce_loss_score", "kl_div_score", "l2_ratio", "relative_reconstruction_bias", "cossim"):
        assert found[name] == pytest.approx(1, abs=1e-3), name  # the scores of a random model: small differences
    for name in ("explained_variance", "explained_variance_legacy", "explained_variance_saebench_v06"):
        assert found[name] == pytest.approx(1, abs=1e-6), name
    assert (found["l0"], found["mse"]) == (D, pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize("exclude", [False, True])
def test_nothing_in_place_of_x_is_zero_ablation_unless_special_tokens_are_kept(
    store: Store, models: Models, exclude: bool
) -> None:
    found = core(subject(store, models, known("mean"), exclude_special=exclude))
    scores = (found.metrics["ce_loss_score"], found.metrics["kl_div_score"])
    assert (scores == (0, 0)) == (not exclude)
    assert found.metrics["kl_div_with_ablation"] > 0
    assert found.more["eval_config"]["exclude_special_tokens_from_reconstruction"] == exclude


def test_figures_that_are_no_number_are_null_with_a_reason_and_as_saebench_saves_them_in_its_part(
    store: Store, models: Models
) -> None:
    found = core(subject(store, models, known("mean")))
    assert set(found.reasons) == {"cossim", "relative_reconstruction_bias"}
    assert found.reasons["cossim"] == "an activation or a reconstruction of length 0 has no cosine"
    assert found.metrics["cossim"] is None
    theirs = found.more["eval_result_metrics"]
    assert theirs["reconstruction_quality"]["cossim"] == theirs["shrinkage"]["relative_reconstruction_bias"] == -1
    dead = found.more["eval_result_details"][0]
    assert (dead["feature_density"], dead["consistent_activation_heuristic"]) == (0, -1)
    assert found.metrics["frac_alive"] == 0


def test_an_infinite_figure_is_null_with_a_reason_and_can_be_written(
    store: Store, models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = importlib.import_module("train.evaluate.core")
    taken = module.text_of

    def with_one_token(*args: Any) -> Text:
        text: Text = taken(*args)
        counted = torch.zeros_like(text.contexts.counted)
        counted[::16, 1] = True
        return dataclasses.replace(text, contexts=dataclasses.replace(text.contexts, counted=counted))

    monkeypatch.setattr(module, "text_of", with_one_token)  # a token alone in its batch is the batch's mean
    found = core(subject(store, models, known("identity", gain=0.5)))
    assert found.metrics["tokens_sparsity_variance"] == 1
    assert found.reasons["explained_variance_legacy"] == "a token lies on the mean of its batch"
    assert found.more["eval_result_metrics"]["reconstruction_quality"]["explained_variance_legacy"] == -1
    assert write_evaluation(tmp_path, "core", found)["metrics"]["explained_variance_legacy"] is None


def test_the_mean_explains_nothing(store: Store, models: Models, model: LanguageModel) -> None:
    mean = evaluated(core(subject(store, models, known("mean"))), model).mean(0)
    found = core(subject(store, models, known("mean", mean))).metrics
    assert found["explained_variance"] == pytest.approx(0, abs=1e-6)


def test_a_smaller_reconstruction_has_a_smaller_ratio(store: Store, models: Models, model: LanguageModel) -> None:
    result = core(subject(store, models, known("identity", gain=0.5)))
    found, x = result.metrics, evaluated(result, model).double()
    expected = {
        "l2_ratio": 0.5,
        "cossim": 1.0,
        "relative_reconstruction_bias": 0.5,
        "nmse": 0.25,
        "mse": 0.25 * x.square().sum(-1).mean().item(),
        "mse_saebench": 0.25 * x.square().sum(-1).mean().item() / len(x),
        "l2_norm_in": x.norm(dim=-1).mean().item(),
        "l2_norm_out": 0.5 * x.norm(dim=-1).mean().item(),
        "l1": x.abs().sum(-1).mean().item(),
        "explained_variance": 1 - 0.25 * (x.square().sum() / (x - x.mean(0)).square().sum()).item(),
        "tokens_sparsity_variance": len(x),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)  # float32 latents


# ---- text and activations ----------------------------------------------------------------------------------------


def test_without_the_model_its_figures_are_null_and_the_others_are_the_stores(store: Store, models: Models) -> None:
    sae = make_sae("topk", {"d_sae": 32, "k": 4}, D, 0, "test")
    live = core(subject(store, models, sae))
    stored = core(subject(store, Models(torch.device("cpu")), sae, model="./nowhere"))
    assert set(stored.reasons) == set(DOWNSTREAM)
    assert set(stored.reasons.values()) == {"--model ./nowhere: no such folder."}
    assert all(stored.metrics[name] is None for name in DOWNSTREAM)
    theirs = stored.more["eval_result_metrics"]
    for group in ("model_behavior_preservation", "model_performance_preservation"):
        assert set(theirs[group].values()) == {None}
    assert theirs["token_stats"]["total_tokens_eval_reconstruction"] is None
    assert (stored.more["eval_config"]["compute_kl"], live.more["eval_config"]["compute_kl"]) == (False, True)
    assert (live.more["activations"]["from"], live.more["activations"]["dtype"]) == ("the model", "float32")
    assert (stored.more["activations"]["from"], stored.more["activations"]["dtype"]) == ("the store", "bfloat16")
    assert np.array_equal(live.arrays["tokens"], stored.arrays["tokens"])
    for name in set(CORE_METRICS) - set(DOWNSTREAM):
        assert stored.metrics[name] == pytest.approx(live.metrics[name], rel=0.02, abs=0.01), name  # bfloat16


def test_an_sae_that_sees_the_future_has_no_downstream_figures(store: Store, models: Models) -> None:
    sae = make_sae("multiscale", {"d_sae": 32, "k": 4, "causal": False}, D, 0, "test")
    found = core(subject(store, models, sae))
    assert set(found.reasons) == set(DOWNSTREAM)
    assert all("sees the future" in reason for reason in found.reasons.values())
    assert isinstance(found.metrics["explained_variance"], float)


def test_positions_masked_at_harvest_do_not_count_without_the_model(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Subject.held_out

    def masked(self: Subject, window: int | None = None) -> Iterator[Batch]:
        for batch in read(self, window):
            x = batch.x.clone()
            x[:, 40:] = 0.0  # as the harvest leaves what was not finite
            yield batch.with_x(x)

    absent = Models(torch.device("cpu"))
    options = {"model": "./nowhere", "batches": "1,1"}
    whole = core(subject(store, absent, known("identity"), **options)).arrays["mask"]
    monkeypatch.setattr(Subject, "held_out", masked)
    found = core(subject(store, absent, known("identity"), **options))
    assert whole[:, 40:].any()
    whole[:, 40:] = False
    assert np.array_equal(found.arrays["mask"], whole)
    assert found.metrics["tokens_sparsity_variance"] == whole[16:].sum()


def test_a_corpus_needs_the_model_and_its_mistakes_are_told(store: Store, texts: Path, models: Models) -> None:
    sae = known("identity")
    with pytest.raises(ConfigError, match=r"--model \./nowhere: no such folder"):
        core(subject(store, Models(torch.device("cpu")), sae, model="./nowhere", corpus=str(texts)))
    with pytest.raises(ConfigError, match="no such file or folder"):
        core(subject(store, models, sae, corpus="./nothing.txt"))
    with pytest.raises(DataError, match="--batches 900,1 needs 14416"):
        core(subject(store, models, sae, corpus=str(texts), batches="900,1"))


def test_a_corpus_is_evaluated_in_sequences_of_128(store: Store, texts: Path, models: Models) -> None:
    found = core(subject(store, models, known("identity"), corpus=str(texts)))
    assert found.arrays["tokens"].shape == (48, 128)
    assert found.metrics["total_tokens_eval_reconstruction"] == 2 * 16 * 128
    assert found.metrics["total_tokens_eval_sparsity_variance"] == 16 * 128
    assert found.metrics["tokens_sparsity_variance"] == (found.arrays["tokens"][32:] != 256).sum()
    assert found.more["eval_config"]["dataset"] == str(texts)
    assert found.more["text"]["corpus"]["name"] == texts.name
    assert found.metrics["kl_div_with_sae"] == pytest.approx(0, abs=1e-7)


def test_a_short_text_gives_fewer_batches_and_says_so(
    store: Store, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    found = core(subject(store, models, known("identity"), batches=None))
    n = len(found.arrays["tokens"]) // 16
    assert 2 <= n < 11
    assert found.more["text"]["batches_asked"] == [10, 1]
    assert found.more["text"]["batches"] == [n - 1, 1]
    assert f"the text is short: {n - 1} instead of 10 reconstruction batches, of 16 seq" in capsys.readouterr().err
    few = core(subject(store, models, known("identity"), batches=None, max_tokens=200))
    size = few.more["text"]["sequences_per_batch"]
    assert (few.more["text"]["batches"], len(few.arrays["tokens"])) == ([1, 1], 2 * size)
    assert 1 <= size < 16
    assert few.metrics["ce_loss_score"] == pytest.approx(1, abs=1e-6)
    assert few.more["eval_config"]["batch_size_prompts"] == size


def test_norms_that_stand_out_are_held_against_the_true_separators(
    store: Store, texts: Path, models: Models, model: LanguageModel
) -> None:
    looked_at = subject(store, models, known("identity"), corpus=str(texts))
    found = core(looked_at)
    tokens = torch.from_numpy(found.arrays["tokens"][32:]).long()
    begins = (tokens == 256) & (torch.arange(128) > 0)
    norms = model.capture(tokens, [HOOK])[HOOK].norm(dim=-1)
    assert found.metrics["separators"] == begins.sum()
    assert found.more["separators_by_norm"] == {"found": 0, "right": 0}  # a random model has no sinks
    at = float(norms[begins].min()) / 10 - 1e-6  # now every BOS stands out, and whatever is longer
    looked_at = dataclasses.replace(looked_at, facts={"median_norm": at})
    seen = core(looked_at).more["separators_by_norm"]
    assert seen["right"] == begins.sum() > 0
    assert seen["found"] == ((norms > 10 * at) & (torch.arange(128) > 0)).sum()


def test_a_stop_is_heeded(store: Store, models: Models) -> None:
    asked = dataclasses.replace(subject(store, models, known("identity")), stop=Stop("SIGTERM"))
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        core(asked)


# ---- what is written ---------------------------------------------------------------------------------------------

SAEBENCH_KEYS = {  # as SAEBench 0.6.0 writes them
    "eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics", "eval_result_details",
    "eval_result_unstructured", "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version",
    "sae_cfg_dict",
}  # fmt: skip
CONFIG_KEYS = {
    "model_name", "llm_dtype", "batch_size_prompts", "n_eval_reconstruction_batches",
    "n_eval_sparsity_variance_batches", "dataset", "context_size", "compute_kl", "compute_ce_loss",
    "compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics",
    "compute_featurewise_density_statistics", "compute_featurewise_weight_based_metrics",
    "exclude_special_tokens_from_reconstruction", "verbose",
}  # fmt: skip
METRIC_KEYS = {
    "model_behavior_preservation": {"kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"},
    "model_performance_preservation": {
        "ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"
    },
    "reconstruction_quality": {"explained_variance", "explained_variance_legacy", "mse", "cossim"},
    "shrinkage": {"l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"},
    "sparsity": {"l0", "l1"},
    "token_stats": {"total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"},
    "misc_metrics": {
        "freq_over_1_percent", "freq_over_10_percent", "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent", "average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim",
        "frac_alive",
    },
}  # fmt: skip
DETAIL_KEYS = {
    "index", "feature_density", "consistent_activation_heuristic", "encoder_bias", "encoder_norm",
    "encoder_decoder_cosine_sim", "max_decoder_cosine_sim", "max_encoder_cosine_sim",
}  # fmt: skip
SAE_KEYS = {
    "model_name", "d_in", "d_sae", "hook_layer", "hook_name", "context_size", "hook_head_index", "architecture",
    "apply_b_dec_to_input", "finetuning_scaling_factor", "activation_fn_str", "activation_fn_kwargs",
    "prepend_bos", "normalize_activations", "model_from_pretrained_kwargs",
    "dtype", "device", "dataset_path", "dataset_trust_remote_code", "seqpos_slice", "training_tokens",
    "sae_lens_training_version", "neuronpedia_id",
}  # fmt: skip


def test_what_is_written_has_the_keys_of_saebench_and_ours(store: Store, models: Models, tmp_path: Path) -> None:
    sae = make_sae("batchtopk", {"d_sae": 32, "k": 4}, D, 0, "test")
    found = core(subject(store, models, sae))
    learner = tmp_path / "run" / "topk"
    write_evaluation(learner, "core", found)
    written = json.loads((learner / "eval" / "core.json").read_text())
    own = {"learner", "run", "suite", "metrics", "reasons", "text", "activations", "separators_by_norm"}
    assert set(written) == SAEBENCH_KEYS | own
    assert list(written["metrics"]) == list(METRICS["core"])
    assert set(written["eval_config"]) == CONFIG_KEYS
    theirs = written["eval_result_metrics"]
    assert {group: set(values) for group, values in theirs.items()} == METRIC_KEYS
    assert [detail["index"] for detail in written["eval_result_details"]] == list(range(32))
    assert all(set(detail) == DETAIL_KEYS for detail in written["eval_result_details"])
    assert set(written["sae_cfg_dict"]) == SAE_KEYS | {"granary"}
    assert (
        theirs["reconstruction_quality"]["explained_variance"] == written["metrics"]["explained_variance_saebench_v06"]
    )
    assert theirs["reconstruction_quality"]["mse"] == written["metrics"]["mse_saebench"]
    for group, names in METRIC_KEYS.items():
        for name in names - {"explained_variance", "mse"}:
            assert theirs[group][name] == written["metrics"][name]
    assert all(math.isfinite(value) for value in written["metrics"].values())
    assert written["eval_id"] == str(uuid.UUID(written["eval_id"]))
    tokens = np.load(learner / "eval" / "core_tokens.npy")
    assert (tokens.dtype, tokens.shape) == (np.int32, (48, 64))
    assert np.load(learner / "eval" / "core_mask.npy").dtype == bool


def test_the_same_evaluation_gives_the_same_result(store: Store, models: Models) -> None:
    sae = make_sae("topk", {"d_sae": 32, "k": 4}, D, 0, "test")
    one, other = (core(subject(store, models, sae)) for _ in range(2))
    assert one.metrics == other.metrics
    assert one.more["eval_id"] == other.more["eval_id"]
    assert core(subject(store, models, sae, batches="1,1")).more["eval_id"] != one.more["eval_id"]


def test_arrays_lie_beside_the_result_they_belong_to(tmp_path: Path) -> None:
    write_evaluation(tmp_path, "core", Evaluation({}, arrays={"tokens": np.arange(3)}), max_tokens=500)
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == ["core-500.json", "core-500_tokens.npy"]
    assert np.load(tmp_path / "eval" / "core-500_tokens.npy").tolist() == [0, 1, 2]


def test_batches_of_the_settings_are_numbers() -> None:
    assert build(EvalConfig, {"batches": "200,2000"}, "test").core_batches() == (200, 2000)
    assert build(EvalConfig, {}, "test").core_batches() is None
