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

from collections.abc import Callable
from typing import Any, TypeVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from train.data.batch import Batch
from train.saes import composition
from train.saes import compositional_phases as phases
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, Output
from train.saes.composition import HIGH, LOW, MID
from train.saes.compositional_config import CompositionalConfig
from train.saes.compositional_losses import part_figures, structure_losses
from train.saes.compositional_step import kept_pass, steps_with_kept
from train.saes.kept import Codes, Kept
from train.saes.parts import count_silence_, masked, pre_activations, reconstruction_loss
from train.saes.sparsity import Sparsity
from train.schedule import Clock

OWN_RATE = 10.0  # times the learning rate, for the logits: at 1 A changes by 5 % in 810 steps and learns nothing
START_COUPLING = 0.1
WARMUP_SHARE, WARMUP_STEPS = 0.05, 500  # of the learning rate after the clustering


Form = TypeVar("Form")


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
        "copies": 0.0,
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
            names=("low", "mid", "high"), floor=config.level_floor,
        )  # fmt: skip
        if config.pretrain:
            self.sparsity.threshold[MID:] = torch.inf  # upper levels are not in use until the clustering
        coupling = torch.full((self.n_upper,), 0.0 if config.encoder == "no_comp" else START_COUPLING)
        self.coupling = nn.Parameter(coupling, requires_grad=config.encoder != "no_comp")
        learned = config.hierarchy in ("learned", "reassign")
        rows, generator = self.W_dec.detach(), torch.Generator().manual_seed(seed + 1)
        first = phases.first_hierarchies(config, self.sizes, rows[self.places[LOW]], generator)
        for name, found in zip(("mid", "high"), first, strict=True):
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

    # ---- weights ----------------------------------------------------------------------------------------------

    def compositions(self) -> tuple[Float[Tensor, "M W"], Float[Tensor, "H M"]]:
        """A of mid over low and of high over mid, one row per upper latent, 0 where there is no candidate."""
        return self.composed_of(composition.dense)

    def composed_of(self, form: Callable[[Tensor, Tensor, int], Form]) -> tuple[Form, Form]:
        """The same in another form, made of weights, candidates and the number of lower latents."""
        low, mid, _ = self.sizes
        first = form(softplus(self.logits_mid), self.candidates_mid, low)
        return first, form(softplus(self.logits_high), self.candidates_high, mid)

    def hierarchy(self) -> tuple[tuple[nn.Parameter, Tensor, int], tuple[nn.Parameter, Tensor, int]]:
        """Logits and candidates of mid and of high, with their levels."""
        return (self.logits_mid, self.candidates_mid, MID), (self.logits_high, self.candidates_high, HIGH)

    def rows(self, compositions: tuple[Tensor | Kept, Tensor | Kept] | None = None) -> Float[Tensor, "L D"]:
        """Decoder rows, the upper ones made from the lower."""
        if self.config.decoder == "free":
            return self.W_dec
        levels: list[Tensor] = [self.W_low]
        if compositions is None:
            compositions = self.composed_of(composition.kept) if self.sparse else self.compositions()
        for level, A in enumerate(compositions, start=1):
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
        if self.config.living_parts and self.logits_mid.requires_grad:
            dead = self.dead(clock)
            for logits, candidates, level in self.hierarchy():
                silent = dead[self.places[level - 1]][candidates]
                logits.copy_(torch.where(silent, logits.clamp(max=composition.NO_PART), logits))
        if self.config.decoder != "free":
            self.W_dec.copy_(self.rows())

    @torch.no_grad()
    def inner_figures(self) -> dict[str, Tensor]:
        """Of mid and high: effective number of parts, 1 / Σ share² on average, and which share of rows are copies."""
        return part_figures(self)

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
            return phases.flat_pass(self, batch, clock)
        if self.sparse and steps_with_kept(self.config):
            return kept_pass(self, batch, clock)
        compositions = self.compositions()
        W_dec = self.rows(compositions)
        u, f = self.levels(batch, compositions, clock)
        latents = torch.cat(f[::-1], dim=-1)
        loss, reconstruction = self.nested(batch, latents, W_dec)
        dead = self.dead(clock)
        aux = self.aux_k(batch.x - reconstruction, torch.cat(u[::-1], -1), dead, batch.valid, W_dec)
        parts = {"reconstruction": loss, "aux": self.config.aux_alpha * aux}
        parts |= self.sparsity.penalty(f, batch.n_valid, clock)
        parts |= structure_losses(self, u, f, compositions, W_dec, batch.n_valid, clock)
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        return Output(parts, latents, reconstruction, self.figures(dead))

    def nested(self, batch: Batch, latents: Codes, W_dec: Float[Tensor, "L D"]) -> tuple[Tensor, Tensor]:
        """The loss of all nested reconstructions, and the last of them."""
        # levels without a loss of their own are written with the next one
        weights = [weight for weight in self.omega if weight]
        ends = [self.places[level].stop for weight, level in zip(self.omega, (HIGH, MID, LOW), strict=True) if weight]
        blocks = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        if isinstance(latents, Kept):
            each = list(latents.times_by_block(W_dec, [block.stop - block.start for block in blocks]).unbind(2))
        else:
            each = [self.written(latents[..., block], W_dec[block]) for block in blocks]
        reconstruction, losses = self.b_dec.expand_as(batch.x), []
        for weight, more in zip(weights, each, strict=True):
            reconstruction = more + reconstruction
            losses.append(weight * reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid))
        return torch.stack(losses).sum(), reconstruction

    def figures(self, dead: Bool[Tensor, " L"]) -> dict[str, Tensor]:
        """What of a step is worth logging."""
        each = zip(("low", "mid", "high"), self.places, strict=True)
        extra = {f"dead_{name}": dead[place].float().mean() for name, place in each}
        extra |= {"dead": dead.float().mean(), "coupling": self.coupling.detach().mean()}
        return extra | self.sparsity.logged()

    # ---- the middle of the run ----------------------------------------------------------------------------------

    def joint_from(self, n_steps: int) -> int:
        """The first step of all three levels."""
        return max(1, round(self.config.pretrain * n_steps)) if self.config.pretrain else 0

    def landmarks(self, n_steps: int) -> tuple[int, ...]:
        start = self.joint_from(n_steps)
        again = phases.reassignments(start, n_steps) if self.config.hierarchy == "reassign" else range(0)
        return (*([start] if start else []), *again)

    def rates(self, clock: Clock) -> tuple[float, float]:
        start = self.joint_from(clock.n_steps)
        warmup = min(WARMUP_STEPS, WARMUP_SHARE * clock.n_steps)
        anew = 0 < start <= clock.step
        return min((clock.step - start + 1) / max(warmup, 1.0), 1.0) if anew else 1.0, OWN_RATE

    @torch.no_grad()
    def revise(self, batches: Batches, clock: Clock) -> dict[str, Tensor]:
        if clock.step == self.joint_from(clock.n_steps):
            return phases.cluster(self, batches, clock)
        return phases.reassign(self, batches, clock)

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        def values() -> Any:
            compositions = self.compositions()
            for batch in batches():
                yield [u[batch.valid] for u in self.levels(batch, compositions, None)[0]]

        return self.sparsity.calibrate(values)

    def fold_extra(self, scale: Tensor) -> None:
        self.sparsity.fold(scale)
