"""A result of suite `core` in the layout that SAEBench 0.6.0 saves, so that its readers and plots can take it."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.files import fingerprint
from common.models import layer_of
from train.evaluate.subject import Subject
from train.exchange.bench_config import BenchConfig

# groups of their metrics; the right-hand side is our name where the two differ
GROUPS: dict[str, dict[str, str]] = {
    "model_behavior_preservation": {name: name for name in ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae")},
    "model_performance_preservation": {
        name: name for name in ("ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae")
    },
    "reconstruction_quality": {
        "explained_variance": "explained_variance_saebench_v06",
        "explained_variance_legacy": "explained_variance_legacy",
        "mse": "mse_saebench",
        "cossim": "cossim",
    },
    "shrinkage": {
        name: name for name in ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias")
    },
    "sparsity": {name: name for name in ("l0", "l1")},
    "token_stats": {
        name: name for name in ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance")
    },
    "misc_metrics": {
        name: name
        for name in (
            "freq_over_1_percent",
            "freq_over_10_percent",
            "normalized_freq_over_1_percent",
            "normalized_freq_over_10_percent",
            "average_max_encoder_cosine_sim",
            "average_max_decoder_cosine_sim",
            "frac_alive",
        )
    },
}  # fmt: skip
DETAIL_DIGITS = 10


def saebench_layout(
    subject: Subject, measured: Mapping[str, Any], by_latent: Mapping[str, Tensor], eval_config: dict[str, Any]
) -> dict[str, Any]:
    """The keys that SAEBench writes at the top level.

    Args:
        measured: our figures by name; None where one was not measured (null here too), not finite: −1 here.
        by_latent: figures of each latent [d_sae].
    """
    metrics = {
        group: {theirs: saved(measured[ours]) for theirs, ours in names.items()} for group, names in GROUPS.items()
    }
    columns = {name: [saved(round(value, DETAIL_DIGITS)) for value in by_latent[name].tolist()] for name in by_latent}
    details = [
        {"index": index} | dict(zip(columns, values, strict=True))
        for index, values in enumerate(zip(*columns.values(), strict=True))
    ]
    what = [str(subject.folder.name), subject.facts, eval_config, metrics]
    return {
        "eval_type_id": "core",
        "eval_config": eval_config,
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, fingerprint(what))),  # the same result has the same id
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        "eval_result_unstructured": {},
        "sae_bench_commit_hash": "none: measured by Granary",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": f"{subject.folder.parent.name}_{subject.folder.name}",
        "sae_lens_version": None,
        "sae_cfg_dict": sae_cfg(subject),
    }


def saved(value: Any) -> Any:
    """What SAEBench saves for a number: −1 for NaN; for infinity too, which JSON does not have."""
    return -1 if isinstance(value, float) and not math.isfinite(value) else value


def core_config(
    subject: Subject, dataset: str, context: int, batches: tuple[int, int], size: int, with_model: bool
) -> dict[str, Any]:
    """SAEBench's `eval_config`; `batches` of `size` sequences."""
    return {
        "model_name": str(subject.facts.get("model", "")),
        "llm_dtype": "float32",
        "batch_size_prompts": size,
        "n_eval_reconstruction_batches": batches[0],
        "n_eval_sparsity_variance_batches": batches[1],
        "dataset": dataset,
        "context_size": context,
        "compute_kl": with_model,
        "compute_ce_loss": with_model,
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": subject.config.exclude_special,
        "verbose": False,
    }


def sae_cfg(subject: Subject) -> dict[str, Any]:
    """SAEBench's fields of a custom SAE, and under `granary` what our own `sae/config.json` says."""
    sae, hook = subject.sae, subject.plan.hook
    config = BenchConfig(
        model_name=str(subject.facts.get("model", "")),
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        hook_layer=layer_of(hook),
        hook_name=hook,
        context_size=subject.store.context,
        architecture=sae.variant,
        apply_b_dec_to_input=True,
        device=str(subject.device),
        activation_fn_str=sae.variant,
        prepend_bos=bool(subject.store.identity.get("bos", True)),
        training_tokens=int(subject.facts.get("training_tokens") or 0),
    )
    return config.to_dict() | {"granary": subject.facts}
