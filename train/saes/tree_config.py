"""Settings of variant `tree`; its formula is in `tree`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from train.saes.base import KeptConfig
from train.saes.forest import LEAF, LEAST
from train.saes.idle import Idle
from train.saes.sparsity import Mode, check_led

Three = tuple[float, float, float]


class TreeConfig(KeptConfig):
    """Settings of `tree`."""

    shape: Literal["halves", "fanout"] = Field(
        "halves", description="Top, mid and leaf 1/4, 1/4, 1/2 of the latents, or 1 : 4 : 16 with four children each."
    )
    orientation: Literal["bottom_up", "top_down"] = Field("bottom_up", description="Which level is encoded first.")
    sparsity: Mode = Field("budgets", description="A share of k per level, one `joint` BatchTopK, or an `l1` penalty.")
    level_weights: Three = Field((0.5, 1.0, 2.0), description="Price of a latent by level, in the order of encoding.")
    l1: float = Field(0.03, ge=0, description="λ at the start, for `l1`; then it is led to L0 = k.")
    nesting: Three = Field((0.1, 0.3, 1.0), description="ω of top, top + mid and all levels, before they sum to 1.")
    kappa: float = Field(0.25, ge=0, description="Start of κ, what a level sees of the other; 0: nothing, ever.")
    no_enc_skip: bool = Field(False, description="Levels after the first see only the aggregate, not x.")
    no_dec_skip: bool = Field(False, description="A parent's decoder row is the normalised Σ v d of its children.")
    gate: Literal["soft", "hard"] = Field("soft", description="`hard`: active only where the aggregate is.")
    sum_init: bool = Field(True, description="Parents' rows start as the sum of their children's, 10 % noise added.")
    l2: float = Field(0.02, ge=0, description="λ_2, the weight of amounts that agree.")
    kl: float = Field(0.005, ge=0, description="λ_KL, the weight of distributions that agree.")
    coverage: float = Field(
        0.0, ge=0, description="λ_c, the weight of parents being silent where their aggregate is; may stand for kl."
    )
    rho: float = Field(0.0, ge=0, description="Weight of the decoder constraint f_p d_p = Σ v_c f_c d_c.")
    swap: float = Field(0.0, ge=0, le=1, description="Chance that Σ v_c f_c d_c stands for f_p d_p in training.")
    repair: bool = Field(True, description="Reset dead leaves to what is left over where their family is active.")

    @model_validator(mode="after")
    def _has_a_tree(self) -> TreeConfig:
        if self.d_sae < LEAST[self.shape]:
            raise ValueError(f"{self.d_sae} latents are no tree of {self.shape}: at least {LEAST[self.shape]}")
        check_led("l1", self.l1, self.sparsity == "l1")
        if self.no_enc_skip and self.kappa == 0:
            raise ValueError("no_enc_skip with kappa = 0: levels after the first would see neither x nor an aggregate")
        if min(self.nesting) < 0 or self.nesting[LEAF] == 0 or min(self.level_weights) <= 0:
            raise ValueError("nesting must not be negative; its last weight and all level_weights are above 0")
        return self

    def idle(self) -> Iterator[Idle]:
        yield Idle(self.sparsity != "l1", f"sparsity = {self.sparsity}", "l1")
        yield Idle(self.sparsity == "l1", "sparsity = l1", "k_anneal")
        yield Idle(self.no_dec_skip, "no_dec_skip", "sum_init")
