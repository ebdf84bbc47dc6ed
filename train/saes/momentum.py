"""An encoder that follows the trained one slowly, so that keys of many steps are comparable (He et al. 1911.05722)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SlowEncoder(nn.Module):
    """Weights θ' ← m·θ' + (1 − m)·θ, θ those of some latents of an SAE; they end with training.

    Attributes:
        W_enc [D, H], b_enc [H], b_dec [D]: θ', scaled units, no parameters.
    """

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor

    def __init__(self, weights: dict[str, Tensor], momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        for name in ("W_enc", "b_enc", "b_dec"):
            self.register_buffer(name, weights[name].detach().clone())

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "K D"]) -> Float[Tensor, "K H"]:
        """Rectified pre-activations of some tokens."""
        return torch.relu(((x - self.b_dec) @ self.W_enc).float() + self.b_enc)

    @torch.no_grad()
    def follow_(self, weights: dict[str, Tensor], rate: float | None = None) -> None:
        """Go towards `weights` by 1 − m, or by `rate`."""
        for name, value in weights.items():
            self.get_buffer(name).lerp_(value, 1 - self.momentum if rate is None else rate)

    def end(self) -> None:
        """Let go of the weights: a trained SAE has none."""
        for name in ("W_enc", "b_enc", "b_dec"):
            setattr(self, name, self.get_buffer(name)[:0])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        take_sizes(self, ("W_enc", "b_enc", "b_dec"), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def take_sizes(module: nn.Module, names: tuple[str, ...], state_dict: dict[str, Tensor], prefix: str) -> None:
    """Give buffers the shapes in which they are to be loaded: what only training needs is empty afterwards."""
    for name in names:
        own, loaded = module.get_buffer(name), state_dict.get(prefix + name)
        if loaded is not None and loaded.shape != own.shape:
            setattr(module, name, own.new_zeros(loaded.shape))
