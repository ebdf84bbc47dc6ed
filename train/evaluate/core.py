"""Suite `core`: the core evaluation of SAEBench, and sounder definitions beside those of its that are not.

Reconstruction batches first, through the language model; the sparsity batches go on where they stopped. Activations
are the model's own in float32, the store's where the model is not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from common.console import Progress, say
from common.errors import ConfigError, DataError
from common.models import LanguageModel
from train.evaluate.core_sums import Tally, shares, weights_by_latent
from train.evaluate.core_text import BATCHES, Contexts, Text, as_arrays, stored_activations, text_of
from train.evaluate.downstream import Downstream
from train.evaluate.saebench import core_config, saebench_layout
from train.evaluate.subject import Evaluation, Subject

SEPARATOR_NORM = 10.0  # times the median norm: where an SAE that is told no documents takes one to begin (spec §2)

DOWNSTREAM = {
    "ce_loss_score": "(CE_ablation − CE_sae) / (CE_ablation − CE_clean)",
    "ce_loss_without_sae": "cross-entropy of the next token, nats: the model as it is",
    "ce_loss_with_sae": "the same with x̂ in place of x",
    "ce_loss_with_ablation": "the same with 0 in place of x, everywhere",
    "kl_div_score": "(KL_ablation − KL_sae) / KL_ablation",
    "kl_div_with_sae": "KL(clean ‖ with x̂), nats",
    "kl_div_with_ablation": "KL(clean ‖ with 0), nats",
    "total_tokens_eval_reconstruction": "tokens of the reconstruction batches, special ones too",
    "tokens_reconstruction": "those that count",
}
CORE_METRICS = DOWNSTREAM | {
    "explained_variance": "1 − E‖e‖² / (E‖x‖² − ‖E x‖²), sums over all tokens in float64",
    "explained_variance_legacy": "mean of 1 − ‖e‖² / ‖x − μ‖², μ the mean of the token's batch",
    "explained_variance_saebench_v06": "SAEBench 0.4 to 0.6: 1 − E‖e‖² / (S − (S/d)²), S = E‖x‖²",
    "mse": "E‖e‖²",
    "mse_saebench": "mean of ‖e‖² over the number of tokens in its batch",
    "nmse": "E‖e‖² / E‖x‖²",
    "cossim": "mean of x·x̂ / (‖x‖‖x̂‖)",
    "l2_norm_in": "mean of ‖x‖",
    "l2_norm_out": "mean of ‖x̂‖",
    "l2_ratio": "mean of ‖x̂‖ / ‖x‖ (over 1 where ‖x‖ < 1e-4)",
    "relative_reconstruction_bias": "mean over batches of E‖x̂‖² / E x·x̂",
    "l0": "mean number of latents that are not 0",
    "l1": "mean sum of latents",
    "frac_alive": "share of latents active at least once",
    "freq_over_1_percent": "share of latents active on more than 1 % of the tokens",
    "freq_over_10_percent": "the same, 10 %",
    "normalized_freq_over_1_percent": "their share of all activity",
    "normalized_freq_over_10_percent": "the same, 10 %",
    "average_max_encoder_cosine_sim": "mean over latents of the largest cosine with another one's encoder column",
    "average_max_decoder_cosine_sim": "the same of decoder rows",
    "total_tokens_eval_sparsity_variance": "tokens of the sparsity batches, special ones too",
    "tokens_sparsity_variance": "those that count",
    "separators": "places inside the sparsity batches' sequences where a document begins",
}
NOT_FINITE = {
    "ce_loss_score": "zero ablation leaves the loss as it is",
    "kl_div_score": "zero ablation changes no prediction",
    "cossim": "an activation or a reconstruction of length 0 has no cosine",
    "explained_variance_legacy": "a token lies on the mean of its batch",
    "explained_variance_saebench_v06": "this formula's variance is 0",
    "relative_reconstruction_bias": "the reconstructions of a batch are at right angles to the activations, or 0",
    "nmse": "all activations are 0",
}


def core(subject: Subject) -> Evaluation:
    """The suite.

    Raises:
        DataError: too few tokens.
        ConfigError: a corpus that cannot be had, or the language model when a corpus is given.
    """
    model, missing = at_hand(subject)
    text = text_of(subject, model)
    progress = Progress(f"core {subject.folder.name}", text.n_sparsity + (text.n_reconstruction if model else 0))
    measured: dict[str, Any] = dict.fromkeys(CORE_METRICS)
    if model is not None:
        measured |= downstream(subject, model, text, progress)
    tally, separators = reconstruction(subject, model, text, progress)
    by_latent = tally.by_latent() | weights_by_latent(subject.sae)
    measured |= tally.figures() | shares(by_latent)
    measured |= {
        "total_tokens_eval_sparsity_variance": text.sparsity.tokens.numel(),
        "tokens_sparsity_variance": tally.tokens,
        "separators": separators["true"],
    }
    more = saebench_layout(subject, measured, by_latent, config_of(subject, text, model)) | facts(subject, text, model)
    more |= {"separators_by_norm": {"found": separators["by_norm"], "right": separators["right"]}}
    reasons = reasons_of(measured, missing)
    metrics = {name: None if name in reasons else measured[name] for name in CORE_METRICS}
    return Evaluation(metrics, reasons, more, as_arrays(text))


def at_hand(subject: Subject) -> tuple[LanguageModel | None, str]:
    """The language model, or why there is none, or none that may be told x̂.

    Raises:
        ConfigError: there is none, and a corpus cannot be read without one.
    """
    try:
        return subject.spliced_model(), ""
    except ConfigError as error:
        if subject.config.corpus is not None:
            raise
        return None, str(error)


def downstream(subject: Subject, model: LanguageModel, text: Text, progress: Progress) -> dict[str, Any]:
    """Cross-entropy and KL divergence over the reconstruction batches."""
    if text.n_reconstruction < BATCHES[0] and subject.config.batches is None:
        say(
            f"suite core: the text is short: {text.n_reconstruction} instead of {BATCHES[0]} reconstruction batches, "
            f"of {text.size} sequences"
        )
    found = Downstream(
        model, subject.plan.hook, lambda c, x: c.coded(subject.sae, x)[1], subject.config.exclude_special
    )
    for number, batch in enumerate(text.reconstruction.pieces(text.size)):
        subject.refuse_when_stopped()
        found.add(batch.to(subject.device))
        progress.update(number + 1, f"{found.tokens:,} tokens through the model")
    totals = {"total_tokens_eval_reconstruction": text.reconstruction.tokens.numel()}
    return found.figures() | totals | {"tokens_reconstruction": found.tokens}


@torch.inference_mode()
def reconstruction(
    subject: Subject, model: LanguageModel | None, text: Text, progress: Progress
) -> tuple[Tally, dict[str, int]]:
    """Sums over the sparsity batches; how many separators there are, and how many norms alone would show.

    Raises:
        DataError: no token to count.
    """
    tally, separators = Tally(subject.sae.d_sae), dict.fromkeys(("true", "by_norm", "right"), 0)
    done = text.n_reconstruction if model else 0
    for batch, x in activations(subject, model, text):
        subject.refuse_when_stopped()
        tally.add(x, *batch.coded(subject.sae, x), batch.counted)
        for name, n in count_separators(x, batch, subject.facts.get("median_norm")).items():
            separators[name] += n
        done += 1
        progress.update(done, f"{tally.tokens:,} tokens reconstructed")
    if not tally.tokens:
        raise DataError("suite core: the text holds nothing but special tokens.")
    return tally, separators


def activations(subject: Subject, model: LanguageModel | None, text: Text) -> Iterator[tuple[Contexts, Tensor]]:
    """The sparsity batches with their activations [sequences, context, d] in float32."""
    hook = subject.plan.hook
    batches = (batch.to(subject.device) for batch in text.sparsity.pieces(text.size))
    if model is None:
        yield from zip(batches, stored_activations(subject, text), strict=True)
        return
    for batch in batches:
        yield batch, model.capture(batch.tokens, [hook])[hook].flatten(2).float()


def count_separators(x: Tensor, batch: Contexts, median: float | None) -> dict[str, int]:
    """Where documents begin inside the sequences: in truth, by an outstanding (or no) norm alone, by both.

    `median` norm of the training activations; None: the batch's own.
    """
    norms = x.norm(dim=-1)
    shown = (norms > SEPARATOR_NORM * (median or float(norms.median()))) | (norms == 0)
    shown[:, 0] = False
    right = shown & batch.separators
    return {"true": int(batch.separators.sum()), "by_norm": int(shown.sum()), "right": int(right.sum())}


def reasons_of(measured: Mapping[str, Any], missing: str) -> dict[str, str]:
    """Why each figure that is not there, or is no number, is null."""
    reasons = dict.fromkeys((name for name in DOWNSTREAM if measured[name] is None), missing)
    for name, value in measured.items():
        if isinstance(value, float) and not math.isfinite(value):
            reasons[name] = NOT_FINITE.get(name, "not a finite number on these tokens")
    return reasons


def config_of(subject: Subject, text: Text, model: LanguageModel | None) -> dict[str, Any]:
    dataset = subject.config.corpus or f"held-out documents of {subject.store.path.name}"
    batches = (text.n_reconstruction, text.n_sparsity)
    return core_config(subject, dataset, text.contexts.tokens.shape[1], batches, text.size, model is not None)


def facts(subject: Subject, text: Text, model: LanguageModel | None) -> dict[str, Any]:
    """What the figures were taken on."""
    identity, hook = subject.store.identity, subject.plan.hook
    asked = subject.config.core_batches() or BATCHES
    return {
        "text": text.source
        | {
            "context": text.contexts.tokens.shape[1],
            "batches_asked": list(asked),
            "batches": [text.n_reconstruction, text.n_sparsity],
            "sequences_per_batch": text.size,
        },
        "activations": {
            "from": "the store" if model is None else "the model",
            "dtype": subject.store.hooks[hook]["dtype"] if model is None else "float32",
            "hook": hook,
            **{name: identity.get(name) for name in ("model", "model_dtype", "tokenizer")},
        },
    }
