"""C: a static group of latents beside a temporal one that also reads positions and the past (own proposal, spec §6).

    h = x − b_dec            u = h W_enc + b_enc, and on the temporal group  + g_t·(c_t W_C + (U V)_{·,β(p_t)})
    c_t = windowed linear attention over h:  q = φ(√d·h W_Q), k = φ(√d·h W_K), v = h W_V       see `past`
    g_t = σ(w·[h_t; c_t] + b)          β: 32 buckets of the position p in the document
    f = BatchTopK of ReLU(u), each group with its own budget: k/4 temporal, 3k/4 static
    x̂_t = f_t W_dec + b_dec + σ(γ)·y_t W_O          y_t = windowed linear attention over the codes f alone
    L = ⟨‖x − x̂‖²⟩ + α·AuxK + λ_z·P(z > 0) + λ_g⟨g⟩

The span grows over the run: 4, 8, 16, 32, 64 places from 0, 10, 20, 35 and 50 %. W_C, V and W_O start at 0.
φ and the gate do not scale with x, so the input scale is kept, not folded. With `attention = "softmax"`, an ablation,
both attentions are softmax ones, without φ. With `memory = "lags"` they give way to filters over 16 past places, which
know how far back each lies:

    c_t = Σ_j a_j ⊙ h_{t−j} W_V          y_t = φ(f_t Q_y) ⊙ Σ_j b_j ⊙ f_{t−j} E_y          a_j, b_j start at 1 / j
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.base import SAE, Batches, Output
from train.saes.grouped import columns_of
from train.saes.kept import Codes, product
from train.saes.parts import count_silence_, generator_of, masked, pre_activations, reconstruction_loss
from train.saes.past import feature_map, lagged, masked_attention, prefix_attention, softmax_attention
from train.saes.positions import BUCKETS, hard_concrete, one_of_buckets, open_probability, prune_rows
from train.saes.relational_config import RelationalConfig
from train.saes.relational_step import coded_plain, coded_sparse
from train.saes.relational_terms import Terms
from train.saes.sparsity import Sparsity
from train.saes.stages import stage_of, warmth
from train.schedule import Clock

HEADS, RANK = 4, 16  # of the encoder's attention
MODULATION_RANK = 8  # of the position term
LAGS = 16
CODE_RANK = 16  # of the decoder's attention, one head
PENALTY_FROM = 0.5  # share of the run before the penalty on position gates
OWN_DRAWS = 1_000_003  # added to the seed: temporal weights are drawn apart from the shared ones
ATTENTIONS = {  # what is summed, and φ: softmax takes queries and keys as they are
    "masked": (masked_attention, feature_map),
    "prefix": (prefix_attention, feature_map),
    "softmax": (softmax_attention, Tensor.float),
}


@final
class Relational(SAE):
    """See the module's formula. Temporal latents are the first columns.

    Attributes:
        span: places attention reads now: the last stage trained, which in a finished run is all of them.
    """

    variant = "relational"
    sees_past = True
    Config = RelationalConfig
    config: RelationalConfig
    foldable = False
    plain = {"joint": True, "no_position": True, "no_attention": True, "no_dec_temporal": True}
    own_rate = (
        *("W_Q", "W_K", "W_V", "L_V", "W_C", "W_B", "U", "V", "z", "w_gate", "b_gate"),
        *("E_y", "Q_y", "K_y", "L_y", "W_O", "gamma"),
    )
    span: Tensor

    def __init__(self, config: RelationalConfig, d_in: int, seed: int = 0) -> None:
        super().__init__(config, d_in, seed)
        self.seed = seed
        n = self.n_temporal = max(1, round(config.temporal_share * config.d_sae))
        shares = (config.temporal_share, 1 - config.temporal_share)
        mode: Literal["joint", "budgets"] = "joint" if config.joint or n == config.d_sae else "budgets"
        self.sparsity = Sparsity([n, config.d_sae - n], config.k, d_in, mode, shares=shares, k_anneal=config.k_anneal)
        self.attend, self.features = ATTENTIONS[config.attention]
        self.register_buffer("span", torch.tensor(config.span))
        generator = torch.Generator().manual_seed(seed + OWN_DRAWS)

        def drawn(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(*shape, generator=generator))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape))

        lags = config.memory == "lags"
        falling = 1 / torch.arange(1, LAGS + 1)[:, None]
        if not config.no_attention:
            self.W_V = drawn(d_in, HEADS * RANK, std=d_in**-0.5)
            if config.context_as == "input":
                self.W_B = zeros(HEADS * RANK, d_in)
            else:
                self.W_C = zeros(HEADS * RANK, n)
            if lags:
                self.L_V = nn.Parameter(falling.repeat(1, HEADS * RANK))
            else:
                self.W_Q, self.W_K = (drawn(d_in, HEADS * RANK, std=d_in**-0.5) for _ in range(2))
        if not config.no_position:
            self.U, self.V = drawn(n, MODULATION_RANK, std=0.02), zeros(MODULATION_RANK, BUCKETS)
            if config.position_gate:
                self.z = nn.Parameter(torch.full((n,), 2.0))
        if config.gated:
            self.w_gate, self.b_gate = zeros(d_in + HEADS * RANK), nn.Parameter(torch.tensor(config.gate_bias))
        if not config.no_dec_temporal:
            n_read = self.n_read = n if config.decoder_reads == "temporal" else config.d_sae
            self.E_y = drawn(n_read, config.decoder_rank, std=config.decoder_rank**-0.5)
            self.W_O = zeros(config.decoder_rank, d_in)
            if lags:
                self.Q_y = zeros(n_read, config.decoder_rank)
                self.L_y = nn.Parameter(falling.repeat(1, config.decoder_rank))
            else:
                # codes of a token are about .5 long: with unit normal weights φ tells tokens apart from the start
                self.Q_y, self.K_y = drawn(n_read, CODE_RANK, std=1.0), drawn(n_read, CODE_RANK, std=1.0)
                self.gamma = nn.Parameter(torch.tensor(-2.0))

    def groups(self) -> dict[str, slice]:
        return {"temporal": slice(0, self.n_temporal), "plain": slice(self.n_temporal, self.d_sae)}

    # ---- encoder -------------------------------------------------------------------------------------------

    def context(self, h: Float[Tensor, "B T D"], batch: Batch) -> Float[Tensor, "B T C"]:
        """c: what the past says, 0 without attention."""
        if self.config.no_attention:
            return h.new_zeros(*h.shape[:-1], HEADS * RANK)
        if self.config.memory == "lags":
            return lagged((h @ self.W_V).float(), self.L_V, batch)
        root = math.sqrt(self.d_in)
        q, k = (self.features(root * (h @ weight)).unflatten(-1, (HEADS, RANK)) for weight in (self.W_Q, self.W_K))
        v = (h @ self.W_V).unflatten(-1, (HEADS, RANK))
        return self.attend(q, k, v, batch, self.span).flatten(-2)

    def gated_rows(self, clock: Clock | None) -> Float[Tensor, "G M"]:
        """U, its rows gated where there are gates."""
        if not self.config.position_gate:
            return self.U
        draws = None if clock is None else generator_of(self.seed, clock.step, self.V.device)
        return self.U * hard_concrete(self.z, draws)[:, None]

    def position_rows(self) -> Float[Tensor, "G P"]:
        """U V, what is added to each temporal latent by bucket."""
        return self.gated_rows(None) @ self.V

    def position_factors(
        self, batch: Batch, clock: Clock | None
    ) -> tuple[Float[Tensor, "B T M"], Float[Tensor, "M G"]]:
        """V_{·,β(p)}, 0 where the position is unknown, and Uᵀ, rows gated."""
        return one_of_buckets(batch.pos, self.V) @ self.V.t(), self.gated_rows(clock).t()

    def position_term(self, batch: Batch, clock: Clock | None) -> Float[Tensor, "B T G"]:
        """(U V)_{·,β(p)}, rows gated; 0 where the position is unknown."""
        left, right = self.position_factors(batch, clock)
        return (left @ right).float()

    def terms(self, batch: Batch, clock: Clock | None) -> Terms | None:
        """What is added to the temporal group's pre-activations; None if nothing is."""
        if self.config.no_attention and self.config.no_position:
            return None
        h = masked((batch.x - self.b_dec).float(), batch.valid, batch.n_valid)
        context = self.context(h, batch)
        gate = h.new_ones(*h.shape[:-1], 1)
        if self.config.gated:
            gate = torch.sigmoid((torch.cat([h, context], dim=-1) * self.w_gate).sum(-1, keepdim=True) + self.b_gate)
        factors = {}
        if not self.config.no_attention:
            as_input = self.config.context_as == "input"
            factors["attention"] = context, self.W_B @ self.W_enc[:, : self.n_temporal] if as_input else self.W_C
        if not self.config.no_position:
            factors["position"] = self.position_factors(batch, clock)
        return Terms(gate, factors)

    def pre_activations(self, batch: Batch, added: Mapping[str, Float[Tensor, "B T G"]]) -> tuple[Tensor, Tensor]:
        """Of the temporal and the static group, not yet rectified."""
        u = pre_activations(batch.x, self.W_enc, self.b_enc, self.b_dec)
        temporal, static = u[..., : self.n_temporal], u[..., self.n_temporal :]
        for term in added.values():
            temporal = temporal + term
        return temporal, static

    def groups_of_u(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same for inference."""
        terms = self.terms(batch, None)
        return self.pre_activations(batch, {} if terms is None else terms.dense())

    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        groups = self.groups_of_u(batch)
        kept = [self.sparsity.active(torch.relu(u), i, batch.n_valid, None) for i, u in enumerate(groups)]
        return torch.cat(kept, dim=-1)

    def as_affine(self) -> AffineForm:
        config = self.config
        lost = {
            "what the encoder reads from the past": not config.no_attention,
            "what it reads from the position in the document": not config.no_position,
            "what the decoder reads from past codes": not config.no_dec_temporal,
        }
        words = ", ".join(what for what, there in lost.items() if there)
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return AffineForm(*weights, "jumprelu", threshold=self.sparsity.per_latent(), lost=words).raw(self.scale)

    # ---- decoder -------------------------------------------------------------------------------------------

    def from_past(
        self, latents: Codes, batch: Batch, query: Float[Tensor, "B T L"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """σ(γ)·y W_O: what past codes say of x, asked by each place's own codes, or by `query`."""
        if self.config.no_dec_temporal:
            return self.b_dec.new_zeros(*latents.shape[:-1], self.d_in)
        sources = columns_of(latents, slice(0, self.n_read))
        asking = sources if query is None else query[..., : self.n_read]
        values, asked = product(sources, self.E_y), product(asking, self.Q_y)
        if self.config.memory == "lags":
            return ((feature_map(asked) * lagged(values, self.L_y, batch)) @ self.W_O).float()
        q, k = self.features(asked)[:, :, None], self.features(product(sources, self.K_y))[:, :, None]
        y = self.attend(q, k, values[:, :, None], batch, self.span)[:, :, 0]
        return torch.sigmoid(self.gamma) * (y @ self.W_O).float()

    def reconstruct(self, latents: Float[Tensor, "B T L"], batch: Batch) -> Float[Tensor, "B T D"]:
        return (latents @ self.W_dec).float() + self.b_dec + self.from_past(latents, batch)

    # ---- training ------------------------------------------------------------------------------------------

    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        self.span.fill_(self.span_at(clock))
        dead = self.dead(clock)
        coded = (coded_sparse if self.sparse else coded_plain)(self, batch, dead, clock)
        direct = product(coded.latents, self.W_dec) + self.b_dec
        reconstruction = direct + self.from_past(coded.latents, batch)
        aux = coded.aux_k(batch.x - reconstruction)
        count_silence_(self.tokens_silent, coded.latents, batch.n_valid)
        parts = {
            "reconstruction": reconstruction_loss(batch.x, reconstruction, batch.valid, batch.n_valid),
            "aux": self.config.aux_alpha * aux,
        } | self.penalties(coded.gate, batch, clock)
        extra = {
            "dead": dead.float().mean(),
            "error_without_past": reconstruction_loss(batch.x, direct.detach(), batch.valid, batch.n_valid),
        }
        return Output(parts, coded.latents, reconstruction, extra | dict(coded.measured) | self.sparsity.logged())

    def span_at(self, clock: Clock) -> int:
        """Places attention reads at a step."""
        divisor = 1 if self.config.no_curriculum else stage_of(clock.progress)[1]
        return max(1, self.config.span // divisor)

    def rates(self, clock: Clock) -> tuple[float, float]:
        """Temporal weights begin each new stage at half their rate, whole after 5 % of the run, 500 steps at most."""
        staged = not self.config.no_curriculum and self.config.memory == "attention"
        return 1.0, self.config.temporal_lr * (warmth(clock) if staged else 1.0)

    def penalties(self, gate: Float[Tensor, "B T 1"] | None, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        parts = {}
        if self.config.gate_penalty and gate is not None:
            total = masked(gate, batch.valid, batch.n_valid).sum()
            parts["gate"] = self.config.gate_penalty * total / batch.n_valid
        if self.config.position_gate and not self.config.no_position:
            weight = self.config.position_penalty if clock.progress >= PENALTY_FROM else 0.0
            parts["position_gates"] = weight * open_probability(self.z).mean()
        return parts

    @torch.no_grad()
    def inner_figures(self) -> dict[str, Tensor]:
        """How far attention reads; where position rows are pruned, the share of the temporal latents that have one."""
        figures = {"span": self.span}
        if self.config.prune_positions > 0:
            figures["position_rows"] = self.U.any(-1).float().mean()
        return figures

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        def groups(batch: Batch) -> list[Tensor]:
            return [torch.relu(u[batch.valid]) for u in self.groups_of_u(batch)]

        tolerance = self.config.prune_positions
        pruned = prune_rows(self, batches, tolerance) if tolerance > 0 else {}
        return pruned | self.sparsity.calibrate(lambda: (groups(batch) for batch in batches()))
