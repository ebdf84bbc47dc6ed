"""Compositional hierarchy: few, dear upper latents whose decoder rows are sums of many, cheap lower ones.

Levels low, mid, high with 4:2:1 latents; f^l by BatchTopK on each level's own budget; A ≥ 0 says which parts (see
`composition`); h = x − b_dec.

    u^low = h W^low + b^low     u^mid = h W^mid + c^mid ⊙ (f^low A^1) + b^mid     u^high likewise from f^mid
    D^low free unit rows        D^mid_j = norm(Σ_i A^1_ij D^low_i)                D^high likewise from D^mid
    L = Σ_p ω_p ⟨‖x − x̂_p‖²⟩ + α·AuxK (+ λ_a·agreement) (+ λ_Ω·Ω)       p: {high}, {high, mid}, all; Σ ω_p = 1

The first tenth of the run trains the low level alone, as flat BatchTopK. Then parts are found by clustering it, one
gain per level is fitted on a batch (levels that are sums of one another overshoot together), and lr warms up anew.
"""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import softplus

from common.config import Count
from train.data.batch import Batch
from train.saes import composition
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, KeptConfig, Output
from train.saes.composition import CoActivity, Hierarchy
from train.saes.consistency import l2_loss
from train.saes.parts import (
    aux_k_loss,
    batch_top_k,
    count_silence_,
    masked,
    pre_activations,
    reconstruction_loss,
    smallest_kept,
    update_average_,
)
from train.saes.sparsity import Mode, Sparsity
from train.schedule import Clock, averaging

LOW, MID, HIGH = range(3)  # order of computing; stored order is high, mid, low, so that prefixes are coarse to fine
OWN_RATE = 10.0  # times the learning rate, for the logits: at 1 A changes by 5 % in 810 steps and learns nothing
START_COUPLING = 0.1
WARMUP_SHARE, WARMUP_STEPS = 0.05, 500  # of the learning rate after the clustering
REASSIGN_STEPS = 5000  # or half of a shorter run
REASSIGN_UNTIL = 0.8
GROUP_RAMP = 0.2  # of the joint phase, over which Ω rises
AGREEMENT_RAMP = (0.2, 0.4)  # shares of the run between which the agreement loss rises


