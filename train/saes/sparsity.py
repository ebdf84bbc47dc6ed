"""How few latents are active: budgets kept by BatchTopK, group by group, or an L1 penalty led to a target.

BatchTopK (Bussmann et al. 2412.06410) keeps the k·N largest values over the batch's N valid tokens; inference is
independent of the batch: f = u·1[u > θ], θ the running average of the smallest kept value, set anew on training
tokens at the end so that L0 = k on average (spec §0.1). With several groups of latents (levels, time scales):

    budgets   each group keeps its own share of k, with its own θ
    joint     one BatchTopK over u / w of all groups together: thresholds proportional to the weights w
    l1        λ·Σ_g w_g ⟨Σ f⟩ instead of a budget, λ led to L0 = k by a controller
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.collective import latents_over_ranks, over_ranks
from train.saes.floor import LevelFloor
from train.saes.parts import annealed_k, batch_top_k, smallest_kept, threshold_for, update_average_
from train.schedule import Clock, averaging, ramp

AVERAGE_FROM = 0.05  # share of the run before the threshold's average starts
PENALTY_WARMUP = 0.1  # share of the run over which a penalty rises
RANGE = 30.0  # how far the controller may move λ, either way

Mode = Literal["budgets", "joint", "l1"]


def check_target(target_l0: float | None, d_sae: int) -> None:
    """Refuse an L0 that no dictionary of this size has.

    Raises:
        ValueError: it is larger than the dictionary.
    """
    if target_l0 is not None and target_l0 > d_sae:
        raise ValueError(f"target_l0 = {target_l0:g} (or --k) is more than d_sae = {d_sae}")


def check_led(name: str, weight: float, led: bool) -> None:
    """Refuse a penalty weight that is to be led to an L0 and cannot move.

    Raises:
        ValueError: `weight` is 0; λ is moved by factors.
    """
    if led and weight == 0:
        raise ValueError(f"{name} = 0 cannot be led to an L0, since λ is moved by factors: give a start above 0")


class L0Controller(nn.Module):
    """A penalty weight λ that is led to the L0 wanted: a proportional-integral rule on e = log(L0/L0*), L0 averaged.

        log λ ← log λ + e' − e'_before + η·clip(4e, −1, 1),      e' = clip(e, −1, 1)

    From the end of the warm-up on, or from the first L0 noted after it (e'_before = 0 at first), within [λ₀/30, 30 λ₀];
    η = 1e-3, and 10 / steps in runs under 10,000 steps. The proportional part lets go of λ before L0 has arrived; the
    integral one is bounded, so that it does not wind up while L0 is far off. L0 answers λ weakly (e times as much λ, a
    fifth to a third less L0 on the demo store), hence the 4. Differs from spec §0.8, the integral part alone on
    L0/L0* − 1: at 400 steps and L0* = 32 that ended up to 40 % off, this within 2 % (docs/log.md).

    Attributes:
        weight: λ as it stands.
        l0_average: running average of L0; inf until one was noted.
    """

    weight: Tensor
    l0_average: Tensor

    def __init__(self, weight: float, target_l0: float | None) -> None:
        super().__init__()
        self.first_weight, self.target_l0 = weight, target_l0
        self.register_buffer("weight", torch.tensor(weight))
        self.register_buffer("l0_average", torch.full((), torch.inf))

    def penalty(self, size: Float[Tensor, ""], clock: Clock) -> Float[Tensor, ""]:
        """λ·c(t)·size, c rising over the first tenth of the run."""
        return self.weight.clone() * ramp(clock, PENALTY_WARMUP) * size

    @torch.no_grad()
    def follow_(self, l0: Float[Tensor, ""], clock: Clock) -> None:
        """Note the L0 of a batch, and move λ towards the target, if there is one."""
        before = torch.where(torch.isinf(self.l0_average), 0.0, self.error())
        update_average_(self.l0_average, l0, averaging(clock.n_steps), clock.step == 0)
        if self.target_l0 is None or clock.progress < PENALTY_WARMUP:
            return
        error = self.error()
        if clock.step == 0 or (clock.step - 1) / clock.n_steps < PENALTY_WARMUP:
            before = torch.zeros_like(error)
        steered = error.clamp(-1, 1) - before.clamp(-1, 1)
        self.weight *= torch.exp(steered + max(1e-3, 10 / clock.n_steps) * (4 * error).clamp(-1, 1))
        self.weight.clamp_(self.first_weight / RANGE, self.first_weight * RANGE)

    def host_facts(self, clock: Clock) -> tuple[Hashable, ...]:
        """What of the clock decides how λ moves."""
        begun = (clock.step - 1) / clock.n_steps >= PENALTY_WARMUP
        return ramp(clock, PENALTY_WARMUP), clock.step == 0, clock.progress >= PENALTY_WARMUP, begun

    def error(self) -> Float[Tensor, ""]:
        """log(L0/L0*) of the average; 0 without a target."""
        return torch.log(self.l0_average / self.target_l0) if self.target_l0 else torch.zeros_like(self.l0_average)


class Sparsity(nn.Module):
    """The active latents of one or more groups.

    A variant asks group by group with `active` (a later group may depend on an earlier one's codes), then once with
    `settle`, which gives the codes that count.

    Args:
        sizes: latents of each group.
        k: latents per token in all.
        d_in: k-annealing starts at d_in / 4.
        mode: see the module.
        weights: w of each group, for `joint` and `l1`.
        shares: of k for each group, for `budgets`; default ∝ 1 / weights.
        k_anneal: share of the run over which k falls to its value; 0: at once.
        l1: λ at the start, for `l1`.
        names: what the groups are called in metrics, for `l1`.
        floor: least L0 of each group, for `joint` and `l1`, as a part of its share of k; 0: none.

    Attributes:
        threshold: θ of each group [groups], in scaled units until folded; 0 for `l1`, inf for a group not in use yet.
        controller: λ, for `l1`.
        floor: factors on the weights, where there is a least L0.
    """

    threshold: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        k: int,
        d_in: int,
        mode: Mode = "budgets",
        weights: Sequence[float] | None = None,
        shares: Sequence[float] | None = None,
        k_anneal: float = 0.0,
        l1: float = 0.03,
        names: Sequence[str] = (),
        floor: float = 0.0,
    ) -> None:
        super().__init__()
        self.sizes, self.k, self.d_in, self.mode, self.k_anneal = tuple(sizes), k, d_in, mode, k_anneal
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.sizes)
        parts = [1 / weight for weight in self.weights] if shares is None else list(shares)
        self.shares = tuple(part / sum(parts) for part in parts)
        self.names, self.penalties = names, torch.zeros(0)
        self.register_buffer("threshold", torch.zeros(len(self.sizes)))
        self.controller = L0Controller(l1, float(k)) if mode == "l1" else None
        least = [floor * k * share for share in self.shares]
        self.floor = LevelFloor(least) if floor and mode != "budgets" else None

    def k_at(self, clock: Clock) -> float:
        """k of this step."""
        return annealed_k(self.k, self.d_in, self.k_anneal, clock.progress)

    def prices(self) -> Float[Tensor, " groups"]:
        """The weights as they stand."""
        weights = self.threshold.new_tensor(self.weights)
        return weights if self.floor is None else weights * self.floor.factor

    def active(
        self, u: Float[Tensor, "B T G"], group: int, n_valid: int, clock: Clock | None
    ) -> Float[Tensor, "B T G"]:
        """The codes of one group from its rectified pre-activations, 0 at invalid positions.

        In `joint` they are provisional in training: chosen by the running thresholds. `clock` None: inference.
        """
        if self.mode == "l1" and clock is not None:
            return u
        if clock is None or self.mode == "joint":
            return u * (u > self.threshold[group])
        n_entries = latents_over_ranks(over_ranks(u.numel()))
        kept = batch_top_k(u, min(self.n_kept(group, n_valid, clock), n_entries))
        self.note(kept, group, clock)
        return kept

    def host_facts(self, clock: Clock) -> tuple[Hashable, ...]:
        """What of the clock decides how many are kept, and how θ follows; for `budgets`."""
        return self.k_at(clock), clock.progress <= AVERAGE_FROM

    def n_kept(self, group: int, n_valid: int, clock: Clock) -> int:
        """Codes of a group in a batch, for `budgets`."""
        return round(self.k_at(clock) * self.shares[group] * n_valid)

    def settle(
        self, u: Sequence[Tensor], codes: Sequence[Tensor], n_valid: int, clock: Clock | None
    ) -> list[Float[Tensor, "B T _"]]:
        """The codes that count, from all groups' rectified pre-activations and what `active` gave for them."""
        if self.mode != "joint" or clock is None:
            return list(codes)
        prices = self.prices()
        scores = torch.cat([values / price for values, price in zip(u, prices, strict=True)], dim=-1)
        kept = batch_top_k(scores, min(round(self.k_at(clock) * n_valid), over_ranks(scores.numel())))
        self.note(kept, None, clock)
        parts = kept.split(self.sizes, dim=-1)
        self.keep_up_(parts, n_valid, clock)
        return [part * price for part, price in zip(parts, prices, strict=True)]

    def keep_up_(self, codes: Sequence[Tensor], n_valid: int, clock: Clock) -> None:
        """Let prices follow each group's L0, where there is a floor."""
        if self.floor is not None:
            self.floor.follow_(torch.stack([(values > 0).sum() for values in codes]) / n_valid, clock)

    def penalty(self, codes: Sequence[Tensor], n_valid: int, clock: Clock) -> dict[str, Float[Tensor, ""]]:
        """The loss part of `l1` (unit decoder rows), after which λ follows L0; nothing in the other modes."""
        if self.controller is None:
            return {}
        pairs = zip(self.prices(), codes, strict=True)
        sizes = torch.stack([price * values.sum() / n_valid for price, values in pairs])
        part = self.controller.penalty(sizes.sum(), clock)
        self.penalties = (part / sizes.sum().clamp_min(1e-12) * sizes).detach()
        self.controller.follow_(torch.stack([(values > 0).sum() for values in codes]).sum() / n_valid, clock)
        self.keep_up_(codes, n_valid, clock)
        return {"sparsity": part}

    @torch.no_grad()
    def note(self, kept: Tensor, group: int | None, clock: Clock) -> None:
        """Let θ of a group, or of all, follow the smallest positive value of the codes kept, of any shape."""
        smallest, first = smallest_kept(kept), clock.progress <= AVERAGE_FROM
        beta = averaging(clock.n_steps)
        if group is not None:
            update_average_(self.threshold[group], smallest, beta, first)
            return
        for number, price in enumerate(self.prices()):
            update_average_(self.threshold[number], smallest * price, beta, first)

    @torch.no_grad()
    def begin_(self, codes: Sequence[Tensor]) -> None:
        """Start every θ from the codes of one batch; a group without any takes the least score of the others."""
        prices = self.prices()
        scores = torch.stack([smallest_kept(values) for values in codes]) / prices
        own = torch.isfinite(scores) & (self.mode == "budgets")
        self.threshold.copy_(torch.where(own, scores, scores.min()) * prices)
        if self.mode == "l1":
            self.threshold.zero_()

    @torch.no_grad()
    def calibrate(self, values: Callable[[], Iterable[Sequence[Tensor]]]) -> dict[str, float]:
        """Set every θ on training tokens so that each group's L0 is its share of k.

        Args:
            values: at every call, batch by batch, the rectified pre-activations [tokens, group] of each group, as they
                come out with the thresholds of earlier groups as they stand.

        Returns:
            the thresholds before and after, by name.
        """
        if self.mode == "l1":
            return {}
        before = self.threshold.clone()
        if self.mode == "joint":
            prices = self.prices()
            scores = (
                torch.cat([part / price for part, price in zip(parts, prices, strict=True)], dim=-1)
                for parts in values()
            )
            self.threshold.copy_(threshold_for(scores, float(self.k)) * prices)
        else:
            for group, share in enumerate(self.shares):  # in turn: later groups see earlier ones' codes
                self.threshold[group] = threshold_for((parts[group] for parts in values()), self.k * share)
        return self._named("threshold_average", before) | self._named("threshold", self.threshold)

    def _named(self, name: str, values: Tensor) -> dict[str, float]:
        if len(values) == 1:
            return {name: float(values[0])}
        return {f"{name}_{number}": float(value) for number, value in enumerate(values)}

    def per_latent(self) -> Float[Tensor, " L"]:
        """θ of each latent, the groups side by side."""
        return torch.cat([theta.expand(size) for theta, size in zip(self.threshold, self.sizes, strict=True)])

    def logged(self) -> dict[str, Tensor]:
        """What is worth a line in metrics."""
        if self.controller is not None:
            each = zip(self.names, self.penalties, strict=False)  # none before the first step with a penalty
            values = {"l1_weight": self.controller.weight.clone()} | {f"sparsity_{name}": part for name, part in each}
        elif len(self.sizes) == 1:
            values = {"threshold": self.threshold[0].clone()}
        else:
            values = {f"threshold_{number}": value.clone() for number, value in enumerate(self.threshold)}
        if self.floor is not None:
            values |= {f"price_{name}": price for name, price in zip(self.names, self.prices(), strict=True)}
        return values

    def fold(self, scale: Tensor) -> None:
        """Thresholds from scaled to raw units."""
        self.threshold.div_(scale)
