"""The whole forward pass of a language model, with the activations at one hook replaced on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from common.models import LanguageModel

Replace = Callable[[Tensor], Tensor]
"""New activations [batch, context, d] for those at the hook; heads and their dimensions are laid flat."""


@torch.inference_mode()
def logits_of(model: LanguageModel, tokens: Tensor, hook: str | None = None, replace: Replace | None = None) -> Tensor:
    """Logits [batch, context, vocabulary] of `tokens` [batch, context], in the model's own type.

    With `hook` and `replace`, all that comes after the hook sees `replace(activations)` instead. No BOS is added.

    Raises:
        ConfigError: the hook never fires, so that nothing was replaced.
    """
    return _forward(model, tokens, hook, replace)


@torch.enable_grad()
def gradient_of(
    model: LanguageModel, tokens: Tensor, hook: str, activations: Tensor, figure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A scalar figure of the logits with `activations` [batch, context, d] at the hook, and its gradient in them.

    Raises:
        ConfigError: the hook never fires.
    """
    put = activations.detach().clone().requires_grad_()
    value = figure(_forward(model, tokens, hook, fixed(put)))
    (gradient,) = torch.autograd.grad(value, put)
    return value.detach(), gradient


def _forward(model: LanguageModel, tokens: Tensor, hook: str | None, replace: Replace | None) -> Tensor:
    fired = False

    def put(activations: Tensor, hook: Any) -> Tensor:
        nonlocal fired
        fired = True
        assert replace is not None
        return replace(activations.flatten(2)).to(activations.dtype).view_as(activations)

    hooks = [] if hook is None or replace is None else [(hook, put)]
    logits: Tensor = model.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
    if hooks and not fired:
        raise ConfigError(f"--hook {hook}: it exists in {model.source.name} but never fires in a forward pass.")
    return logits


def fixed(values: Tensor) -> Replace:
    """These activations, whatever the hook has."""
    return lambda _: values


def zeros(activations: Tensor) -> Tensor:
    """Zero ablation: nothing passes the hook, at any position."""
    return torch.zeros_like(activations)
