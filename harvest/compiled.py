"""Blocks of the language model compiled by torch.compile, for `harvest run --compile`.

TransformerBridge puts parts of its own, with hooks, around every part of a block, and the compiler breaks off at each:
nine small graphs, with nothing in them to fuse. So they are taken out of the blocks: what is left is the block as
transformers has it, one graph, compiled once for all blocks that are alike. Only hooks at the borders of blocks remain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from common.errors import ConfigError
from common.models import LanguageModel

Backend = str | Callable[..., Any]  # as torch.compile takes it; another one than inductor in tests
TOLERANCE = 0.02  # of the norm: what rounding to bfloat16 leaves; a block that computes something else is far above


def compile_blocks(model: LanguageModel, hooks: Sequence[str], backend: Backend = "inductor") -> None:
    """Have the blocks compiled when they first run; activations at `hooks` stay what they were, but for rounding.

    Raises:
        ConfigError: a hook inside a block, or blocks that are something else without the bridge's parts.
    """
    probe = torch.arange(8, device=model.device)[None] % model.vocabulary
    before = model.capture(probe, hooks)
    for block in model.bridge.blocks:
        take_out_bridges(block.original_component)
    after = model.capture(probe, hooks)
    for hook in hooks:
        if hook not in after:
            raise ConfigError(f"--hook {hook}: inside a block, where --compile leaves no hooks. Leave out --compile.")
        off = torch.linalg.vector_norm((after[hook] - before[hook]).float())
        if not off <= TOLERANCE * torch.linalg.vector_norm(before[hook].float()):
            raise ConfigError(f"--compile: {model.source.name} gives other activations that way. Leave out --compile.")
    for block in model.bridge.blocks:
        inner = block.original_component
        inner.forward = compiled(inner.forward, backend)


def take_out_bridges(module: nn.Module) -> None:
    """Put the parts of a transformers module back where the bridge's stand, and take the hooks off them."""
    module._forward_hooks.clear()  # of transformers, for outputs that nobody asks for; the compiler cannot read them
    for name, part in module.named_children():
        original = getattr(part, "original_component", None)
        if isinstance(original, nn.Module):
            setattr(module, name, original)
        take_out_bridges(getattr(module, name))


def compiled(forward: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    """`forward` compiled anew for each shape, so that what a batch gives does not depend on those before it."""
    from torch._dynamo import exc

    too_many = getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException)  # not before PyTorch 2.7
    options: dict[str, Any] | None = {"deterministic": True} if backend == "inductor" and has_deterministic() else None
    fast = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend, options=options)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fast(*args, **kwargs)
        except (exc.TorchDynamoException, too_many) as error:
            cause = getattr(error, "inner_exception", None) or error.__cause__ or error
            said = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
            raise ConfigError(
                f"--compile: torch.compile fails here ({said}). It needs a C++ compiler such as g++, and blocks that "
                "it can take whole. Leave out --compile, and choose another --out."
            ) from None

    return call


def has_deterministic() -> bool:
    """Whether this PyTorch can be told not to choose by timing, which falls out otherwise from run to run."""
    return "deterministic" in torch._inductor.list_options()
