"""Tree: three levels of latents joined by a fixed tree with learned edges (variant B of the specification, §5).

Levels top, mid and leaf; ch(p) are the children of p; w, v, κ > 0 through softplus, one per latent. Bottom up:

    u_leaf = h W + b      u_p = h W + b + κ_p a_p,  a_p = Σ_{c ∈ ch(p)} w_c f_c              h = x − b_dec
    f = BatchTopK per level of ReLU(u), k · (4, 2, 1) / 7 from leaf to top     x̂_P = b_dec + Σ_{i in levels P} f_i d_i
    L = Σ_P ω_P ⟨‖x − x̂_P‖²⟩ + r(t) (λ_2 L2 + λ_KL KL + λ_c C) + α·AuxK              P: top, top + mid, all

Top down the order is turned: roots are encoded first and are cheap, a_c = w_c f_parent(c), k · (4, 2, 1) / 7 from top
to leaf. L2, KL and C ask each level's codes f to agree with their aggregate a, over active latents alone
(`consistency`); r(t) rises from 0 to 1 between 20 % and 40 % of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, Output
from train.saes.consistency import agreement, family_losses, rise, whole_pairs
from train.saes.forest import LEAF, MID, TOP, Forest, Levels
from train.saes.kept import Codes, Kept, product
from train.saes.parts import count_silence_, generator_of, masked, pre_activations, reconstruction_loss
from train.saes.repair import repair_landmarks, reset_dead_leaves
from train.saes.sparsity import Sparsity
from train.saes.tree_config import TreeConfig
from train.saes.tree_step import kept_pass, steps_with_kept
from train.schedule import Clock

INIT_NOISE = 0.1


@final
class Tree(SAE):
    """See the module's formula. Latents lie top, mid, leaf.

    Attributes:
        forest: which latent is whose child.
        parent: `forest.parent()`, kept beside the weights for readers of the file.
        order: levels in the order of encoding.
        up, down, kappa: w, v and κ before softplus [d_sae]; each is there only where it is used.
    """

    variant = "tree"
    Config = TreeConfig
    config: TreeConfig
    plain = {
        "nesting": (0.0, 0.0, 1.0),
        "kappa": 0.0,
        "sparsity": "joint",
        "level_weights": (1.0, 1.0, 1.0),
        "sum_init": False,
        "l2": 0.0,
        "kl": 0.0,
        "repair": False,
    }
    parent: Tensor
    up: Tensor | None
    down: Tensor | None
    kappa: Tensor | None

    def __init__(self, config: TreeConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.forest, self.seed = Forest(config.d_sae, config.shape), seed
        self.order = (LEAF, MID, TOP) if config.orientation == "bottom_up" else (TOP, MID, LEAF)
        sizes = [self.forest.sizes[level] for level in self.order]
        self.sparsity = Sparsity(
            sizes, config.k, d_in, config.sparsity, config.level_weights, k_anneal=config.k_anneal, l1=config.l1,
            names=[("top", "mid", "leaf")[level] for level in self.order],
        )  # fmt: skip
        self.register_buffer("parent", self.forest.parent())
        siblings = self.forest.n_siblings()
        w = 1 / siblings if config.orientation == "bottom_up" else torch.ones(config.d_sae)
        kappa = torch.full((config.d_sae,), config.kappa)
        self._add_edges("up", w, config.kappa > 0 or config.l2 > 0 or config.kl > 0)
        self._add_edges("down", siblings.rsqrt(), config.no_dec_skip or config.rho > 0 or config.swap > 0)
        self._add_edges("kappa", kappa, config.kappa > 0)
        if config.sum_init or config.no_dec_skip:
            self._sum_init(torch.Generator().manual_seed(seed + 1))

    def groups(self) -> dict[str, slice]:
        return dict(zip(("top", "mid", "leaf"), self.forest.spans, strict=True))

    def links(self) -> dict[tuple[str, str], Tensor | None]:
        weights, names = self.edge_weights(), list(self.groups())
        levels = (MID, LEAF)
        return {(names[i - 1], names[i]): self.forest.as_matrix(weights[self.forest.spans[i]], i) for i in levels}

    def _add_edges(self, name: str, start: Tensor, used: bool) -> None:
        self.register_parameter(name, nn.Parameter(start.expm1().log()) if used else None)  # softplus gives start

    @torch.no_grad()
    def _sum_init(self, generator: torch.Generator) -> None:
        for level in (MID, TOP):
            rows = self.forest.gathered(self.W_dec[self.forest.spans[level + 1]].t(), level).t()
            noise = torch.randn(rows.shape, generator=generator) / math.sqrt(self.d_in)
            rows = rows / rows.norm(dim=-1, keepdim=True) + INIT_NOISE * noise
            self.W_dec[self.forest.spans[level]] = rows / rows.norm(dim=-1, keepdim=True)
        self.write_rows()
        self.W_enc.copy_(self.W_dec.t())

    # ---- the tree ------------------------------------------------------------------------------------------

    def direct_encoder(self) -> Float[Tensor, "D L"]:
        if not self.config.no_enc_skip:
            return self.W_enc
        seen = torch.zeros_like(self.b_enc)
        seen[self.forest.spans[self.order[0]]] = 1.0
        return self.W_enc * seen

    def edge_weights(self) -> Float[Tensor, " L"]:
        """w of each latent's edge to its parent."""
        return torch.ones_like(self.b_enc) if self.up is None else softplus(self.up)

    def aggregate(self, codes: list[Tensor], level: int) -> Float[Tensor, "B T A"]:
        """a of a level from the codes [top, mid, leaf] of the level encoded before it."""
        weights, spans = self.edge_weights(), self.forest.spans
        if self.config.orientation == "bottom_up":
            return self.forest.gathered(codes[level + 1] * weights[spans[level + 1]], level)
        return self.forest.handed_down(codes[level - 1], level) * weights[spans[level]]

    def rows(self) -> Float[Tensor, "L D"]:
        """Decoder rows: with `no_dec_skip` only leaves have their own, and the others follow from them."""
        if not self.config.no_dec_skip or self.down is None:
            return self.W_dec
        spans, down = self.forest.spans, softplus(self.down)
        rows = [self.W_dec[spans[LEAF]]]
        for level in (MID, TOP):
            shares = down[spans[level + 1], None] * rows[0]
            sums = self.forest.gathered(shares.t(), level).t()
            rows.insert(0, sums / sums.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        return torch.cat(rows)

    @torch.no_grad()
    def write_rows(self) -> None:
        """Make W_dec what is decoded with."""
        if self.config.no_dec_skip:
            self.W_dec.copy_(self.rows())

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        self.write_rows()

    # ---- codes ---------------------------------------------------------------------------------------------

    def encoded(self, batch: Batch, clock: Clock | None) -> Levels:
        """Level by level; `clock` None: inference."""
        direct = pre_activations(batch.x, self.W_enc, self.b_enc, self.b_dec)
        raw, u, codes = [direct] * 3, [direct] * 3, [direct] * 3  # every entry is replaced below
        for place, level in enumerate(self.order):
            values = direct[..., self.forest.spans[level]]
            if place > 0:
                values = self._with_aggregate(values, codes, level)
            raw[level] = values
            u[level] = masked(torch.relu(values), batch.valid, batch.n_valid)
            codes[level] = self.sparsity.active(u[level], place, batch.n_valid, clock)
        ordered = [[values[level] for level in self.order] for values in (u, codes)]
        for level, values in zip(
            self.order, self.sparsity.settle(ordered[0], ordered[1], batch.n_valid, clock), strict=True
        ):
            codes[level] = values
        return Levels(raw, u, codes)

    def _with_aggregate(self, values: Tensor, codes: list[Tensor], level: int) -> Tensor:
        span = self.forest.spans[level]
        if self.config.no_enc_skip:
            values = self.b_enc[span].expand_as(values)
        if self.kappa is None and self.config.gate == "soft":
            return values
        aggregate = self.aggregate(codes, level)
        if self.kappa is not None:
            values = values + softplus(self.kappa[span]) * aggregate
        if self.config.gate == "soft":
            return values
        top_down = self.config.orientation == "top_down"
        closed = (aggregate == 0) & (self.parent[span] >= 0) if top_down else aggregate == 0
        return values.masked_fill(closed, 0.0)

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        return torch.cat(self.encoded(batch, None).codes, dim=-1)

    def as_affine(self) -> AffineForm | None:
        if self.kappa is not None or self.config.gate == "hard":
            return None
        threshold = torch.zeros_like(self.b_enc)
        for place, level in enumerate(self.order):
            threshold[self.forest.spans[level]] = self.sparsity.threshold[place]
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return AffineForm(*weights, "jumprelu", threshold=threshold).raw(self.scale)

    # ---- the loss ------------------------------------------------------------------------------------------

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        if self.sparse and steps_with_kept(self.config):
            return kept_pass(self, batch, clock)
        levels, rows = self.encoded(batch, clock), self.rows()
        latents = torch.cat(levels.codes, dim=-1)
        written = self._swapped(levels.codes, clock) if self.config.swap > 0 else latents
        loss, reconstruction = self.nested(batch, written, rows)
        dead = self.dead(clock)
        aux = self.aux_k(batch.x - reconstruction, torch.cat(levels.u, dim=-1), dead, batch.valid, rows)
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        parts = {"reconstruction": loss, "aux": self.config.aux_alpha * aux}
        parts |= agreement(self.config, whole_pairs(self, levels), clock)
        if self.config.rho > 0:
            parts["family"] = self.config.rho * rise(clock) * family_losses(self, levels.codes, rows)
        parts |= self.sparsity.penalty([levels.codes[level] for level in self.order], batch.n_valid, clock)
        return Output(parts, latents, reconstruction, {"dead": dead.float().mean()} | self.sparsity.logged())

    def nested(self, batch: Batch, written: Codes, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of all nested reconstructions, and the last of them."""
        nesting = self.config.nesting
        if not any(nesting[:LEAF]):
            whole = product(written, rows, self.sparse) + self.b_dec
            return reconstruction_loss(batch.x, whole, batch.valid, batch.n_valid), whole
        if isinstance(written, Kept):
            each = list(written.times_by_block(rows, list(self.forest.sizes)).unbind(2))
        else:
            each = [self.written(written[..., span], rows[span]) for span in self.forest.spans]
        losses, whole = [], self.b_dec
        for more, weight in zip(each, nesting, strict=True):
            whole = whole + more
            loss = reconstruction_loss(batch.x, whole, batch.valid, batch.n_valid)
            losses.append(weight / sum(nesting) * loss)
        return torch.stack(losses).sum(), whole

    def shares(self, codes: list[Tensor], level: int) -> Float[Tensor, "B T C"]:
        """v_c f_c of a level's latents."""
        assert self.down is not None
        return softplus(self.down[self.forest.spans[level]]) * codes[level]

    def _swapped(self, codes: list[Tensor], clock: Clock) -> Float[Tensor, "B T L"]:
        """Codes to decode: where a parent is drawn, its code is 0 and its children's are raised by v f."""
        generator = generator_of(self.seed, clock.step, codes[TOP].device)
        written = list(codes)
        for level in (TOP, MID):
            draws = torch.rand(codes[level].shape, generator=generator, device=codes[level].device)
            drawn = ((draws < self.config.swap) & (codes[level] > 0)).to(codes[level].dtype)
            written[level] = written[level] - codes[level] * drawn
            given = self.shares(codes, level + 1) * self.forest.handed_down(drawn, level + 1)
            written[level + 1] = written[level + 1] + given
        return torch.cat(written, dim=-1)

    # ---- in the middle and at the end ------------------------------------------------------------------------

    def landmarks(self, n_steps: int) -> tuple[int, ...]:
        return repair_landmarks(n_steps) if self.config.repair else ()

    @torch.no_grad()
    def revise(self, batches: Batches, clock: Clock) -> dict[str, Tensor]:
        return reset_dead_leaves(self, batches, clock)

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        def rectified() -> Iterator[list[Tensor]]:
            for batch in batches():
                u = self.encoded(batch, None).u
                yield [u[level][batch.valid] for level in self.order]

        return self.sparsity.calibrate(rectified)

    def fold_extra(self, scale: Tensor) -> None:
        self.sparsity.fold(scale)
