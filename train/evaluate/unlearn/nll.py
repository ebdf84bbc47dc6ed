"""Protocol `nll`: chosen latents are clamped, and the losses on texts to forget and to retain are compared.

For every threshold τ and number n the n latents that fire most on the forget text, and on less than τ of the retain
text, are set to −m times their own mean activation, or to an absolute −c. Latents are chosen on one half of each
text's documents; losses are of the other half. ΔF and ΔR are the rises of the mean loss per token.

    score = max ΔF / NLL_F over settings with ΔR / NLL_R ≤ 1 %, at least 0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.console import Progress, say
from common.files import file_sha256, fingerprint
from train.config import UnlearnConfig
from train.evaluate.pieces import readable
from train.evaluate.subject import Evaluation
from train.evaluate.unlearn.clamp import Clamp
from train.evaluate.unlearn.kept import Kept
from train.evaluate.unlearn.losses import Patient, Watched, activity, clamped_losses, clean_losses, watch
from train.evaluate.unlearn.passages import Passages
from train.evaluate.unlearn.score import SMALL, area, best, front, score_interval
from train.evaluate.unlearn.selection import Activity, choose, match
from train.evaluate.unlearn.texts import ALSO, FORGET, RETAIN, Text

METRICS = {
    "score": "the largest ΔF / NLL_F of a setting with ΔR / NLL_R ≤ 1 %; at least 0",
    "score_low": "lower end of its 95 % interval over resampled documents",
    "score_high": "upper end of it",
    "area": "the same with 0 to 5 % allowed, its mean over what is allowed",
    "score_random": "the score with other latents of the same densities in the place of the chosen ones",
    "area_random": "their area",
    "score_also": "the score with the text of --also-retain in the place of the retain text",
    "best": "the setting that has the score",
    "delta_forget": "its ΔF, nats a token",
    "delta_retain": "its ΔR",
    "delta_also_retain": "the same on the text of --also-retain",
    "nll_forget": "mean loss of the unchanged model on the forget text, nats a token",
    "nll_retain": "the same on the retain text",
    "nll_also_retain": "the same on the text of --also-retain",
    "tokens_forget": "tokens of the forget text whose loss counts",
    "tokens_retain": "tokens of the retain text whose loss counts",
    "documents_forget": "documents that these are from",
    "documents_retain": "documents that these are from",
}
TOP_TOKENS = 10
OF_SETTING = ("best", "delta_forget", "delta_retain", "delta_also_retain")
OF_SWEEP = ("score", "score_low", "score_high", "area", "score_random", "area_random", "score_also")
SEED = 0  # of the controls


@dataclass(frozen=True)
class Setting:
    """One entry of the sweep.

    Attributes:
        unit: `mean`: the multiplier is in each latent's own mean activation; `absolute`: in raw units.
        kind: `chosen`, or `random` for the controls.
    """

    threshold: float
    n: int
    unit: str
    multiplier: float
    clamp: Clamp
    kind: str = "chosen"

    def told(self) -> str:
        """For people."""
        how = "mean" if self.unit == "mean" else "raw"
        return f"τ {self.threshold:g}, {len(self.clamp.latents)} latents, −{self.multiplier:g} {how}"


def make_settings(config: UnlearnConfig, forget: Activity, retain: Activity) -> list[Setting]:
    """The whole sweep, controls last."""
    both = forget + retain
    density = (forget.density + retain.density) / 2  # each text counts the same, whatever its length
    chosen: list[Setting] = []
    random: list[Setting] = []
    for threshold in config.threshold:
        for n in config.latents:
            picked = choose(forget.density, retain.density, threshold, n)
            for kind, latents, into in (("chosen", picked, chosen), ("random", match(picked, density, SEED), random)):
                into += [
                    Setting(threshold, n, unit, multiplier, Clamp(latents, values), kind)
                    for unit, multiplier, values in amounts(config, latents, both.mean)
                ]
    return chosen + random


def amounts(
    config: UnlearnConfig, latents: tuple[int, ...], mean: Tensor
) -> Iterable[tuple[str, float, tuple[float, ...]]]:
    """(unit, multiplier, value of each latent) for every multiplier of the sweep."""
    for multiplier in config.multiplier:
        yield "mean", multiplier, tuple(multiplier * float(mean[i]) for i in latents)
    for value in config.absolute:
        yield "absolute", value, (float(value),) * len(latents)


def evaluate_nll(folder: Path, patient: Patient, texts: Mapping[str, Text], config: UnlearnConfig) -> Evaluation:
    """The protocol on one learner; what is computed of it is kept in its `eval/unlearn.jsonl`.

    Raises:
        Interrupted: asked to stop.
    """
    say(f"unlearn {folder.name}: looking where its latents fire")
    forget, retain = (activity(patient, texts[name].selection) for name in (FORGET, RETAIN))
    settings = make_settings(config, forget, retain)
    latents = tuple(sorted({latent for setting in settings for latent in setting.clamp.latents}))
    halves = {name: text.evaluation for name, text in texts.items()}
    watched = {name: watch(patient, half, latents) for name, half in halves.items()}
    kept = Kept(folder / "eval" / "unlearn.jsonl", identity_of(folder, patient))
    losses = sweep(patient, settings, halves, watched, kept, f"unlearn {folder.name}")
    found = assemble(settings, losses, {name: int(half.predicting.sum()) for name, half in halves.items()})
    chosen = sorted({i for setting in settings if setting.kind == "chosen" for i in setting.clamp.latents})
    described = describe(patient, chosen, forget, retain, watched[FORGET])
    return Evaluation(found.metrics, found.reasons, {**found.more, "latents": described})


def identity_of(folder: Path, patient: Patient) -> dict[str, Any]:
    """All that a setting's losses on given rows depend on."""
    files = [file_sha256(folder / "sae" / name) for name in ("config.json", "weights.safetensors")]
    model = patient.model.source.identity()
    device, dtype = patient.model.device.type, str(next(patient.model.bridge.parameters()).dtype)
    return {"sae": files, "model": model, "hook": patient.hook, "device": device, "dtype": dtype}


