"""Suite `latents`: what each latent responds to, for the page and for a judge. No number here is a verdict.

Two passes over the held-out tokens: totals of every latent; then, of a sample of those that fire, histograms and the
contexts where they are strongest. `eval/latents.json` has one line for each latent of the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError, DataError
from train.evaluate.directions import effects, neighbours
from train.evaluate.pieces import readable
from train.evaluate.sequences import encoded_sequences
from train.evaluate.subject import Evaluation, Subject
from train.evaluate.top_contexts import AFTER, BEFORE, Context, TopContexts

N_CONTEXTS = 10
N_BINS = 24
DIGITS = 4  # of activations, cosines and logits: the file is read by people and pages

LATENTS_METRICS = {
    "tokens": "held-out tokens looked at",
    "alive": "latents that fire on them",
    "dead": "latents that never do",
    "listed": "latents described in the file: all that are alive, or a sample",
    "median_density": "median over the alive of the share of tokens a latent fires on",
    "contexts": "mean number of top contexts of a listed latent; fewer than 10 where fewer documents make it fire",
    "nearest_cosine": "median over the listed of the cosine to the nearest decoder row of another alive latent",
}


@dataclass(frozen=True)
class Totals:
    """Of every latent over the held-out tokens, [d_sae] each, on the host.

    Attributes:
        count: tokens it fires on.
        total: sum of its activations.
        smallest, largest: its least and greatest positive activation; infinite and 0 where it never fires.
    """

    tokens: int
    count: Tensor
    total: Tensor
    smallest: Tensor
    largest: Tensor


def latents(subject: Subject) -> Evaluation:
    """The suite.

    Raises:
        DataError: no held-out token.
    """
    totals = totals_of(subject)
    alive = totals.count > 0
    groups = subject.sae.groups()
    chosen = sample(alive, groups, subject.config.latents)
    histograms, top = look_closer(subject, chosen, totals)
    near = neighbours(subject.sae.W_dec, chosen, alive)
    promoted, suppressed, reasons = logit_effects(subject, chosen)
    contexts = [top.of(number) for number in range(len(chosen))]
    texts, more_reasons = token_texts(subject, contexts)
    listed = [
        {
            "index": index,
            "group": next((name for name, place in groups.items() if place.start <= index < place.stop), None),
            "density": rounded(float(totals.count[index]) / totals.tokens, 6),
            "mean": rounded(float(totals.total[index] / totals.count[index])),
            "max": rounded(float(totals.largest[index])),
            "histogram": histograms[number],
            "neighbours": [[other, rounded(cosine)] for other, cosine in near[number]],
            "promoted": promoted and promoted[number],
            "suppressed": suppressed and suppressed[number],
            "contexts": [as_json(context, texts) for context in contexts[number]],
        }
        for number, index in enumerate(chosen)
    ]
    metrics, none = figures(totals, near, contexts)
    more = {
        "tokens": totals.tokens,
        "variant": subject.facts["variant"],
        "model": subject.facts["model"],
        "hook": subject.facts["hook"],
        "context": {"before": BEFORE, "after": AFTER},
        "latents": listed,
    }
    return Evaluation(metrics, none | reasons | more_reasons, more)


def figures(
    totals: Totals, near: Sequence[Sequence[tuple[int, float]]], contexts: Sequence[Sequence[Context]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The metrics, and why some of them are None."""
    firing = totals.count[totals.count > 0].double() / totals.tokens
    cosines = [found[0][1] for found in near if found]
    reasons: dict[str, str] = {}
    if not len(firing):
        reasons |= dict.fromkeys(("median_density", "contexts"), "no latent fires on the held-out tokens")
    if not cosines:
        reasons["nearest_cosine"] = "fewer than two latents fire on the held-out tokens"
    metrics = {
        "tokens": totals.tokens,
        "alive": len(firing),
        "dead": len(totals.count) - len(firing),
        "listed": len(contexts),
        "median_density": float(np.median(firing.numpy())) if len(firing) else None,
        "contexts": float(np.mean([len(found) for found in contexts])) if contexts else None,
        "nearest_cosine": float(np.median(cosines)) if cosines else None,
    }
    return metrics, reasons


@torch.no_grad()
def totals_of(subject: Subject) -> Totals:
    """The first pass.

    Raises:
        DataError: no held-out token.
    """
    d_sae, device = subject.sae.d_sae, subject.device
    tokens = 0
    count = torch.zeros(d_sae, dtype=torch.int64, device=device)
    total = torch.zeros(d_sae, dtype=torch.float64, device=device)
    smallest, largest = torch.full((d_sae,), torch.inf, device=device), torch.zeros(d_sae, device=device)
    for sequences in encoded_sequences(subject):
        rows = sequences.latents[sequences.valid].float()
        if not len(rows):
            continue
        fires = rows > 0
        tokens += len(rows)
        count += fires.sum(0)
        total += rows.clamp_min(0).sum(0, dtype=torch.float64)
        largest = torch.maximum(largest, rows.amax(0))
        smallest = torch.minimum(smallest, rows.masked_fill(~fires, torch.inf).amin(0))
    if not tokens:
        raise DataError("there is no held-out token to evaluate on. Harvest more, or raise --held-out.")
    return Totals(tokens, count.cpu(), total.cpu(), smallest.cpu(), largest.cpu())


