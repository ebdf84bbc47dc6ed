"""What several variants share, as functions. B batch, T window, D d_model, L latents; losses per spec §0."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from train.collective import (
    all_min,
    all_sum,
    among_largest,
    among_largest_latents,
    latents_over_ranks,
    over_latents,
    over_ranks,
)
from train.saes.kept import Codes, Kept

WEISZFELD_STEPS = 100
WEISZFELD_TOLERANCE = 1e-5


def side_by_side(sizes: Sequence[int]) -> list[slice]:
    """Where groups of these sizes lie among the latents."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def generator_of(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers that depend on nothing but the seed and the step, so that a resumed run draws the same."""
    # hashed: on the CPU torch takes 32 bits of a seed
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {step}".encode()))


def pre_activations(
    x: Float[Tensor, "B T D"],
    W_enc: Float[Tensor, "D L"],
    b_enc: Float[Tensor, " L"],
    b_dec: Float[Tensor, " D"],
) -> Float[Tensor, "B T L"]:
    """(x − b_dec) W_enc + b_enc in float32, with the gradient for b_dec taken through the batch's sum.

    Autograd would multiply [B·T, L] by [L, D] only to sum the result over tokens: a sixth of a dense step's work.
    """
    centred = (x - b_dec).detach()
    through_b_dec = (b_dec - b_dec.detach()) @ W_enc.detach()  # zero; carries the gradient −(Σ du) W_encᵀ
    return (centred @ W_enc).float() + (b_enc - through_b_dec)


def relu_gain(d_in: int, d_sae: int) -> float:
    """Factor on W_enc = W_decᵀ at the start of variants that keep all positive latents.

    Half of them are active then, and random unit rows add up to d_sae / (2 d_in) times the input.
    """
    return min(2 * d_in / d_sae, 1.0)


def masked(values: Shaped[Tensor, "B T A"], valid: Bool[Tensor, "B T"], n_valid: int) -> Shaped[Tensor, "B T A"]:
    """`values` with invalid positions set to 0; untouched where the host knows that all are valid."""
    return values if n_valid == over_ranks(valid.numel()) else values * valid[..., None]


def reconstruction_loss(
    x: Float[Tensor, "B T D"], reconstruction: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"], n_valid: int
) -> Float[Tensor, ""]:
    """⟨‖x − x̂‖²⟩: summed over dimensions, averaged over valid tokens. Never the mean over dimensions (spec §3)."""
    errors = masked((x - reconstruction).float(), valid, n_valid)
    return all_sum(errors.square().sum()) / n_valid


def top_k(u: Float[Tensor, "B T L"], k: int) -> Float[Tensor, "B T L"]:
    """`u` with all but the k largest of each token set to 0."""
    values, indices = torch.topk(u, min(k, u.shape[-1]), dim=-1, sorted=False)
    taken = among_largest_latents(values, k)
    return torch.zeros_like(u).scatter(-1, indices, values if taken is None else values * taken)


def batch_top_k(u: Float[Tensor, "B T L"], n_kept: int) -> Float[Tensor, "B T L"]:
    """`u` with all but the `n_kept` largest entries of the whole batch set to 0."""
    flat = u.flatten()
    values, indices = torch.topk(flat, min(n_kept, len(flat)), sorted=False)
    taken = among_largest(values, n_kept)
    values = values if taken is None else values * taken
    return torch.zeros_like(flat).scatter(0, indices, values).view_as(u)


def annealed_k(k: int, d_in: int, share: float, progress: float) -> float:
    """k of a step: from d_in / 4 down to `k`, linearly over the first `share` of the run."""
    if progress >= share:
        return float(k)
    return k + max(d_in / 4 - k, 0.0) * (1 - progress / share)