class CompositionalConfig(KeptConfig):
    """Settings of `compositional`."""

    sparsity: Mode = Field("budgets", description="How levels share k: own budgets, one joint BatchTopK, or L1.")
    level_weights: tuple[float, float, float] = Field(
        (0.5, 1.0, 2.0), description="Price of an active latent of the low, mid, high level; budgets are ∝ 1 / price."
    )
    l1: float = Field(0.03, gt=0, description="λ at the start, in l1 mode; a controller leads it to L0 = k.")
    nesting: tuple[float, float, float] = Field(
        (0.25, 0.5, 1.0),
        description="ω of {high}, {high, mid}, all, before they sum to 1; 0, 0, 1: no nesting.",
    )
    hierarchy: Literal["learned", "fixed_cluster", "fixed_random", "reassign"] = Field(
        "learned", description="Where A comes from: clustered then trained; clustered; random; candidates found anew."
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
    group: float = Field(0.0, ge=0, description="λ_Ω of the tree-group norm; 0.002 is 5 % of the loss, gain unproven.")
    residual_penalty: float = Field(1.0, ge=0, description="λ_r on ‖r_j‖² in decoder = residual; 0.01 is too weak.")

    @model_validator(mode="after")
    def _has_levels(self) -> CompositionalConfig:
        if min(self.level_weights) <= 0 or min(self.nesting) < 0 or self.nesting[2] <= 0:
            raise ValueError("level_weights and the last of nesting must be above 0, the others of nesting not below")
        if self.d_sae < 8:
            raise ValueError(f"d_sae = {self.d_sae}: three levels need at least 8 latents")
        return self


@final
class Compositional(SAE):
    """See the module's formula."""

    variant = "compositional"
    Config = CompositionalConfig
    config: CompositionalConfig
    logits_mid: nn.Parameter
    logits_high: nn.Parameter
    candidates_mid: Tensor
    candidates_high: Tensor
    own_rate = ("logits_mid", "logits_high")
    plain = {
        "nesting": (0.0, 0.0, 1.0),
        "encoder": "no_comp",
        "decoder": "free",
        "sparsity": "joint",
        "level_weights": (1.0, 1.0, 1.0),
        "pretrain": 0.0,
    }

    def __init__(self, config: CompositionalConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.seed = seed
        n_high, n_mid = round(config.d_sae / 7), round(2 * config.d_sae / 7)
        self.n_upper = n_high + n_mid
        self.sizes = (config.d_sae - self.n_upper, n_mid, n_high)
        self.places = (slice(self.n_upper, config.d_sae), slice(n_high, self.n_upper), slice(0, n_high))
        self.omega = tuple(weight / sum(config.nesting) for weight in config.nesting)
        self.sparsity = Sparsity(
            self.sizes, config.k, d_in, config.sparsity, config.level_weights, k_anneal=config.k_anneal, l1=config.l1,
            names=("low", "mid", "high"),
        )  # fmt: skip
        if config.pretrain:
            self.sparsity.threshold[MID:] = torch.inf  # upper levels are not in use until the clustering
        coupling = torch.full((self.n_upper,), 0.0 if config.encoder == "no_comp" else START_COUPLING)
        self.coupling = nn.Parameter(coupling, requires_grad=config.encoder != "no_comp")
        learned = config.hierarchy in ("learned", "reassign")
        rows, generator = self.W_dec.detach(), torch.Generator().manual_seed(seed + 1)
        for name, found in zip(
            ("mid", "high"), self._first_hierarchies(rows[self.places[LOW]], generator), strict=True
        ):
            self.register_parameter(f"logits_{name}", nn.Parameter(found.logits(), requires_grad=learned))
            self.register_buffer(f"candidates_{name}", found.candidates)
        if config.decoder == "free":
            return
        self.unit_rows = ("W_low",)
        del self.W_dec
        self.W_low = nn.Parameter(rows[self.places[LOW]].clone())
        if config.decoder == "residual":
            scatter = torch.randn(self.n_upper, d_in, generator=generator) * 0.01 / d_in**0.5
            self.residual = nn.Parameter(scatter)
        with torch.no_grad():
            self.register_buffer("W_dec", self.rows())
            self.W_enc.copy_(self.W_dec.T)

    def _first_hierarchies(self, rows: Tensor, generator: torch.Generator) -> tuple[Hierarchy, Hierarchy]:
        """Parts to begin with: those for good, or, where clustering comes later, any."""
        if self.config.pretrain and self.config.hierarchy != "fixed_random":
            low, mid, high = self.sizes
            width = self.config.candidates
            return composition.any_hierarchy(low, mid, width), composition.any_hierarchy(mid, high, width)
        similar = composition.affinity(rows, rows, None)
        return self._hierarchies(similar, torch.ones(len(rows)), generator)

    def _hierarchies(self, affinity: Tensor, mass: Tensor, generator: torch.Generator) -> tuple[Hierarchy, Hierarchy]:
        """Parts of the mid and of the high level, by clustering the low one; or at random."""
        low, mid, high = self.sizes
        if self.config.hierarchy == "fixed_random":
            n_parts = self.config.random_parts
            first = composition.random_hierarchy(low, mid, n_parts, generator)
            return first, composition.random_hierarchy(mid, high, n_parts, generator)
        width = self.config.candidates
        affinity = composition.strongest(affinity)
        first, member = composition.seeds_with_overlap(affinity, mass, mid, width, generator)
        above = member @ affinity @ member.T  # mean over pairs of parts
        return first, composition.seeds_with_overlap(above, member @ mass, high, width, generator)[0]

    # ---- weights ----------------------------------------------------------------------------------------------

    def compositions(self) -> tuple[Float[Tensor, "M W"], Float[Tensor, "H M"]]:
        """A of mid over low and of high over mid, one row per upper latent, 0 where there is no candidate."""
        low, mid, _ = self.sizes
        return (
            composition.dense(softplus(self.logits_mid), self.candidates_mid, low),
            composition.dense(softplus(self.logits_high), self.candidates_high, mid),
        )

    def rows(self, compositions: tuple[Tensor, Tensor] | None = None) -> Float[Tensor, "L D"]:
        """Decoder rows, the upper ones made from the lower."""
        if self.config.decoder == "free":
            return self.W_dec
        levels: list[Tensor] = [self.W_low]
        for level, A in enumerate(compositions or self.compositions(), start=1):
            made = composition.composed_rows(A, levels[-1])
            levels.append(
                composition.unit(made + self.residual[self.places[level]])
                if self.config.decoder == "residual"
                else made
            )
        return torch.cat(levels[::-1])

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        self.coupling.clamp_(min=0)
        if self.config.decoder != "free":
            self.W_dec.copy_(self.rows())

    # ---- codes ------------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, slice]:
        return dict(zip(("low", "mid", "high"), self.places, strict=True))

    def links(self) -> dict[tuple[str, str], Tensor | None]:
        first, second = self.compositions()
        return {("high", "mid"): second, ("mid", "low"): first}

    def direct_encoder(self) -> Float[Tensor, "D L"]:
        if self.config.encoder != "comp_only":
            return self.W_enc
        return torch.cat([torch.zeros_like(self.W_enc[:, : self.n_upper]), self.W_enc[:, self.n_upper :]], dim=1)

    def levels(
        self, batch: Batch, compositions: tuple[Tensor, Tensor], clock: Clock | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Rectified pre-activations and codes, level by level from low to high."""
        direct = pre_activations(batch.x, self.direct_encoder(), self.b_enc, self.b_dec)
        u: list[Tensor] = []
        f: list[Tensor] = []
        for level, place in enumerate(self.places):
            values = direct[..., place]
            if level and self.config.encoder != "no_comp":
                lower = f[-1].detach() if self.config.detach_lower else f[-1]
                values = values + self.coupling[place] * (lower @ compositions[level - 1].T).float()
            u.append(masked(torch.relu(values), batch.valid, batch.n_valid))
            f.append(self.sparsity.active(u[-1], level, batch.n_valid, clock))
        return u, self.sparsity.settle(u, f, batch.n_valid, clock)

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        return torch.cat(self.levels(batch, self.compositions(), None)[1][::-1], dim=-1)

    def as_affine(self) -> AffineForm | None:
        if self.config.encoder != "no_comp":
            return None
        low, mid, high = self.sparsity.per_latent().split(self.sizes)
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return AffineForm(*weights, "jumprelu", threshold=torch.cat([high, mid, low])).raw(self.scale)

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        if clock.step < self.joint_from(clock.n_steps):
            return self._flat_pass(batch, clock)
        compositions = self.compositions()
        W_dec = self.rows(compositions)
        u, f = self.levels(batch, compositions, clock)
        latents = torch.cat(f[::-1], dim=-1)
        reconstruction, losses, written = self.b_dec.expand_as(batch.x), [], 0
        for weight, level in zip(self.omega, (HIGH, MID, LOW), strict=True):
            if weight:  # levels without a loss of their own are written with the next one
                more = slice(written, self.places[level].stop)
                reconstruction = (latents[..., more] @ W_dec[more]).float() + reconstruction
                loss = reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid)
                losses.append(weight * loss)
                written = self.places[level].stop
        dead = self.dead(clock)
        aux = aux_k_loss(batch.x - reconstruction, torch.cat(u[::-1], -1), dead, W_dec, batch.valid)
        parts = {"reconstruction": torch.stack(losses).sum(), "aux": self.config.aux_alpha * aux}
        parts |= self.sparsity.penalty(f, batch.n_valid, clock) | self._structure(u, f, compositions, batch, clock)
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        names = ("low", "mid", "high")
        extra = {f"dead_{name}": dead[place].float().mean() for name, place in zip(names, self.places, strict=True)}
        extra |= {"dead": dead.float().mean(), "coupling": self.coupling.detach().mean()}
        return Output(parts, latents, reconstruction, extra | self.sparsity.logged())

    def _structure(
        self, u: list[Tensor], f: list[Tensor], compositions: tuple[Tensor, Tensor], batch: Batch, clock: Clock
    ) -> dict[str, Tensor]:
        """The loss parts over pairs of levels that are switched on."""
        config, parts = self.config, {}
        joint = (clock.progress - config.pretrain) / (1 - config.pretrain)
        pairs = list(zip((MID, HIGH), compositions, (self.logits_mid, self.logits_high), strict=True))
        if config.agreement:
            start, full = AGREEMENT_RAMP
            weight = config.agreement * min(max((clock.progress - start) / (full - start), 0.0), 1.0)
            source = f if config.agree_on == "codes" else u
            losses = [l2_loss(f[level], (source[level - 1] @ A.T).float()) for level, A, _ in pairs]
            parts["agreement"] = weight * torch.stack(losses).sum()
        if config.group:
            weight, tau = config.group * min(max(joint, 0.0) / GROUP_RAMP, 1.0), 0.1 ** max(joint, 0.0)
            candidates = (self.candidates_mid, self.candidates_high)
            losses = [
                composition.group_sparsity(f[level], f[level - 1], logits, found, tau, batch.n_valid)
                for (level, _, logits), found in zip(pairs, candidates, strict=True)
            ]
            parts["group"] = weight * torch.stack(losses).sum()
        if config.decoder == "residual":
            parts["residual"] = config.residual_penalty * self.residual.square().sum(-1).mean()
        return parts

    def _flat_pass(self, batch: Batch, clock: Clock) -> Output:
        """The low level alone, with all of k."""
        place = self.places[LOW]
        rows = self.W_dec[place] if self.config.decoder == "free" else self.W_low
        u, f = self._flat(batch, clock)
        update_average_(self.sparsity.threshold[LOW], smallest_kept(f), averaging(clock.n_steps), clock.step == 0)
        reconstruction = (f @ rows).float() + self.b_dec
        dead = self.dead(clock)[place]
        aux = aux_k_loss(batch.x - reconstruction, u, dead, rows, batch.valid)
        count_silence_(self.tokens_silent[place], f, batch.n_valid)
        parts = {
            "reconstruction": reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid),
            "aux": self.config.aux_alpha * aux,
        }
        latents = torch.cat([f.new_zeros(*f.shape[:2], self.n_upper), f], dim=-1)
        return Output(parts, latents, reconstruction, {"dead": dead.float().mean()})

    def _flat(self, batch: Batch, clock: Clock) -> tuple[Tensor, Tensor]:
        place = self.places[LOW]
        u = torch.relu(pre_activations(batch.x, self.W_enc[:, place], self.b_enc[place], self.b_dec))
        u = masked(u, batch.valid, batch.n_valid)
        return u, batch_top_k(u, min(round(self.sparsity.k_at(clock) * batch.n_valid), u.numel()))

    # ---- the middle of the run ----------------------------------------------------------------------------------

    def joint_from(self, n_steps: int) -> int:
        """The first step of all three levels."""
        return max(1, round(self.config.pretrain * n_steps)) if self.config.pretrain else 0

    def landmarks(self, n_steps: int) -> tuple[int, ...]:
        start, every = self.joint_from(n_steps), max(min(REASSIGN_STEPS, n_steps // 2), 1)
        again = range(start + every, int(REASSIGN_UNTIL * n_steps), every)
        return (*([start] if start else []), *(again if self.config.hierarchy == "reassign" else []))

    def rates(self, clock: Clock) -> tuple[float, float]:
        start = self.joint_from(clock.n_steps)
        warmup = min(WARMUP_STEPS, WARMUP_SHARE * clock.n_steps)
        anew = 0 < start <= clock.step
        return min((clock.step - start + 1) / max(warmup, 1.0), 1.0) if anew else 1.0, OWN_RATE

    @torch.no_grad()
    def revise(self, batches: Batches, clock: Clock) -> dict[str, Tensor]:
        if clock.step == self.joint_from(clock.n_steps):
            return self._cluster(batches, clock)
        return self._reassign(batches)

    def _cluster(self, batches: Batches, clock: Clock) -> dict[str, Tensor]:
        """Parts from the low level's directions and co-activity; upper levels start from them."""
        counts, first = CoActivity(), None
        for batch in batches():
            first = first or batch
            f = self._flat(batch, clock)[1][batch.valid]
            counts.add(f, f)
        assert first is not None
        rows = self.rows()[self.places[LOW]]
        generator = torch.Generator().manual_seed(self.seed + 1 + clock.step)
        similar = composition.affinity(rows, rows, counts.correlation())
        for name, found in zip(("mid", "high"), self._hierarchies(similar, counts.mass, generator), strict=True):
            self.get_parameter(f"logits_{name}").copy_(found.logits())
            self.get_buffer(f"candidates_{name}").copy_(found.candidates)
        upper = slice(0, self.n_upper)
        A1, A2 = self.compositions()
        mid = composition.composed_rows(A1, rows)
        self.W_dec[upper] = torch.cat([composition.composed_rows(A2, mid), mid])
        self.after_step(clock)  # with the residual, if there is one
        self.W_enc[:, upper] = self.W_dec[upper].T
        self.b_enc[upper] = 0.0
        self.tokens_silent[upper] = 0
        self.sparsity.threshold[MID:] = 0.0
        self._fit_gains(first, clock)
        changed = torch.arange(self.d_sae, device=rows.device) < self.n_upper
        averages = {"W_enc": changed[None], "b_enc": changed}
        return averages | ({"W_dec": changed[:, None]} if self.config.decoder == "free" else {})

    def _fit_gains(self, batch: Batch, clock: Clock) -> None:
        """Scale each level so that the nested loss on one batch is least, and start the thresholds."""
        f = self.levels(batch, self.compositions(), clock)[1]
        h = masked((batch.x - self.b_dec).float(), batch.valid, batch.n_valid).flatten()
        written = torch.stack(
            [(codes @ self.W_dec[place]).flatten() for codes, place in zip(f, self.places, strict=True)]
        )
        gains = composition.fitted_gains(written, h, self.omega)
        for level, place in enumerate(self.places):
            self.W_enc[:, place] *= gains[level]
            self.b_enc[place] *= gains[level]
            if level:  # what comes from below has that level's gain already
                self.coupling[place] *= gains[level] / gains[level - 1]
        self.sparsity.begin_([codes * gain for codes, gain in zip(f, gains, strict=True)])

    def _reassign(self, batches: Batches) -> dict[str, Tensor]:
        """Candidates anew from the levels' present directions and co-activity; kept ones keep their weight."""
        counts = (CoActivity(), CoActivity())
        for batch in batches():
            low, mid, high = (f[batch.valid] for f in self.levels(batch, self.compositions(), None)[1])
            counts[0].add(low, mid)
            counts[1].add(mid, high)
        averages = {}
        for name, level, found in zip(("mid", "high"), (MID, HIGH), counts, strict=True):
            lower, upper = self.W_dec[self.places[level - 1]], self.W_dec[self.places[level]]
            affinities = composition.affinity(lower, upper, found.correlation())
            logits, candidates = self.get_parameter(f"logits_{name}"), self.get_buffer(f"candidates_{name}")
            moved, values, changed = composition.reassigned(affinities, candidates, logits)
            candidates.copy_(moved)
            logits.copy_(values)
            averages[f"logits_{name}"] = changed
        self.after_step(Clock(0, 1, 1))
        return averages

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        def values() -> Any:
            compositions = self.compositions()
            for batch in batches():
                yield [u[batch.valid] for u in self.levels(batch, compositions, None)[0]]

        return self.sparsity.calibrate(values)

    def fold_extra(self, scale: Tensor) -> None:
        self.sparsity.fold(scale)
