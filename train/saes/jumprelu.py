"""JumpReLU: every latent has a learned threshold below which it is 0 (Rajamanoharan et al. 2407.14435).

    u = x W_enc + b_enc      f = u·1[u > θ], θ > 0 per latent      x̂ = f W_dec + b_dec
    L = ⟨‖x − x̂‖²⟩ + penalty:
        l0       λ·c(t)·⟨Σ 1[u > θ]⟩                          Gemma Scope
        target   λ·c(t)·(L0 / L0* − 1)², L0 = ⟨Σ 1[u > θ]⟩    needs no controller
        tanh     λ·c(t)·⟨Σ tanh(4 √d f_i)⟩ + 3e-6·⟨Σ_dead ReLU(θ − u)⟩      Anthropic, January 2025

The jump has no gradient for θ; it is estimated with a rectangle kernel K of width ε (1 on |z| ≤ ½):
    ∂f/∂θ = −(θ/ε) K((u − θ)/ε)      ∂1[u > θ]/∂θ = −(1/ε) K((u − θ)/ε)      u gets a gradient only where u > θ
Only pairs of token and latent inside the kernel move θ: `kernel_share` is their share, and below 1e-5 θ stands still.
ε and the start of θ fall with the run's length as the learning rate does: 1e-2·√(500 / steps), within [1e-3, 1e-2].

θ is a parameter, clamped above 0 after each step. b_dec is not subtracted from x (Gemma Scope); b_enc starts at
−b_dec W_enc, so that the start is that of the other variants; W_enc at W_decᵀ times 2d/d_sae where that is below 1.
Adam's β1 is .9, not 0 (measured: docs/log.md). With `target_l0` a controller moves λ (l0, tanh), and at the end all θ
are multiplied by one number so that L0 is the target on training tokens (`sparsity`).

What public implementations do: SAELens trains log θ (start and ε 1e-3, later 0.01 and 0.05); dictionary_learning θ
itself, unclamped, with the penalty `target` (λ = 1) and ε = 1e-3, its L0 counted from f. The paper trains log θ;
Anthropic's θ also moves u (all parameters get the kernel's gradient), and decoder rows are free there.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from train.collective import all_sum
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, Output, SAEConfig
from train.saes.idle import Idle
from train.saes.kept import Kept, at, product, taken
from train.saes.parts import count_silence_, masked, reconstruction_loss, relu_gain, threshold_for
from train.saes.penalised import few_above
from train.saes.places import Places
from train.saes.sparsity import PENALTY_WARMUP, L0Controller, check_led, check_target
from train.schedule import Clock, ramp

LEAST_THETA = 1e-6
TANH_SLOPE = 4.0
SILENT_WEIGHT = 3e-6


class JumpReLUConfig(SAEConfig):
    """Settings of `jumprelu`."""

    penalty: Literal["l0", "target", "tanh"] = Field("l0", description="What is penalised: see the formula.")
    l0: float = Field(0.003, ge=0, description="λ per active latent (l0, tanh), at unit mean squared input norm.")
    target_l0: float | None = Field(None, gt=0, description="L0 wanted; default: as λ gives it. `target` needs it.")
    target_weight: float = Field(1.0, ge=0, description="λ of the penalty `target`; dictionary_learning's value.")
    bandwidth: float | None = Field(
        None, gt=0, description="ε, scaled units; default: 1e-2 · √(500/steps), in [1e-3, 1e-2], as learning rates go."
    )
    theta: float | None = Field(None, gt=0, description="θ at the start, scaled units; default: the default of ε.")

    @model_validator(mode="after")
    def _target(self) -> JumpReLUConfig:
        if self.penalty == "target" and self.target_l0 is None:
            raise ValueError("penalty = 'target' needs target_l0 (or --k)")
        check_target(self.target_l0, self.d_sae)
        check_led("l0", self.l0, self.target_l0 is not None and self.penalty != "target")
        return self

    def idle(self) -> Iterator[Idle]:
        yield Idle(self.penalty == "target", "penalty = target", "l0")
        yield Idle(self.penalty != "target", f"penalty = {self.penalty}", "target_weight")


def default_bandwidth(n_steps: int) -> float:
    """ε and the start of θ for a run of this length."""
    return min(max(1e-2 * math.sqrt(500 / n_steps), 1e-3), 1e-2)


def near(u: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """K((u − θ)/ε) as a mask."""
    return (u - theta).abs() <= bandwidth / 2


def jump(u: Float[Tensor, "*N L"], theta: Float[Tensor, " L"], bandwidth: float) -> Float[Tensor, "*N L"]:
    """f, with the kernel's gradient."""
    latents: Tensor = Jump.apply(u, theta, bandwidth)  # type: ignore[no-untyped-call]
    return latents


def above(u: Float[Tensor, "*N L"], theta: Float[Tensor, " L"], bandwidth: float) -> Float[Tensor, "*N L"]:
    """1[u > θ], with the kernel's gradient."""
    active: Tensor = Step.apply(u, theta, bandwidth)  # type: ignore[no-untyped-call]
    return active


def like(inside: Tensor, theta: Tensor) -> Tensor:
    """What moves θ, summed over tokens where θ is one for all of them."""
    return inside if inside.shape == theta.shape else inside.flatten(0, -2).sum(0)


class Jump(torch.autograd.Function):
    """u·1[u > θ], u [..., L], θ [L] or of each u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(u, theta)
        ctx.bandwidth = bandwidth
        return u * (u > theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (u, theta), (grad,) = ctx.saved_tensors, grads
        inside = like(grad * near(u, theta, ctx.bandwidth), theta)
        return grad * (u > theta), -theta / ctx.bandwidth * inside, None


class Step(torch.autograd.Function):
    """1[u > θ], u [..., L], θ [L] or of each u; no gradient for u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(u, theta)
        ctx.bandwidth = bandwidth
        return (u > theta).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (u, theta), (grad,) = ctx.saved_tensors, grads
        return None, -like(grad * near(u, theta, ctx.bandwidth), theta) / ctx.bandwidth, None


