"""How training went: losses, sparsity and temporal consistency over the steps."""

from __future__ import annotations

from train.report.figures.draw import (
    NO_LINES,
    curves_height,
    keys_of,
    learners_key,
    level_dashes,
    range_remark,
    step_curve,
    step_curves,
    value_of,
)
from train.report.figures.sheet import Axes, Sheet
from train.report.figures.study import Group, Study

LOSS = "loss, scaled units"  # of unit mean squared input norm
FEW = 3  # learners with lines for their levels; more would be a thicket


def training_curves(study: Study) -> Sheet:
    """Reconstruction loss, sparsity loss with its levels, and total loss against step."""
    sheet = curves_sheet(study, "Training curves")
    reconstruction(sheet, sheet.panel(0, 0, "Reconstruction loss"), study)
    levels = sparsity_loss(sheet, sheet.panel(0, 1, "Sparsity loss"), study)
    axes = sheet.panel(0, 2, "Total loss")
    sheet.curves(axes, step_curves(sheet, axes, study, "loss"), "step", LOSS, NO_LINES)
    learners_key(sheet, study, levels)
    return sheet


def training_metrics(study: Study) -> Sheet:
    """Reconstruction loss, L0 and contrastive loss against step."""
    sheet = curves_sheet(study, "Training metrics")
    reconstruction(sheet, sheet.panel(0, 0, "Reconstruction loss"), study)
    axes = sheet.panel(0, 1, "Sparsity: L0")
    sheet.curves(axes, step_curves(sheet, axes, study, "l0"), "step", "latents active per token", NO_LINES)
    axes = sheet.panel(0, 2, "Temporal consistency: contrastive loss")
    curves = step_curves(sheet, axes, study, "loss_contrastive")
    why = "No learner here has logged a contrastive loss; variant contrastive does."
    sheet.curves(axes, curves, "step", f"weighted {LOSS}", why)
    learners_key(sheet, study)
    return sheet


def curves_sheet(study: Study, title: str) -> Sheet:
    """Three panels of curves beside each other."""
    return Sheet(title, study.subtitle, [3.5] * 3, [curves_height(study)], range_remark(study))


def reconstruction(sheet: Sheet, axes: Axes, study: Study) -> None:
    """⟨‖x − x̂‖²⟩, with the weights that a variant gives its parts."""
    curves = step_curves(sheet, axes, study, *keys_of(study.groups, "loss_reconstruction"))
    sheet.curves(axes, curves, "step", "⟨‖x − x̂‖²⟩, scaled units", NO_LINES)


def sparsity_loss(sheet: Sheet, axes: Axes, study: Study) -> list[str]:
    """The penalty, and thin lines for its levels where few learners have any; the levels that were drawn."""
    curves = step_curves(sheet, axes, study, "loss_sparsity")
    levelled = [group for group in study.groups if keys_of([group], "sparsity_")]
    levels = [key.removeprefix("sparsity_") for key in keys_of(levelled, "sparsity_")]
    for group in levelled:
        for level, price in prices(group).items():
            read, dash = value_of(f"sparsity_{level}"), level_dashes(levels)[level]
            curve = step_curve(sheet, axes, study, group, read, series=f"{level}{price}", dash=dash, thin=True)
            curves += [curve] if len(levelled) <= FEW else []
    why = "No sparsity loss was logged: variants that keep k latents do not pay for them."
    sheet.curves(axes, curves, "step", f"weighted {LOSS}", why if keys_of(study.groups, "loss") else NO_LINES)
    return levels if len(levelled) <= FEW else []


def prices(group: Group) -> dict[str, str]:
    """The levels of a group's penalty, each with its price, ` (0.5×)`, where the variant's settings have them."""
    levels = [key.removeprefix("sparsity_") for key in keys_of([group], "sparsity_")]
    weights = group.records[0].options.get("level_weights") or []
    known = len(weights) == len(levels)
    return {level: f" ({weights[place]:g}×)" if known else "" for place, level in enumerate(levels)}