def sample(alive: Tensor, groups: dict[str, slice], most: int) -> list[int]:
    """Up to `most` of the latents that are alive, always the same; of each group its share, but at least one."""
    places = list(groups.values()) or [slice(0, len(alive))]
    members = [place.start + np.flatnonzero(alive[place].numpy()) for place in places]
    generator = np.random.default_rng(0)
    chosen = [
        generator.permutation(group)[:quota]
        for group, quota in zip(members, shares([len(group) for group in members], most), strict=True)
    ]
    return sorted(int(index) for group in chosen for index in group)


def shares(sizes: Sequence[int], most: int) -> list[int]:
    """`most` places among groups of these sizes, in proportion; no group is left out while there are places enough."""
    if sum(sizes) <= most:
        return list(sizes)
    filled = [number for number, size in enumerate(sizes) if size]
    quotas = [0] * len(sizes)
    for place in range(most):  # each goes to the group that has the least of its share; at first to those with none
        behind = max(filled, key=lambda n: (quotas[n] == 0, sizes[n] * (place + 1) / sum(sizes) - quotas[n]))
        quotas[behind] += 1
    return quotas


@torch.no_grad()
def look_closer(subject: Subject, chosen: list[int], totals: Totals) -> tuple[list[dict[str, Any]], TopContexts]:
    """The second pass: histograms of the chosen latents, and where they are strongest."""
    device = subject.device
    places = torch.tensor(chosen, dtype=torch.int64, device=device)
    lowest, highest = totals.smallest[chosen].to(device).log(), totals.largest[chosen].to(device).log()
    counts = torch.zeros(len(chosen) * N_BINS, dtype=torch.int64, device=device)
    top = TopContexts(N_CONTEXTS, len(chosen), device)
    for sequences in encoded_sequences(subject):
        if not chosen:
            break
        acts = sequences.latents[..., places].float()
        top.add(acts, sequences.valid, sequences.doc, sequences.token)
        rows = acts[sequences.valid]
        row, latent = torch.nonzero(rows > 0, as_tuple=True)
        span = (highest - lowest)[latent].clamp_min(1e-12)  # 0 where all activations are one: they are in the last bin
        where = (
            torch.where(highest > lowest, 0, N_BINS)[latent]
            + (rows[row, latent].log() - lowest[latent]) / span * N_BINS
        )
        bins = where.long().clamp(0, N_BINS - 1)
        counts += torch.bincount(latent * N_BINS + bins, minlength=len(counts))
    tables = counts.view(-1, N_BINS).tolist()
    return [
        {"edges": edges(float(low), float(high)), "counts": table}
        for low, high, table in zip(lowest.exp(), highest.exp(), tables, strict=True)
    ], top


def edges(low: float, high: float) -> list[float]:
    """Borders of the bins, evenly in log; where all activations are one it is the upper end of the last."""
    start = low if low < high else high / 2
    return [rounded(value, 5) for value in np.geomspace(start, high, N_BINS + 1).tolist()]


def logit_effects(subject: Subject, chosen: list[int]) -> tuple[Any, Any, dict[str, str]]:
    """Tokens that each decoder row promotes and suppresses, [[text, logit], …] per latent; or None twice and why."""
    try:
        model = subject.language_model()
        found = effects(subject.sae.W_dec, chosen, model.unembedding(), subject.facts["hook"])
    except ConfigError as error:
        return None, None, {"promoted": str(error)}
    ids = sorted({token for pair in found for side in pair for token, _ in side})
    texts = readable(model.tokenizer, ids)
    named = [[[[texts[token], rounded(logit)] for token, logit in side] for side in pair] for pair in found]
    return [pair[0] for pair in named], [pair[1] for pair in named], {}


def token_texts(subject: Subject, contexts: Sequence[Sequence[Context]]) -> tuple[dict[int, str], dict[str, str]]:
    """The text of every token in the contexts; its id in brackets, and why, where there is no tokenizer."""
    ids = sorted({token for found in contexts for context in found for token in context.tokens})
    try:
        return readable(subject.tokenizer(), ids), {}
    except ConfigError as error:
        return {token: f"[{token}]" for token in ids}, {"text": str(error)}


def as_json(context: Context, texts: dict[int, str]) -> dict[str, Any]:
    return {
        "document": context.document,
        "activation": rounded(context.activation),
        "peak": context.peak,
        "tokens": [texts[token] for token in context.tokens],
        "values": [rounded(value) for value in context.values],
    }


def rounded(value: float, digits: int = DIGITS) -> float:
    """To so many significant digits; 0 as a whole number, since most activations are."""
    return float(f"{value:.{digits}g}") if value else 0