def aux_k_loss(
    residual: Float[Tensor, "B T D"],
    u: Float[Tensor, "B T L"],
    dead: Bool[Tensor, " L"],
    W_dec: Float[Tensor, "L D"],
    valid: Bool[Tensor, "B T"],
    among: Int[Tensor, " C"] | None = None,
) -> Float[Tensor, ""]:
    """AuxK (2406.04093 §A.2, normalised by the residual's variance): dead latents reconstruct what is left over.

    ê from the top min(D/2, #dead) dead pre-activations; ⟨‖e − ê‖²⟩ / ⟨‖e − ē‖²⟩, and 0 when no latent is dead.

    Args:
        among: latents that all of the dead are among, where the host knows some: only these are looked at.
    """
    among = listed(dead) if among is None else among
    if among is not None:
        if not len(among):
            return residual.new_zeros(())
        u, dead, W_dec = u.index_select(-1, among), dead[among], W_dec.index_select(0, among)
    n_latents = latents_over_ranks(u.shape[-1])
    k = min(residual.shape[-1] // 2, n_latents)
    values, indices = torch.topk(torch.where(dead, u, -torch.inf), min(k, u.shape[-1]), dim=-1, sorted=False)
    taken = among_largest_latents(values, k)
    counts = torch.isfinite(values) if taken is None else torch.isfinite(values) & taken
    kept = torch.zeros_like(u).scatter(-1, indices, torch.where(counts, values, 0.0))
    estimate = over_latents((kept @ W_dec).float())
    return torch.where(over_latents(dead.sum()) > 0, share_of_spread(residual, estimate, valid), 0.0)


def listed(dead: Bool[Tensor, " L"]) -> Int[Tensor, " C"] | None:
    """The dead, one by one; None on a GPU, which would be waited for, and where ranks have some latents each."""
    alone = dead.device.type == "cpu" and latents_over_ranks(1) == 1
    return dead.nonzero().squeeze(-1) if alone else None


def share_of_spread(
    residual: Float[Tensor, "B T D"], estimate: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """⟨‖e − ê‖²⟩ / ⟨‖e − ē‖²⟩, e without gradient; 0 where e does not vary."""
    target, weight = residual.detach().float(), valid[..., None]
    mean = all_sum((target * weight).sum((0, 1))) / all_sum(valid.sum())
    spread = all_sum(((target - mean).square() * weight).sum())
    # a spread of 0 is kept out of the division: its gradient would be NaN, whatever the `where` after it chooses
    loss = all_sum(((target - estimate).square() * weight).sum()) / torch.where(spread > 0, spread, 1.0)
    return torch.where(spread > 0, loss, 0.0)


@torch.no_grad()
def count_silence_(tokens_silent: Int[Tensor, " L"], latents: Codes, n_valid: int) -> None:
    """Add `n_valid` tokens to the silence of every latent, and reset those that fired."""
    # latents are never below 0: the largest takes half the time of any() over a comparison
    fired = latents.fired() if isinstance(latents, Kept) else latents.flatten(0, -2).amax(0)
    tokens_silent += n_valid
    tokens_silent.masked_fill_(all_sum(fired) > 0, 0)


@torch.no_grad()
def update_average_(average: Float[Tensor, ""], value: Float[Tensor, ""], beta: float, first: bool) -> None:
    """Exponential moving average in float32; a value that is not finite leaves it.

    The value itself where it is the `first`, or where nothing was noted yet: the average is not finite then.
    """
    moved = value if first else torch.where(torch.isfinite(average), beta * average + (1 - beta) * value, value)
    average.copy_(torch.where(torch.isfinite(value), moved, average))


@torch.no_grad()
def smallest_kept(latents: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The smallest positive latent of a batch, +inf if there is none."""
    if not latents.numel():
        return all_min(latents.new_full((), torch.inf))
    return all_min(torch.where(latents > 0, latents, torch.inf).min())


@torch.no_grad()
def threshold_for(batches: Iterable[Float[Tensor, "_ L"]], k: float) -> float:
    """θ such that ReLU pre-activations above it number `k` per token over all of `batches`.

    Halfway between the (k·N)-th largest of all values and the next one. Of each batch only twice the expected
    number of largest ones is kept.
    """
    tokens, largest = 0, []
    for u in batches:
        tokens += len(u)
        largest.append(torch.topk(u.flatten(), min(int(2 * k * len(u)) + 1, u.numel()), sorted=False).values)
    values = torch.cat(largest)
    n_kept = min(max(round(k * tokens), 1), len(values) - 1)
    ordered = torch.topk(values, n_kept + 1).values
    return float((ordered[n_kept - 1] + ordered[n_kept]) / 2)


@torch.no_grad()
def geometric_median(x: Float[Tensor, "N D"]) -> Float[Tensor, " D"]:
    """The point with the least mean distance to the rows (Weiszfeld), from the mean."""
    x = x.float()
    point = x.mean(0)
    for _ in range(WEISZFELD_STEPS):
        weight = 1 / (x - point).norm(dim=-1).clamp_min(1e-12)
        moved: Tensor = (x * weight[:, None]).sum(0) / weight.sum()
        if (moved - point).norm() <= WEISZFELD_TOLERANCE * moved.norm().clamp_min(1e-12):
            return moved
        point = moved
    return point
