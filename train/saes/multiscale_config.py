"""Settings of variant `multiscale`; its formula is in `multiscale`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from common.config import Count
from train.saes.base import KeptConfig
from train.saes.idle import Idle
from train.saes.sparsity import check_led


class MultiScaleConfig(KeptConfig):
    """Settings of `multiscale`."""

    window: Count = Field(128, gt=1, description="Tokens of a training window; the reach is kernel − 1 dilations.")
    dilations: tuple[Count, ...] = Field(
        (1, 2, 4, 8), description="Tokens between the taps of each group, not falling; one entry: a single scale."
    )
    kernel: Count = Field(3, gt=1, description="Taps of a convolution, the current token's among them.")
    convolution: Literal["dilated", "mixture", "none"] = Field(
        "dilated",
        description="Each group its dilation; or each latent a learned mixture of all; or none: a flat encoder.",
    )
    causal: bool = Field(
        True, description="Off: every other tap looks ahead. An ablation that leaks the future: no cross-entropies."
    )
    token_weights: bool = Field(
        False, description="Learn ω_0, each group's weights of the current token; off: they are 1."
    )
    sparsity: Literal["joint", "budgets", "l1"] = Field(
        "joint", description="One BatchTopK over all groups; k / groups for each; or an L1 penalty led to L0 = k."
    )
    l1: float = Field(0.03, ge=0, description="λ at the start, for sparsity = l1.")
    lambda_scale: float = Field(0.3, ge=0, description="Weight λ_s of the scale targets, which give ω its use; 0: off.")
    lambda_sep: float = Field(0.1, ge=0, description="Weight λ_sep of the separation of decoder rows; 0: off.")
    lambda_decorrelation: float = Field(
        0.0, ge=0, description="Weight of the mean squared correlation between the groups' energies Σ f²; 0: off."
    )

    @model_validator(mode="after")
    def _scales(self) -> MultiScaleConfig:
        check_led("l1", self.l1, self.sparsity == "l1")
        if not self.dilations or min(self.dilations) < 1 or list(self.dilations) != sorted(self.dilations):
            raise ValueError(f"dilations = {list(self.dilations)}: at least one, each at least 1, smallest first")
        if len(self.dilations) > self.d_sae:
            raise ValueError(f"{len(self.dilations)} dilations need as many latents, d_sae = {self.d_sae}")
        if not self.causal and self.kernel == 2:
            raise ValueError("causal = false needs a kernel of at least 3: the first tap beside the token looks back")
        if self.token_weights and self.convolution == "none":
            raise ValueError("token_weights are a convolution's, which convolution = none leaves out: set one of them")
        return self

    def idle(self) -> Iterator[Idle]:
        yield Idle(self.sparsity != "l1", f"sparsity = {self.sparsity}", "l1")
        yield Idle(self.sparsity == "l1", "sparsity = l1", "k_anneal")
        yield Idle(len(self.dilations) == 1, "a single dilation", "lambda_scale")