def sweep(
    patient: Patient,
    settings: list[Setting],
    halves: Mapping[str, Passages],
    watched: Mapping[str, Watched],
    kept: Kept,
    label: str,
) -> dict[str, Tensor]:
    """Losses by document, float64 [documents, 1 + settings] for each text, the unchanged model first.

    Equal clamps are run once, and those that `kept` has not at all.
    """
    clean = {name: clean_losses(patient, half) for name, half in halves.items()}
    clamps = {setting.clamp.name: setting.clamp for setting in settings}
    prints = {name: fingerprint([half.tokens.tolist(), half.lengths.tolist()]) for name, half in halves.items()}
    todo = [(name, key) for key in clamps for name in halves if f"{prints[name]} {key}" not in kept.values]
    progress = Progress(label, sum(len(halves[name].tokens) for name, _ in todo))
    rows, before = 0, len(clamps) * len(halves) - len(todo)
    told = f"{len(clamps)} interventions on {len(halves)} texts" + (f", {before} kept from before" if before else "")

    def done(n: int) -> None:
        nonlocal rows
        rows += n
        progress.update(rows, told)

    for name, key in todo:
        losses = clamped_losses(patient, halves[name], clean[name], watched[name], clamps[key], done)
        kept.add(f"{prints[name]} {key}", by_document(halves[name], losses).tolist())
    if todo:
        progress.close(rows, told)
    return {
        name: torch.stack(
            [by_document(half, clean[name])]
            + [torch.tensor(kept.values[f"{prints[name]} {s.clamp.name}"], dtype=torch.float64) for s in settings],
            dim=1,
        )
        for name, half in halves.items()
    }


def by_document(passages: Passages, losses: Tensor) -> Tensor:
    """Sums over the rows of each document, float64 [documents]."""
    sums = torch.zeros(passages.n_documents, dtype=torch.float64)
    return sums.index_add_(0, passages.document, losses)


def assemble(settings: list[Setting], losses: Mapping[str, Tensor], tokens: Mapping[str, int]) -> Evaluation:
    """Metrics, the table of settings, the controls and the Pareto front from losses by document."""
    rows = [table_row(setting, i, losses, tokens) for i, setting in enumerate(settings)]
    chosen, random = ([i for i, s in enumerate(settings) if s.kind == kind] for kind in ("chosen", "random"))
    metrics: dict[str, Any] = dict.fromkeys(METRICS)
    reasons: dict[str, str] = {}
    for name in losses:
        metrics[f"nll_{name}"] = float(losses[name][:, 0].sum()) / tokens[name]
    for name in (FORGET, RETAIN):
        metrics[f"tokens_{name}"], metrics[f"documents_{name}"] = tokens[name], len(losses[name])
    if ALSO not in losses:
        reasons |= dict.fromkeys(("score_also", "delta_also_retain", "nll_also_retain"), "no --also-retain was given")
    if any(rows[i]["n_used"] for i in chosen):
        fill_scores(metrics, reasons, rows, chosen, random)
        fill_interval(metrics, reasons, *(losses[name][:, [0, *(1 + i for i in chosen)]] for name in (FORGET, RETAIN)))
        fill_best(metrics, reasons, settings, rows, chosen)
    else:
        why = "no latent fires on the forget text and on less than τ of the retain text, for any τ"
        reasons |= dict.fromkeys((*OF_SWEEP, *OF_SETTING), why)
    points = front(*([rows[i][f"delta_{name}"] for i in chosen] for name in (FORGET, RETAIN)))
    more = {
        "settings": [rows[i] for i in chosen],
        "controls": [rows[i] for i in random],
        "pareto": [rows[chosen[i]] for i in points],
    }
    return Evaluation(metrics, reasons, more)


