"""Multi-scale: groups of latents that see the past through causal convolutions of their own dilation (spec §8).

    y^δ_t = h_t + Σ_j ω^δ_j ⊙ h_{t−jδ}      h = x − b_dec, j = 1 … kernel − 1, ω = 0 at the start
    u^δ = ReLU(y^δ W_enc^δ + b^δ)           f = the k·N largest of all u, or of each group its equal share
    x̂ = f W_dec + b_dec                     L = ⟨‖x − x̂‖²⟩ + α·AuxK + λ_s·L_s + λ_sep·L_sep
    L_s = mean over all δ but the smallest of ⟨‖x̄^δ − b_dec − Σ_{δ'≥δ} f^δ' W_dec^δ'‖²⟩
    L_sep = mean_i max_{j in other groups} c_ij² + ½ mean_i max_{j≠i in its own} c_ij²      c = max(0, cos(d_i, d_j))

x̄^δ_t is the mean of x_t, x_{t−δ}, … as far as the kernel reaches: slow groups make up the slow part, faster ones add
what is missing. Places before the window, in another document or invalid are 0 in y and left out of x̄. Nothing in
the reconstruction of x_t alone asks for the past, so without λ_s ω stays small. Latents lie fastest group first.

With `token_weights` y^δ has ω^δ_0 ⊙ h_t in place of h_t, ω_0 = 1 at the start.

With `causal` off, an ablation, taps look ahead and back by turns, t − δ, t + δ, t − 2δ, …, in y and in x̄: such latents
know what comes, and a cross-entropy of the next token with them means nothing.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, Output
from train.saes.grouped import chooses_places
from train.saes.kept import Codes, Kept, product
from train.saes.multiscale_config import MultiScaleConfig
from train.saes.multiscale_step import coded_plain, coded_sparse
from train.saes.parts import count_silence_, generator_of, pre_activations, reconstruction_loss, side_by_side
from train.saes.separation import correlation, energies_of, separation
from train.saes.sparsity import Sparsity
from train.saes.taps import Past, lags_of, past_of
from train.schedule import Clock

SEPARATION_EVERY = 4  # steps; the term counts as often as if it were taken at each
SEPARATION_ROWS = 1024  # of each group: its cost is the square of them


@final
class MultiScale(SAE):
    """See the module's formula.

    Attributes:
        sizes: latents of each group, fastest first.
        omega: ω [groups, kernel − 1, d_in], the nearest tap first; absent with no convolution.
        omega_0: ω_0 [groups, d_in], with `token_weights`.
        mixture: logits of each latent's mixture of dilations [groups, d_sae], for `convolution` = mixture.
    """

    variant = "multiscale"
    sees_past = True
    Config = MultiScaleConfig
    config: MultiScaleConfig
    omega_0: Tensor | None
    plain = {"convolution": "none", "sparsity": "joint", "lambda_scale": 0.0, "lambda_sep": 0.0}

    def __init__(self, config: MultiScaleConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        n = len(config.dilations)
        self.seed = seed
        self.sizes = [config.d_sae // n + (number < config.d_sae % n) for number in range(n)]
        if config.convolution != "none":
            self.omega = nn.Parameter(torch.zeros(n, config.kernel - 1, d_in))
        self.register_parameter("omega_0", nn.Parameter(torch.ones(n, d_in)) if config.token_weights else None)
        if config.convolution == "mixture":
            self.mixture = nn.Parameter(torch.zeros(n, config.d_sae))
        mode: Literal["l1", "budgets"] = "l1" if config.sparsity == "l1" else "budgets"
        self.budgets = self.sizes if config.sparsity == "budgets" else [config.d_sae]
        shares = [1 / len(self.budgets)] * len(self.budgets)
        self.sparsity = Sparsity(
            self.budgets, config.k, d_in, mode, shares=shares, k_anneal=config.k_anneal, l1=config.l1
        )

    def groups(self) -> dict[str, slice]:
        return dict(zip((f"dilation {name}" for name in self.scale_names()), side_by_side(self.sizes), strict=True))

    def scale_names(self) -> list[str]:
        """The dilations, those that stand several times numbered: 4, 4-2, 4-3."""
        dilations = self.config.dilations
        times = [dilations[: place + 1].count(dilation) for place, dilation in enumerate(dilations)]
        return [f"{dilation}-{n}" if n > 1 else str(dilation) for dilation, n in zip(dilations, times, strict=True)]

    @property
    def sees_future(self) -> bool:
        return not self.config.causal and self.config.convolution != "none"

    def lags(self, dilation: int) -> list[int]:
        """How far the taps of a dilation look back, the nearest first; below 0: ahead."""
        return lags_of(dilation, self.config.kernel, self.config.causal)

    def past(self, batch: Batch) -> Past:
        """Of each lag in use, 0 too: h that many places before each token (0 where there is none), whether one is."""
        lags = [lag for dilation in self.config.dilations for lag in self.lags(dilation)]
        return past_of(batch.x - self.b_dec, batch, lags)

    def context(self, past: Past) -> list[Float[Tensor, "B T D"]]:
        """What each scale adds to h: y − h."""
        h = past[0][0]
        seen = [
            torch.stack([weight * past[lag][0] for weight, lag in zip(taps, self.lags(dilation), strict=True)]).sum(0)
            for taps, dilation in zip(self.omega, self.config.dilations, strict=True)
        ]
        if self.omega_0 is not None:
            seen = [values + (weight - 1) * h for values, weight in zip(seen, self.omega_0, strict=True)]
        return seen

    def pre_activations(self, batch: Batch, past: Past | None = None) -> Float[Tensor, "B T L"]:
        """ReLU(y W_enc + b_enc); `past` if it is known already."""
        if self.config.convolution == "none":
            return torch.relu(pre_activations(batch.x, self.W_enc, self.b_enc, self.b_dec))
        past = self.past(batch) if past is None else past
        h, seen = past[0][0], self.context(past)
        if self.config.convolution == "mixture":
            u = (h @ self.W_enc).float()
            for values, share in zip(seen, self.mixture.softmax(0), strict=True):
                u = u + (values @ (self.W_enc * share)).float()
        else:
            columns = self.W_enc.split(self.sizes, dim=1)
            u = torch.cat([((h + values) @ W).float() for values, W in zip(seen, columns, strict=True)], dim=-1)
        return torch.relu(u + self.b_enc)

    def direct_encoder(self) -> Float[Tensor, "D L"]:
        if self.omega_0 is None:
            return self.W_enc
        if self.config.convolution == "mixture":
            return self.W_enc * (self.omega_0.t() @ self.mixture.softmax(0))
        sizes = torch.tensor(self.sizes, device=self.W_enc.device)
        return self.W_enc * self.omega_0.t().repeat_interleave(sizes, dim=1)

    def active(self, u: Float[Tensor, "B T L"], n_valid: int, clock: Clock | None) -> list[Float[Tensor, "B T _"]]:
        """The codes of each budget."""
        parts = u.split(self.budgets, dim=-1)
        return [self.sparsity.active(part, number, n_valid, clock) for number, part in enumerate(parts)]

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        return torch.cat(self.active(self.pre_activations(batch), batch.n_valid, None), dim=-1)

    def as_affine(self) -> AffineForm:
        read = "what the encoder reads from the past" + " and from the future" * self.sees_future
        lost = "" if self.config.convolution == "none" else read
        weights = (self.direct_encoder(), self.b_enc, self.W_dec, self.b_dec)
        return AffineForm(*weights, "jumprelu", threshold=self.sparsity.per_latent(), lost=lost).raw(self.scale)

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        config = self.config
        targets = config.lambda_scale > 0 and len(self.sizes) > 1
        past = self.past(batch) if targets or config.convolution != "none" else {}
        dead = self.dead(clock)
        coded = (coded_sparse if self.keeps_few else coded_plain)(self, batch, past, dead, clock)
        latents, parts = coded.latents, {}
        if targets:
            reconstruction, parts["scale"] = self.scale_targets(batch, latents, past)
        else:
            reconstruction = product(latents, self.W_dec, self.sparse) + self.b_dec
        aux = coded.aux_k(batch.x - reconstruction)
        parts["reconstruction"] = reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid)
        parts["aux"] = config.aux_alpha * aux
        if config.lambda_sep > 0 and clock.step % SEPARATION_EVERY == 0:
            parts["separation"] = SEPARATION_EVERY * config.lambda_sep * separation(self.sampled_rows(clock.step))
        if config.lambda_decorrelation > 0:
            energies = energies_of(latents, self.sizes)
            parts["decorrelation"] = config.lambda_decorrelation * correlation(energies, batch.valid, batch.n_valid)
        count_silence_(self.tokens_silent, latents, batch.n_valid)
        extra = {"dead": dead.float().mean()} | self.sparsity.logged()
        return Output(parts | dict(coded.penalty), latents, reconstruction, extra)

    @property
    def keeps_few(self) -> bool:
        """Whether a step does with the kept codes alone from selection on: a mixture has an encoder per dilation."""
        return self.sparse and chooses_places(self.sparsity) and self.config.convolution != "mixture"

    def scale_targets(
        self, batch: Batch, latents: Codes, past: Past
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, ""]]:
        """x̂, put together from the slowest group to the fastest, and λ_s·L_s of the sums on the way."""
        made = self.written_by_group(latents)
        so_far, losses = torch.zeros_like(batch.x), []
        for number in reversed(range(len(made))):
            so_far = so_far + made[number]
            if number == 0:
                break  # the last sum is x̂, whose target is x itself
            seen = [past[lag] for lag in (0, *self.lags(self.config.dilations[number]))]
            mean = torch.stack([values for values, _ in seen]).sum(0) / torch.stack([there for _, there in seen]).sum(0)
            losses.append(reconstruction_loss(mean, so_far, batch.valid, batch.n_valid))
        return so_far + self.b_dec, self.config.lambda_scale * torch.stack(losses).mean()

    def written_by_group(self, latents: Codes) -> list[Float[Tensor, "B T D"]]:
        """What each group writes."""
        if isinstance(latents, Kept):
            return list(latents.times_by_block(self.W_dec, self.sizes).unbind(2))
        groups = zip(latents.split(self.sizes, dim=-1), self.W_dec.split(self.sizes), strict=True)
        return [self.written(codes, rows) for codes, rows in groups]

    def sampled_rows(self, step: int) -> list[Float[Tensor, "_ D"]]:
        """Decoder rows of a step, at most `SEPARATION_ROWS` of each group, group by group."""
        device = self.W_dec.device  # drawn there: a copy would wait for it
        generator = generator_of(self.seed, step, device)
        first, chosen = 0, []
        for size in self.sizes:
            chosen.append(torch.randperm(size, generator=generator, device=device)[:SEPARATION_ROWS] + first)
            first += size
        return list(self.W_dec[torch.cat(chosen)].split([len(rows) for rows in chosen]))

    @torch.no_grad()
    def inner_figures(self) -> dict[str, Tensor]:
        """Of each dilation's ω: mean, standard deviation, and ‖ω‖ / √d, how far it is from no past; ‖ω_0 − 1‖ / √d."""
        if self.config.convolution == "none":
            return {}
        figures = {}
        for number, (name, taps) in enumerate(zip(self.scale_names(), self.omega, strict=True)):
            figures[f"omega_mean_{name}"] = taps.mean()
            figures[f"omega_std_{name}"] = taps.std(correction=0)
            figures[f"omega_distance_{name}"] = taps.norm() / self.d_in**0.5
            if self.omega_0 is not None:
                figures[f"omega_token_{name}"] = (self.omega_0[number] - 1).norm() / self.d_in**0.5
        return figures

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        return self.sparsity.calibrate(
            lambda: (self.pre_activations(b)[b.valid].split(self.budgets, dim=-1) for b in batches())
        )

    def fold_extra(self, scale: Tensor) -> None:
        self.sparsity.fold(scale)
