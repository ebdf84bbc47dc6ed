"""Suite `probe`: what a few latents tell about a token and its document (evaluation spec §4 and §5.5).

For every target and k the k latents whose means differ most between yes and no, in the training half of the documents,
go into a logistic regression, judged on the other half. Beside it: the same with labels that are random for each kind
of token, or each document (Hewitt & Liang 2019), which tells how much the probe learns by itself, and a probe on x.
`train/evaluate/probes.py` has the probes, `train/evaluate/targets.py` what is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from train.evaluate.bootstrap import bootstrap_intervals
from train.evaluate.probes import KS, MIN_DOCUMENTS, MIN_TOKENS, Probed, probe_target, split_documents
from train.evaluate.sample import Sample, read_sample
from train.evaluate.subject import Evaluation, Subject
from train.evaluate.targets import Family, targets_of

FAMILIES: tuple[Family, Family] = ("fast", "slow")
KINDS = [*[f"k{k}" for k in KS], *[f"k{k}_control" for k in KS], "x"]  # the probes of one target
FIGURES = [*KINDS, *[f"k{k}_selectivity" for k in KS]]


def described(family: Family) -> dict[str, str]:
    """The metrics of a family of targets."""
    found = {f"{family}_targets": f"{family} targets with enough tokens to be probed"}
    for k in KS:
        found[f"{family}_k{k}"] = f"balanced accuracy of probes on {k} latents, mean over {family} targets"
        found[f"{family}_k{k}_control"] = f"the same with random labels: {k} latents"
        found[f"{family}_k{k}_selectivity"] = f"accuracy less that of random labels: {k} latents"
    return found | {f"{family}_x": f"balanced accuracy of probes on all of x, mean over {family} targets"}


PROBE_METRICS = {
    "tokens": "held-out tokens looked at",
    "documents": "held-out documents that they are from",
    **described("fast"),
    **described("slow"),
}


def probe(subject: Subject) -> Evaluation:
    """The suite."""
    try:
        tokenizer = subject.tokenizer()
    except ConfigError as error:
        return Evaluation(dict.fromkeys(PROBE_METRICS), dict.fromkeys(PROBE_METRICS, str(error)))
    sample = read_sample(subject)
    found = targets_of(sample, tokenizer)
    training = split_documents(sample.doc, found.topic)
    results = []
    for target in found.targets:
        subject.refuse_when_stopped()
        results.append(probe_target(sample, target, training))
    return summary(sample, results, found.missing)


def summary(sample: Sample, results: list[Probed], missing: dict[str, str]) -> Evaluation:
    """Means over the targets of each family with intervals over test documents, and the table of targets."""
    metrics: dict[str, Any] = dict.fromkeys(PROBE_METRICS)
    metrics |= {"tokens": int(sample.valid.sum()), "documents": len(np.unique(sample.doc[sample.valid]))}
    reasons: dict[str, str] = {}
    intervals: dict[str, list[float] | None] = {}
    for family in FAMILIES:
        there = [result for result in results if result.target.family == family and result.reason is None]
        metrics[f"{family}_targets"] = len({base(result) for result in there})
        if there:
            sums, mean = sums_of(there), mean_over([base(result) for result in there])
            names = [f"{family}_{figure}" for figure in FIGURES]
            metrics |= dict(zip(names, mean(sums.sum(0)).tolist(), strict=True))
            intervals |= dict(zip(names, as_lists(bootstrap_intervals(sums, mean)), strict=True))
        else:
            needed = f"{MIN_TOKENS} tokens in {MIN_DOCUMENTS} documents"
            reason = f"no {family} target has {needed} of yes and of no in each half of the documents"
            reasons |= {name: reason for name in described(family) if not name.endswith("_targets")}
    return Evaluation(metrics, reasons, {"intervals": intervals, "targets": rows_of(results), "missing": missing})


def base(result: Probed) -> str:
    """The name of a target without its class."""
    return result.target.name.split("/")[0]


def sums_of(results: list[Probed]) -> Tensor:
    """What is counted of every probe: [documents, targets, probes, 4], probes in the order of `KINDS`."""
    rows = [[*result.real.values(), *result.control.values(), result.x] for result in results]
    tables = [np.stack([judged.sums for judged in row if judged is not None], axis=1) for row in rows]
    return torch.from_numpy(np.stack(tables, axis=1))


def accuracies(sums: Tensor) -> Tensor:
    """Balanced accuracies of counts […, probes, 4], and what each k is above its control: […, figures].

    NaN where yes or no is missing.
    """
    right_yes, yes, right_no, no = sums.double().unbind(-1)
    found = (right_yes / yes + right_no / no) / 2
    n = len(KS)
    return torch.cat([found, found[..., :n] - found[..., n : 2 * n]], dim=-1)


def mean_over(names: list[str]) -> Callable[[Tensor], Tensor]:
    """A function from counts [targets, probes, 4] to the means of `FIGURES` over targets.

    Those of one name, the classes of one target, count together as one; classes that a resample lacks do not.
    """
    groups = [torch.tensor([name == wanted for name in names]) for wanted in dict.fromkeys(names)]

    def mean(sums: Tensor) -> Tensor:
        found = accuracies(sums)
        return torch.stack([found[group].nanmean(0) for group in groups]).nanmean(0)

    return mean


def as_lists(intervals: list[tuple[float, float] | None]) -> list[list[float] | None]:
    return [list(interval) if interval else None for interval in intervals]


def rows_of(results: list[Probed]) -> list[dict[str, Any]]:
    """The table of targets as JSON values."""
    there = [result for result in results if result.reason is None]
    if there:
        sums = sums_of(there)
        figures = iter(accuracies(sums.sum(0)).tolist())
        intervals = iter(as_lists(bootstrap_intervals(sums, lambda drawn: accuracies(drawn).flatten())))
    rows: list[dict[str, Any]] = []
    for result in results:
        row: dict[str, Any] = {"target": result.target.name, "family": result.target.family, "share": result.share}
        if result.reason is not None or result.x is None:
            rows.append(row | {"reason": result.reason})
            continue
        kinds = [*result.real.values(), *result.control.values(), result.x]
        row["accuracy"] = dict(zip(FIGURES, next(figures), strict=True))
        row["intervals"] = {name: next(intervals) for name in FIGURES}
        row["auc"] = {name: judged.auc for name, judged in zip(KINDS, kinds, strict=True)}
        row["latents"] = result.real[max(KS)].latents
        rows.append(row)
    return rows