def fill_scores(
    metrics: dict[str, Any],
    reasons: dict[str, str],
    rows: list[dict[str, Any]],
    chosen: list[int],
    random: list[int],
) -> None:
    """Score and area of the chosen and of the controls."""

    def rises(which: list[int], name: str) -> Tensor:
        return torch.tensor([rows[i][f"relative_{name}"] for i in which], dtype=torch.float64)

    controls = [i for i in random if rows[i]["n_used"]]
    if not controls:
        why = "no other latent than the chosen ones fires on these texts"
        reasons |= dict.fromkeys(("score_random", "area_random"), why)
    for suffix, which in (("", chosen), ("_random", controls)):
        if not which:
            continue
        metrics[f"score{suffix}"] = best(rises(which, FORGET), rises(which, RETAIN))
        metrics[f"area{suffix}"] = area(rises(which, FORGET), rises(which, RETAIN))
    if f"relative_{ALSO}" in rows[0]:
        metrics["score_also"] = best(rises(chosen, FORGET), rises(chosen, ALSO))


def fill_interval(metrics: dict[str, Any], reasons: dict[str, str], forget: Tensor, retain: Tensor) -> None:
    """The score's interval, or why there is none."""
    interval = score_interval(forget, retain)
    if interval is None:
        why = "an interval needs two documents of each text to judge on. Name longer texts."
        reasons |= dict.fromkeys(("score_low", "score_high"), why)
    else:
        metrics["score_low"], metrics["score_high"] = interval


def fill_best(
    metrics: dict[str, Any],
    reasons: dict[str, str],
    settings: list[Setting],
    rows: list[dict[str, Any]],
    chosen: list[int],
) -> None:
    """The setting that has the score (of equals the first), or why none has."""
    admitted = [i for i in chosen if rows[i][f"relative_{RETAIN}"] <= SMALL]
    first = max(admitted, key=lambda i: rows[i][f"relative_{FORGET}"], default=None)
    if first is None or rows[first][f"relative_{FORGET}"] <= 0:
        reasons |= dict.fromkeys(OF_SETTING, "no setting raises the forget text's loss and spares the retain text's")
        return
    metrics["best"] = settings[first].told()
    metrics |= {name: rows[first][name] for name in OF_SETTING if name in rows[first]}


def table_row(setting: Setting, number: int, losses: Mapping[str, Tensor], tokens: Mapping[str, int]) -> dict[str, Any]:
    """What the result says of one setting."""
    row: dict[str, Any] = {
        "kind": setting.kind,
        "threshold": setting.threshold,
        "n": setting.n,
        "n_used": len(setting.clamp.latents),
        "unit": setting.unit,
        "multiplier": setting.multiplier,
    }
    for name in losses:
        clean, clamped = (float(losses[name][:, column].sum()) for column in (0, 1 + number))
        row[f"delta_{name}"] = (clamped - clean) / tokens[name]
        row[f"relative_{name}"] = clamped / clean - 1
    return row


def describe(
    patient: Patient, latents: list[int], forget: Activity, retain: Activity, watched: Watched
) -> list[dict[str, Any]]:
    """Latents: densities and mean on the halves they were chosen on, and the tokens they are most active on.

    Args:
        watched: these latents on the forget text's other half, by token; a share is one of that.
    """
    found = []
    for latent in latents:
        mass = watched.mass[watched.latents.index(latent)]
        top = torch.topk(mass, min(TOP_TOKENS, int((mass > 0).sum())))
        ids = watched.tokens[top.indices].tolist()
        spelled = readable(patient.model.tokenizer, ids)
        shares = zip(ids, (top.values / mass.sum()).tolist(), strict=True)
        densities = {f"density_{name}": float(on.density[latent]) for name, on in ((FORGET, forget), (RETAIN, retain))}
        mean = float((forget + retain).mean[latent])
        tokens = [[spelled[token], share] for token, share in shares]
        found.append({"index": latent, **densities, "mean": mean, "tokens": tokens})
    return found
