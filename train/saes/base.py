"""What a variant is: parameters, codes for inference, and a loss for training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from common.config import Count, Settings
from train.schedule import Clock


class SAEConfig(Settings):
    """Settings that every variant has."""

    model_config = ConfigDict(allow_inf_nan=False)

    d_sae: Count = Field(gt=0, description="Latents; default 8 × d_model.")


@dataclass(frozen=True)
class Output:
    """One training pass.

    Attributes:
        parts: the loss as named, already weighted scalars; the total is their sum.
        latents: [batch, window, d_sae], in scaled units.
        reconstruction: [batch, window, d_model], in scaled units.
        extra: further scalars to log.
    """

    parts: Mapping[str, Float[Tensor, ""]]
    latents: Float[Tensor, "B T L"]
    reconstruction: Float[Tensor, "B T D"]
    extra: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)

    @property
    def total(self) -> Float[Tensor, ""]:
        """The loss: the sum of its parts, computed here and nowhere else."""
        return torch.stack(list(self.parts.values())).sum()


class SAE(nn.Module, ABC):
    """A sparse autoencoder.

    `encode`, `decode` and `forward` take and give raw activation units. Inside, training sees x·scale, with unit
    mean squared norm; `fold()` moves the scale into the weights for good.

    Attributes:
        W_enc [d_in, d_sae], W_dec [d_sae, d_in] (unit rows), b_enc [d_sae], b_dec [d_in].
        scale: input scale s, a scalar buffer; 1 once folded.
        window: tokens that a training window must have; 1 for flat variants.
        unit_rows: whether training keeps decoder rows at unit norm.
    """

    variant: ClassVar[str]
    Config: ClassVar[type[SAEConfig]]
    window: ClassVar[int] = 1
    unit_rows: ClassVar[bool] = True

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    scale: Tensor

    def __init__(self, config: SAEConfig, d_in: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, config.d_sae
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(config.d_sae, d_in, generator=generator)
        rows /= rows.norm(dim=-1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.t().contiguous())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))

    # ---- for users: raw units ------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Latents in raw units: [N, d_in] -> [N, d_sae], N independent rows; [B, T, d_in] -> [B, T, d_sae]."""
        windows = self._windows(x)
        return (self.codes(windows * self.scale) / self.scale).view(*x.shape[:-1], self.d_sae)

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction in raw units from latents in raw units, [..., d_sae] -> [..., d_in]."""
        return latents @ self.W_dec + self.b_dec / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """`decode(encode(x))`."""
        return self.decode(self.encode(x))

    def _windows(self, x: Tensor) -> Tensor:
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_in:
            raise ValueError(f"expected [N, {self.d_in}] or [B, T, {self.d_in}], got {list(x.shape)}")
        x = x.to(self.W_enc.dtype)
        return x[:, None] if x.dim() == 2 else x

    # ---- for the trainer: scaled units ---------------------------------------------------------------------

    @abstractmethod
    def codes(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T L"]:
        """Latents as used after training; they depend on nothing but each window."""

    @abstractmethod
    def training_pass(
        self, x: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"], n_valid: int, clock: Clock
    ) -> Output:
        """Loss parts and codes for one batch; updates the variant's own buffers (averages, counters)."""

    @torch.no_grad()
    def start(self, scale: float, b_dec: Tensor) -> None:
        """Take the input scale and the starting point of b_dec (scaled units), before step 0."""
        self.scale.fill_(scale)
        self.b_dec.copy_(b_dec)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "B T D"]]) -> dict[str, float]:
        """Settle what inference needs on scaled training batches at the end of training; returns what was set."""
        return {}

    @torch.no_grad()
    def fold(self) -> None:
        """Move the input scale into the biases, so that scale = 1 and all units are raw. Encodings stay equal."""
        self.b_enc.div_(self.scale)
        self.b_dec.div_(self.scale)
        self.fold_extra(self.scale)
        self.scale.fill_(1.0)

    def fold_extra(self, scale: Tensor) -> None:
        """Fold what else a variant keeps in scaled units (thresholds)."""

    def describe(self) -> dict[str, Any]:
        """What `config.json` says of the architecture."""
        return {"variant": self.variant, "d_in": self.d_in, "options": self.config.model_dump(mode="json")}