@final
class JumpReLU(SAE):
    """See the module's formula.

    Attributes:
        theta: θ [d_sae], in scaled units until folded.
    """

    variant = "jumprelu"
    can_split = True
    Config = JumpReLUConfig
    lr_scale = 0.4  # 1 leaves a tenth of the latents dead and explains less (docs/log.md)
    config: JumpReLUConfig

    def __init__(self, config: JumpReLUConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        with torch.no_grad():
            self.W_enc.mul_(relu_gain(d_in, config.d_sae))
        self.theta = nn.Parameter(torch.full((config.d_sae,), config.theta or default_bandwidth(1)))
        self.controller = L0Controller(config.l0, None if config.penalty == "target" else config.target_l0)

    @torch.no_grad()
    def start(self, scale: float, b_dec: Tensor) -> None:
        super().start(scale, b_dec)
        self.b_enc.copy_(-self.b_dec @ self.W_enc)

    def landmarks(self, n_steps: int) -> tuple[int, ...]:
        return (0,) if self.config.theta is None else ()

    @torch.no_grad()
    def revise(self, batches: Batches, clock: Clock) -> dict[str, Tensor]:
        """θ starts at a value that depends on the run's length, which is known only now."""
        self.theta.fill_(default_bandwidth(clock.n_steps))
        return {}

    def host_facts(self, clock: Clock) -> tuple[Hashable, ...] | None:
        return None if self.sparse else self.controller.host_facts(clock)  # sparse steps count codes, and wait

    def pre_activations(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        return (x @ self.W_enc).float() + self.b_enc

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        u = self.pre_activations(batch.x)
        return u * (u > self.theta)

    def as_affine(self) -> AffineForm:
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return AffineForm(*weights, "jumprelu", centred=False, threshold=self.theta).raw(self.scale)

    def near_the_jump(self, batch: Batch, bandwidth: float) -> tuple[Tensor, Tensor, Places | None]:
        """u and θ of a step: [batch, window, latents] and [latents], or both [kept] at places that may have a gradient.

        Those are the places above θ − ε, if they are few: the kernel's edge, θ − ε/2, and room for rounding. Penalty
        `tanh` pulls silent latents up from anywhere, and so needs all.
        """
        u = self.pre_activations(batch.x)
        if not self.sparse or self.config.penalty == "tanh":
            return u, self.theta, None
        places = few_above(u, self.theta - bandwidth, batch.valid, batch.n_valid)
        if places is None:
            return u, self.theta, None
        x = batch.x.flatten(0, 1)
        kept = taken(u.detach().flatten(0, 1), x, self.W_enc, self.b_enc, None, [places])
        return kept, at(self.theta, places), places

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        bandwidth = self.config.bandwidth or default_bandwidth(clock.n_steps)
        u, theta, places = self.near_the_jump(batch, bandwidth)

        def valid(values: Tensor) -> Tensor:
            return values if places is not None else masked(values, batch.valid, batch.n_valid)

        values = valid(jump(u, theta, bandwidth))
        latents = values if places is None else Kept(values, places, (*batch.valid.shape, self.d_sae))
        reconstruction = product(latents, self.W_dec) + self.b_dec
        parts = {"reconstruction": reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid)}
        if self.config.penalty == "tanh":
            parts |= self.pull(u, values, batch, clock)
        else:
            l0 = all_sum(valid(above(u, theta, bandwidth)).sum()) / batch.n_valid
            parts["sparsity"] = self.price(l0, clock)
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        self.controller.follow_(all_sum((values > 0).sum()) / batch.n_valid, clock)
        inside = all_sum(valid(near(u, theta, bandwidth)).sum())
        extra = {
            "dead": self.dead(clock).float().mean(),
            "l0_weight": self.controller.weight.clone(),
            "kernel_share": inside / (batch.n_valid * self.d_sae),
        }
        return Output(parts, latents, reconstruction, extra)

    def pull(
        self, u: Float[Tensor, "B T L"], latents: Float[Tensor, "B T L"], batch: Batch, clock: Clock
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss parts of the penalty `tanh`."""
        size = all_sum(torch.tanh(TANH_SLOPE * math.sqrt(self.d_in) * latents).sum()) / batch.n_valid
        missing = torch.where(self.dead(clock), torch.relu(self.theta - u), 0.0)
        silent = all_sum(masked(missing, batch.valid, batch.n_valid).sum()) / batch.n_valid
        return {"sparsity": self.controller.penalty(size, clock), "silent": SILENT_WEIGHT * silent}

    def price(self, l0: Float[Tensor, ""], clock: Clock) -> Float[Tensor, ""]:
        """The penalty on L0, by itself or by its distance to the target."""
        if self.config.target_l0 is not None and self.config.penalty == "target":
            off = (l0 / self.config.target_l0 - 1).square()
            return self.config.target_weight * ramp(clock, PENALTY_WARMUP) * off
        return self.controller.penalty(l0, clock)

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        self.theta.clamp_(min=LEAST_THETA)

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        settled = {"l0_weight": float(self.controller.weight)}
        if self.config.target_l0 is None:
            return settled
        ratios = (self.pre_activations(b.x)[b.valid] / self.theta for b in batches())
        factor = max(threshold_for(ratios, self.config.target_l0), LEAST_THETA)
        self.theta.mul_(factor)
        return settled | {"threshold_factor": factor}

    def fold_extra(self, scale: Tensor) -> None:
        self.theta.div_(scale)
