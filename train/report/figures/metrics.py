"""Figures of evaluation as bars: reconstruction, sparsity, and what the language model keeps."""

from __future__ import annotations

from collections.abc import Sequence

from train.report.figures.draw import bars_height, group_bars, left_out_remark, seeds_remark, worth_a_bar
from train.report.figures.shapes import Row
from train.report.figures.sheet import Sheet, title_of
from train.report.figures.study import Group, Study, figure_of, summary

EXPLAINED = ("Explained variance", "heldout", "explained_variance", "share")
ERROR = ("Mean squared error", "heldout", "mse", "E‖x − x̂‖², raw units")
CROSS_ENTROPIES = {
    "clean": "ce_loss_without_sae", "spliced": "ce_loss_with_sae", "ablated": "ce_loss_with_ablation"
}  # fmt: skip


def reconstruction_metrics(study: Study) -> Sheet:
    """Explained variance, mean squared error and cosine similarity on held-out documents."""
    cosine = ("Cosine similarity", "heldout", "cosine", "mean cosine of x and x̂")
    return bars_sheet(study, "Reconstruction, held-out documents", [EXPLAINED, ERROR, cosine])


def sparsity_metrics(study: Study) -> Sheet:
    """L0 with the one aimed at, and L1, on held-out documents."""
    l0 = ("L0", "heldout", "l0", "latents active per token")
    l1 = ("L1", "heldout", "l1", "sum of latents per token, raw units")
    return bars_sheet(study, "Sparsity, held-out documents", [l0, l1], "Dotted: the L0 aimed at. ")


def model_preservation(study: Study) -> Sheet:
    """KL and cross-entropy scores of the language model with the SAE in it, and the cross-entropies behind them."""
    kl = ("KL divergence score", "core", "kl_div_score", "1: as the clean model, 0: as ablated")
    ce = ("Cross-entropy loss score", "core", "ce_loss_score", "1: as the clean model, 0: as ablated")
    remark = "Clean: the model alone; spliced: with reconstructions; ablated: with zeros. "
    sheet = bars_sheet(study, "Model preservation", [kl, ce], remark, more=1)
    cross_entropies(sheet, study, worth_a_bar(study, [figure_of(suite, metric) for _, suite, metric, _ in (kl, ce)]))
    return sheet


def final_metrics(study: Study) -> Sheet:
    """Explained variance, mean squared error and KL divergence."""
    kl = ("KL divergence, clean to spliced", "core", "kl_div_with_sae", "nats per token")
    return bars_sheet(study, "Final metrics", [EXPLAINED, ERROR, kl])


def bars_sheet(
    study: Study, title: str, panels: list[tuple[str, str, str, str]], remark: str = "", more: int = 0
) -> Sheet:
    """Panels (title, suite, metric, unit) beside each other, `more` of them left to be filled."""
    widths = [4.6, *[3.5] * (len(panels) + more - 1)]
    shown = worth_a_bar(study, [figure_of(suite, metric) for _, suite, metric, _ in panels])
    remark = left_out_remark(study, shown) + remark + seeds_remark(study)
    sheet = Sheet(title, study.subtitle, widths, [bars_height(len(shown))], remark)
    for column, (name, suite, metric, unit) in enumerate(panels):
        read = figure_of(suite, metric)
        axes = sheet.panel(0, column, name)
        mark = aim if metric == "l0" else nowhere
        group_bars(sheet, axes, study, read, unit, suite=suite, name=metric, mark=mark, names=column == 0, shown=shown)
    return sheet


def aim(group: Group) -> float | None:
    """The L0 aimed at."""
    return group.aim


def nowhere(group: Group) -> float | None:
    """Nothing is aimed at."""
    return None


def cross_entropies(sheet: Sheet, study: Study, shown: Sequence[Group]) -> None:
    """The cross-entropy of the model alone, with the SAE, and with nothing, in the last column."""
    axes = sheet.panel(0, 2, "Cross-entropy loss")
    points: dict[str, list[tuple[int, float]]] = {}
    reasons = []
    for group in study.groups:
        for name, metric in CROSS_ENTROPIES.items():
            found = summary(group, figure_of("core", metric), "core", metric)
            n = len(found.each)
            sheet.rows.append(Row(title_of(axes), group.label, x=name, value=found.value, n=n, note=found.reason))
            reasons.append(found.reason)
            if found.value is not None:
                points.setdefault(name, []).append((shown.index(group), found.value))
    why = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
    hues = [study.colours[group.label] for group in shown]
    sheet.marks(axes, points, [""] * len(shown), hues, "nats per token", why)
