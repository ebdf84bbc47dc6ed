"""Settings of variant `compositional`; its formula is in `compositional`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from common.config import Count
from train.saes.base import KeptConfig
from train.saes.idle import Idle
from train.saes.sparsity import Mode


class CompositionalConfig(KeptConfig):
    """Settings of `compositional`."""

    sparsity: Mode = Field("budgets", description="How levels share k: own budgets, one joint BatchTopK, or L1.")
    level_weights: tuple[float, float, float] = Field(
        (0.5, 1.0, 2.0), description="Price of an active latent of the low, mid, high level; budgets are ∝ 1 / price."
    )
    l1: float = Field(0.03, gt=0, description="λ at the start, in l1 mode; a controller leads it to L0 = k.")
    level_floor: float = Field(
        0.0, ge=0, lt=1, description="Least L0 of a level in joint and l1, in budgets: below it a level gets cheaper."
    )
    nesting: tuple[float, float, float] = Field(
        (0.25, 0.5, 1.0),
        description="ω of {high}, {high, mid}, all, before they sum to 1; 0, 0, 1: no nesting.",
    )
    hierarchy: Literal["learned", "fixed_cluster", "fixed_random", "reassign"] = Field(
        "learned", description="Where A comes from: clustered then trained; clustered; random; candidates found anew."
    )
    clustering: Literal["seeds", "partition"] = Field(
        "seeds", description="How parts are found: seeds that share neighbours, or a spectral partition (an ablation)."
    )
    encoder: Literal["both", "comp_only", "no_comp"] = Field(
        "both",
        description="What upper levels see: x and lower codes; `comp_only`: not x; `no_comp`: only x (c = 0).",
    )
    decoder: Literal["composed", "residual", "free"] = Field(
        "composed", description="Upper rows: sums of lower ones, sums plus a penalised residual, or free."
    )
    detach_lower: bool = Field(False, description="No gradient from upper latents into lower codes.")
    pretrain: float = Field(0.1, ge=0, lt=0.5, description="Share of the run before the clustering; 0: random parts.")
    candidates: Count = Field(32, gt=0, description="Lower latents that may be parts of an upper one, the strongest.")
    random_parts: Count = Field(
        10, gt=0, description="Parts in fixed_random: as many as learned ones have in the end (effective number)."
    )
    agreement: float = Field(0.0, ge=0, description="λ_a: upper codes follow their parts' codes and the reverse.")
    agree_on: Literal["codes", "values"] = Field(
        "codes", description="What stands for the parts: their codes, or rectified values before the top-k."
    )
    living_parts: bool = Field(
        False, description="A lower latent that is dead weighs no more than a mere candidate, until it fires again."
    )
    copies: float = Field(
        1.0, ge=0, description="λ_c on the share of an upper row's square that one part makes, beyond copy_limit."
    )
    copy_limit: float = Field(0.75, ge=0, lt=1, description="cos² of an upper row and its nearest part that is free.")
    group: float = Field(0.0, ge=0, description="λ_Ω of the tree-group norm; 0.002 is 5 % of the loss, gain unproven.")
    residual_penalty: float = Field(1.0, ge=0, description="λ_r on ‖r_j‖² in decoder = residual; 0.01 is too weak.")

    @model_validator(mode="after")
    def _has_levels(self) -> CompositionalConfig:
        if min(self.level_weights) <= 0 or min(self.nesting) < 0 or self.nesting[2] <= 0:
            raise ValueError("level_weights and the last of nesting must be above 0, the others of nesting not below")
        if self.d_sae < 8:
            raise ValueError(f"d_sae = {self.d_sae}: three levels need at least 8 latents")
        return self

    def idle(self) -> Iterator[Idle]:
        random, fixed = self.hierarchy == "fixed_random", self.hierarchy in ("fixed_random", "fixed_cluster")
        yield Idle(self.sparsity == "budgets", "sparsity = budgets", "level_floor")
        yield Idle(self.sparsity != "l1", f"sparsity = {self.sparsity}", "l1")
        yield Idle(random, "hierarchy = fixed_random", "clustering", "candidates")
        yield Idle(not random, f"hierarchy = {self.hierarchy}", "random_parts")
        yield Idle(fixed, f"hierarchy = {self.hierarchy}", "living_parts")
        yield Idle(self.copies == 0, "copies = 0", "copy_limit")
        yield Idle(self.encoder == "no_comp", "encoder = no_comp", "detach_lower")
        yield Idle(self.agreement == 0, "agreement = 0", "agree_on")
        yield Idle(self.decoder != "residual", f"decoder = {self.decoder}", "residual_penalty")
