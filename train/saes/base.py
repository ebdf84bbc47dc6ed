"""What a variant is: parameters, codes for inference, and a loss for training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from common.config import Count, Settings
from train.data.batch import Batch
from train.saes.affine import AffineForm
from train.saes.idle import Idle
from train.saes.kept import Codes, product
from train.saes.parts import aux_k_loss
from train.saes.sparsity import check_led, check_target
from train.schedule import Clock, dead_after

Batches = Callable[[], Iterable[Batch]]
"""Training batches in scaled units, the same ones at every call."""


class SAEConfig(Settings):
    """Settings that every variant has."""

    model_config = ConfigDict(allow_inf_nan=False)

    d_sae: Count = Field(gt=0, description="Latents; default 8 × d_model.")
    window: Count = Field(
        1, gt=0, description="Tokens of a training window; a longer one shows a flat variant what a temporal one sees."
    )

    def idle(self) -> Iterator[Idle]:
        """Settings without effect as the others stand, which a new learner is not to be given."""
        yield from ()


class KeptConfig(SAEConfig):
    """Settings of the variants that keep k latents."""

    k: Count = Field(32, gt=0, description="Latents kept per token, on average over the batch.")
    aux_alpha: float = Field(
        1 / 32, ge=0, description="Weight of AuxK, which revives dead latents; the TopK paper's value."
    )
    k_anneal: float = Field(
        0.0, ge=0, lt=1, description="Share of the run over which k falls linearly from d_model / 4; 0: k throughout."
    )

    @model_validator(mode="after")
    def _fits(self) -> KeptConfig:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than d_sae = {self.d_sae}")
        return self


class LedConfig(SAEConfig):
    """Settings of the variants whose L1 penalty can be led to an L0."""

    l1: float = Field(ge=0, description="λ, at unit mean squared input norm.")
    target_l0: float | None = Field(None, gt=0, description="Move λ towards this L0; default: λ stays.")

    @model_validator(mode="after")
    def _can_be_led(self) -> LedConfig:
        check_target(self.target_l0, self.d_sae)
        check_led("l1", self.l1, self.target_l0 is not None)
        return self


@dataclass(frozen=True)
class Output:
    """One training pass.

    Attributes:
        parts: the loss as named, already weighted scalars; the total is their sum.
        latents: [batch, window, d_sae], all of them or the kept ones, in scaled units.
        reconstruction: [batch, window, d_model], in scaled units.
        extra: further scalars to log.
    """

    parts: Mapping[str, Float[Tensor, ""]]
    latents: Codes
    reconstruction: Float[Tensor, "B T D"]
    extra: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)

    @property
    def total(self) -> Float[Tensor, ""]:
        """The loss: the sum of its parts, computed here and nowhere else."""
        return torch.stack(list(self.parts.values())).sum()


class SAE(nn.Module, ABC):
    """A sparse autoencoder.

    `encode`, `decode` and `forward` take and give raw activation units. Inside, training sees x·scale, with unit
    mean squared norm; `fold()` moves the scale into the weights for good, where a variant's equations allow it.

    Attributes:
        W_enc [d_in, d_sae], W_dec [d_sae, d_in] (unit rows), b_enc [d_sae], b_dec [d_in].
        tokens_silent: tokens since each latent fired, int64 [d_sae].
        scale: input scale s, a scalar buffer; 1 once folded.
        window: tokens of a training window.
        unit_rows: matrices whose rows training keeps at unit norm.
        lr_scale: factor on the default learning rate; one that is given stays as it is.
        own_rate: parameters with a learning rate of their own; see `rates`.
        foldable: whether the input scale can move into the weights; if not, it is kept and applied.
        plain: options with which the variant is flat BatchTopK, for the tests; None where there are none.
        trained: whether gradient steps make it what it is; a reference has none, and no monitor ends it.
        sees_past: whether the tokens before have a say in a token's latents or reconstruction.
        can_split, can_shard: whether ranks may share the rows of a batch, or the latents: see `collective`.
        sparse: whether a step does with the codes that are not 0 where they are few, and the variant's settings let it
            (docs/performance.md); the trainer says so.
        may_die: the only latents that can be dead in the step to come, from the trainer; None where it does not know.
    """

    variant: ClassVar[str]
    Config: ClassVar[type[SAEConfig]]
    unit_rows: tuple[str, ...] = ("W_dec",)  # a variant may decide it by its settings
    lr_scale: ClassVar[float] = 1.0
    own_rate: ClassVar[tuple[str, ...]] = ()
    foldable: ClassVar[bool] = True
    plain: ClassVar[Mapping[str, Any] | None] = None
    trained: ClassVar[bool] = True
    sees_past: ClassVar[bool] = False
    can_split: ClassVar[bool] = False
    can_shard: ClassVar[bool] = False
    sparse: bool = False
    may_die: Int[Tensor, " C"] | None = None

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    tokens_silent: Tensor
    scale: Tensor

    def __init__(self, config: SAEConfig, d_in: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae, self.window = config, d_in, config.d_sae, config.window
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(config.d_sae, d_in, generator=generator)
        rows /= rows.norm(dim=-1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.t().clone(memory_format=torch.contiguous_format))  # never the same memory
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("tokens_silent", torch.zeros(config.d_sae, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(()))

    # ---- for users: raw units ------------------------------------------------------------------------------

    def encode(self, x: Tensor | Batch) -> Tensor:
        """Latents in raw units: [N, d_in] -> [N, d_sae], N independent rows; [B, T, d_in] -> [B, T, d_sae].

        Rows of a [B, T, d_in] tensor are one document each; a `Batch` says where documents begin.
        """
        batch, shape = self._batch(x)
        return (self.codes(batch.with_x(batch.x * self.scale)) / self.scale).view(*shape, self.d_sae)

    def decode(self, latents: Tensor, batch: Batch | None = None) -> Tensor:
        """Reconstruction in raw units from latents in raw units: [N, d_sae], or [B, T, d_sae] with its `Batch`."""
        windows = latents[:, None] if latents.dim() == 2 else latents
        batch = batch if batch is not None else Batch.of(latents.new_zeros(*windows.shape[:2], 0))
        return (self.reconstruct(windows * self.scale, batch) / self.scale).view(*latents.shape[:-1], self.d_in)

    def forward(self, x: Tensor | Batch) -> Tensor:
        """`decode(encode(x))`."""
        return self.decode(self.encode(x), x if isinstance(x, Batch) else None)

    def _batch(self, x: Tensor | Batch) -> tuple[Batch, torch.Size]:
        values = x.x if isinstance(x, Batch) else x
        if values.dim() not in (2, 3) or values.shape[-1] != self.d_in:
            raise ValueError(f"expected [N, {self.d_in}] or [B, T, {self.d_in}], got {list(values.shape)}")
        values = values.to(self.W_enc.dtype)
        if isinstance(x, Batch):
            return x.with_x(values), values.shape[:-1]
        return Batch.of(values[:, None] if values.dim() == 2 else values), values.shape[:-1]

    @property
    def sees_future(self) -> bool:
        """Whether later tokens have a say in a token's latents: an ablation, with which no cross-entropy is honest."""
        return False

    def groups(self) -> dict[str, slice]:
        """Latents of levels or time scales by name, in the order of the variant's own text; {} for a flat SAE."""
        return {}

    def links(self) -> dict[tuple[str, str], Tensor | None]:
        """Groups that are neighbouring levels, the upper of each pair first and the most general pair first.

        With the weights ≥ 0 [upper latents, lower latents] between them, None where the variant has none; {} where
        groups are no levels.
        """
        return {}

    def direct_encoder(self) -> Float[Tensor, "D L"]:
        """What the token itself is multiplied with, as against its past or other latents."""
        return self.W_enc

    @torch.no_grad()
    def inner_figures(self) -> dict[str, Tensor]:
        """Scalars of the weights as they stand that are worth a place in each metrics line."""
        return {}

    def as_affine(self) -> AffineForm | None:
        """The SAE as other libraries can hold it, raw units; None where latents are no affine map of x, thresholded.

        What a token's neighbours and its position add is left out and told in `lost`.
        """
        return None

    # ---- for the trainer: scaled units ---------------------------------------------------------------------

    @abstractmethod
    def codes(self, batch: Batch) -> Float[Tensor, "B T L"]:
        """Latents as used after training; they depend on nothing but each window."""

    def reconstruct(self, latents: Float[Tensor, "B T L"], batch: Batch) -> Float[Tensor, "B T D"]:
        """x̂ from latents; `batch` says which positions belong together, its x is not looked at."""
        return latents @ self.W_dec + self.b_dec

    def written(self, codes: Float[Tensor, "B T G"], rows: Float[Tensor, "G D"]) -> Float[Tensor, "B T D"]:
        """codes @ rows in a training step, in float32; codes that are 0 were not chosen and pass no gradient."""
        return product(codes, rows, self.sparse)

    @abstractmethod
    def training_pass(self, batch: Batch, clock: Clock) -> Output:
        """Loss parts and codes for one batch; updates the variant's own buffers (averages, counters)."""

    def dead(self, clock: Clock) -> Bool[Tensor, " L"]:
        """Which latents have been silent for long."""
        return self.tokens_silent >= dead_after(clock.n_steps, clock.batch_tokens)

    def host_facts(self, clock: Clock) -> tuple[Hashable, ...] | None:
        """What a step depends on beside tensors that stay where they are: with the same facts it can be played again.

        None where every step has facts of its own, waits for the device, or looks at documents or positions.
        """
        return None

    def maybe(self, dead: Bool[Tensor, " L"]) -> Bool[Tensor, " L"] | None:
        """The dead; None where the host knows that there are none."""
        if self.may_die is not None:
            return dead if len(self.may_die) else None
        return dead if dead.is_cuda or bool(dead.any()) else None  # on a GPU the question would wait for the device

    def aux_k(
        self,
        residual: Float[Tensor, "B T D"],
        u: Float[Tensor, "B T L"],
        dead: Bool[Tensor, " L"],
        valid: Bool[Tensor, "B T"],
        W_dec: Float[Tensor, "L D"] | None = None,
    ) -> Float[Tensor, ""]:
        """AuxK's loss from all pre-activations u of a step, by these decoder rows, or by its own."""
        return aux_k_loss(residual, u, dead, self.W_dec if W_dec is None else W_dec, valid, self.may_die)

    def rates(self, clock: Clock) -> tuple[float, float]:
        """Factors on the learning rate: of all parameters, and beside that one of those in `own_rate`."""
        return 1.0, 1.0

    @torch.no_grad()
    def start(self, scale: float, b_dec: Tensor) -> None:
        """Take the input scale and the starting point of b_dec (scaled units), before step 0."""
        self.scale.fill_(scale)
        self.b_dec.copy_(b_dec)

    def landmarks(self, n_steps: int) -> tuple[int, ...]:
        """Steps before which the variant wants to look at training batches and change itself: see `revise`."""
        return ()

    def revise(self, batches: Batches, clock: Clock) -> dict[str, Tensor]:
        """Change itself at a landmark, a pure function of the weights, the batches and the step.

        All batches are read before anything is changed, since reading may be interrupted.

        Returns:
            parameter name to a mask (broadcastable to it) of entries whose optimizer averages start anew.
        """
        return {}

    @torch.no_grad()  # after_step is a hook: most variants have nothing to do
    def after_step(self, clock: Clock) -> None:
        """Called after every optimizer step, decoder rows already at unit norm."""

    @torch.no_grad()
    def calibrate(self, batches: Batches) -> dict[str, float]:
        """Settle what inference needs on training batches at the end of training; returns what was set."""
        return {}

    @torch.no_grad()
    def fold(self) -> None:
        """Move the input scale into the biases, so that scale = 1 and all units are raw. Encodings stay equal."""
        if not self.foldable:
            return
        self.b_enc.div_(self.scale)
        self.b_dec.div_(self.scale)
        self.fold_extra(self.scale)
        self.scale.fill_(1.0)

    def fold_extra(self, scale: Tensor) -> None:
        """Fold what else a variant keeps in scaled units (thresholds)."""

    def describe(self) -> dict[str, Any]:
        """What `config.json` says of the architecture."""
        return {"variant": self.variant, "d_in": self.d_in, "options": self.config.model_dump(mode="json")}
