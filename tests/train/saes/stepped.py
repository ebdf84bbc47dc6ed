"""One training step the plain way and one with the kept codes alone, held against each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.train.saes.test_contract import batch_for, new_sae
from train.data.batch import Batch
from train.saes.base import SAE, Output
from train.saes.kept import Codes, Kept
from train.schedule import Clock

PART = 1e-5  # additions of another order differ by 1e-6 of the whole


@dataclass(frozen=True)
class Stepped:
    """A step's output, and what it left in the SAE."""

    output: Output
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def unlike(sae: SAE) -> None:
    """Vectors and matrices of 0 get entries of which no two are alike.

    Biases are below 0, so that no two codes tie where a level sees no x.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if parameter.dim() == 1 or not parameter.any():
                noise = torch.randn(parameter.shape, generator=generator).abs()
                parameter += noise * (-0.01 if name == "b_enc" else 0.1)


def stepped(
    sae: SAE,
    sparse: bool,
    progress: float = 0.6,
    some_invalid: bool = True,
    dead: float = 0.3,
    tokens: int = 256,
    quiet: bool = False,
) -> Stepped:
    """A step at this share of a run, of an SAE of which a share of the latents is dead; `quiet`: none is active."""
    sae.sparse = sparse
    sae.start(1.0, batch_for(sae, 0).x.mean((0, 1)))
    unlike(sae)
    if quiet:
        sae.b_enc.data -= 100.0
    generator = torch.Generator().manual_seed(4)
    sae.tokens_silent[torch.rand(sae.d_sae, generator=generator) < dead] = 10**9
    batch = batch_for(sae, 3, tokens)
    if some_invalid:
        valid = torch.rand(batch.valid.shape, generator=generator) < 0.7
        batch = Batch.of(batch.x, doc=batch.doc, pos=batch.pos, valid=valid)
    output = sae.training_pass(batch, Clock(round(100 * progress), 100, tokens))
    output.total.backward()
    gradients = {name: weight.grad for name, weight in sae.named_parameters() if weight.grad is not None}
    return Stepped(output, gradients, dict(sae.named_buffers()))


def whole(codes: Codes) -> Tensor:
    return codes.dense() if isinstance(codes, Kept) else codes


def check_alike(variant: str, options: dict[str, object], **circumstances: object) -> tuple[Stepped, Stepped]:
    """The plain step and the one with kept codes, which give the same losses, gradients, codes and buffers."""
    plain, kept = (stepped(new_sae(variant, **options), sparse, **circumstances) for sparse in (False, True))  # type: ignore[arg-type]
    assert list(kept.output.parts) == list(plain.output.parts)
    assert kept.output.extra.keys() == plain.output.extra.keys()
    assert kept.gradients.keys() == plain.gradients.keys()
    for mine, theirs in (
        (kept.output.parts, plain.output.parts),
        (kept.output.extra, plain.output.extra),
        (kept.gradients, plain.gradients),
        (kept.buffers, plain.buffers),
        ({"codes": whole(kept.output.latents)}, {"codes": plain.output.latents}),
        ({"reconstruction": kept.output.reconstruction}, {"reconstruction": plain.output.reconstruction}),
    ):
        for name, expected in theirs.items():
            value = whole(mine[name]).detach().float()
            assert torch.isfinite(value).all() or not torch.isfinite(expected).all(), name
            difference = torch.nan_to_num(value - expected.detach().float(), 0.0)
            assert difference.norm() <= PART * torch.nan_to_num(expected.detach().float(), 0.0, 0.0).norm(), name
    return plain, kept
