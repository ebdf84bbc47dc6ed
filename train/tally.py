"""What a learner's steps come to: sums until the next metrics line, and what its monitors look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.collective import all_latents, all_sums, before_this_rank, over_latents, over_ranks
from train.data.batch import Batch
from train.saes.base import SAE, Output
from train.saes.kept import Codes, Kept
from train.saes.parts import masked
from train.sums import Sums, dense_share, explained_variance

JUDGED_STEPS = 10  # explained variance of fewer steps than this ends nobody
CARRIED = ("steps", "tokens", "x", "x2", "error2")
SAMPLE_EVERY, SAMPLE_TOKENS = 4, 256  # looked at latent by latent: all tokens of every step would cost 2 to 5 % of it


@dataclass(frozen=True)
class Counted:
    """Of a step what is still to be counted by the host, once it knows that the step was taken.

    Attributes:
        codes: all of the step [batch, window, latents]; None where those above 0 are counted already:
        fired: on how many tokens each latent is above 0 [latents]; None where that is not known.
        names: the sums that were added to.
    """

    codes: Tensor | None
    fired: Tensor | None
    names: tuple[str, ...]


class Tally:
    """
    Attributes:
        sums: since the last metrics line.
        last_loss: the last finite total loss, a scalar on the device; NaN before the first step.
        quiet_steps: [2] on the device: steps with L0 below 1 in a row until now, and at most so far.
        judged_ev: explained variance over at least `JUDGED_STEPS` steps, from `read`; None if there is none.
    """

    def __init__(self, sae: SAE, device: torch.device) -> None:
        self.sae, self.device = sae, device
        self.sums = Sums()
        self.last_loss = torch.full((), torch.nan, device=device, dtype=torch.float64)
        self.quiet_steps = torch.zeros(2, device=device, dtype=torch.int64)
        self.judged_ev: float | None = None

    # ---- in a step -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, batch: Batch, output: Output, total: Tensor, norm: Tensor) -> Counted:
        """Add a step, x in scaled units; the part that is the device's alone."""
        x = masked(batch.x, batch.valid, batch.n_valid)
        errors = masked(batch.x - output.reconstruction, batch.valid, batch.n_valid)
        codes = output.latents
        fired = codes.fired() if isinstance(codes, Kept) else None
        own = {"x": x.sum((0, 1)), "x2": x.square().sum(), "error2": errors.square().sum()}
        found = all_sums(own | self._active(codes, fired, batch)) | {"loss": total, "grad_norm": norm}
        found |= {f"part/{name}": part for name, part in output.parts.items()}
        found |= {f"extra/{name}": value for name, value in output.extra.items()}
        for name, value in found.items():
            self.sums.add(name, value)
        self.sums.largest("grad_norm_max", norm)
        quiet = torch.where(found["l0"] < batch.n_valid, self.quiet_steps[0] + 1, 0)
        self.quiet_steps.copy_(torch.stack([quiet, torch.maximum(quiet, self.quiet_steps[1])]))
        self.last_loss.copy_(torch.where(torch.isfinite(total), total.double(), self.last_loss))
        dense = None if isinstance(codes, Kept) else codes.detach()
        return Counted(dense, fired, (*found, "grad_norm_max"))

    def _active(self, codes: Codes, fired: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """How many codes are above 0, by group as well, and what they add up to."""
        groups = self.sae.groups() or {"": slice(None)}
        if isinstance(codes, Kept):
            assert fired is not None
            found = {"l1": codes.values.sum()}
            counts = {name: fired[place].sum() for name, place in groups.items()}
        else:
            latents = masked(codes, batch.valid, batch.n_valid)
            found = {"l1": over_latents(latents.sum())}
            # a third of the time of a sum over a comparison
            counts = {name: over_latents(torch.count_nonzero(latents[..., place])) for name, place in groups.items()}
        found["l0"] = torch.stack(list(counts.values())).sum()
        return found | {f"group/{name.replace(' ', '_')}": count for name, count in counts.items() if name}

    @torch.no_grad()
    def count(self, step: Counted, batch: Batch, number: int) -> None:
        """Count a step that was taken, or played again, as the `number`-th: on how many tokens each latent is active.

        Of a sample now and then, where that is not known of all.
        """
        self.sums.count(batch.n_valid, step.names)
        if step.fired is not None:
            found = {"firing": step.fired, "sampled": batch.valid.sum()}
        elif number % SAMPLE_EVERY == 0 or "firing" not in self.sums.seen:
            assert step.codes is not None
            found = sampled_firing(step.codes, batch, number)
        else:
            return
        for name, value in all_sums(found).items():
            self.sums.add(name, value)
        self.sums.seen |= found.keys()

    # ---- for metrics ---------------------------------------------------------------------------------------

    def read(self) -> dict[str, Any]:
        """Means over the steps since the last reading; waits for the device, then starts the sums anew.

        Loss parts are in scaled units (unit mean squared input norm); l1 is in raw units.
        """
        sums = self.sums.read()
        steps, tokens = float(sums["steps"]), float(sums["tokens"])
        self._judge(sums)
        metrics: dict[str, Any] = {
            "loss": float(sums["loss"]) / steps,
            "explained_variance": explained_variance(sums),
            "l0": float(sums["l0"]) / tokens,
            "l1": float(sums["l1"]) / tokens / float(self.sae.scale),
            "grad_norm": float(sums["grad_norm"]) / steps,
            "grad_norm_max": float(sums["grad_norm_max"]),
            "dense": dense_share(sums),
        }
        for name, value in sums.items():
            kind, _, rest = name.partition("/")
            if kind in ("part", "extra"):
                metrics[f"loss_{rest}" if kind == "part" else rest] = float(value) / steps
            elif kind == "group":
                metrics[f"l0_{rest}"] = float(value) / tokens
        return metrics | {name: float(value) for name, value in self.sae.inner_figures().items()}

    def _judge(self, sums: dict[str, Tensor]) -> None:
        """Start the sums anew; those that `judged_ev` needs are carried on until they make up `JUDGED_STEPS`."""
        whole = {name: sums[name] + sums.get(f"carried/{name}", 0) for name in CARRIED}
        enough = float(whole["steps"]) >= JUDGED_STEPS
        self.judged_ev = explained_variance(whole) if enough else None
        self.sums.restart()
        if not enough:
            self.sums.keep({f"carried/{name}": value.to(self.device) for name, value in whole.items()})

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All of them on the device, where ranks can send them to each other."""
        own = {"last_loss": self.last_loss, "quiet_steps": self.quiet_steps}
        return {name: value.to(self.device) for name, value in (self.sums.tensors() | own).items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Become what `tensors()` was taken from."""
        sums = {name: value.to(self.device, copy=True) for name, value in tensors.items()}
        self.last_loss, self.quiet_steps = sums.pop("last_loss"), sums.pop("quiet_steps")
        self.sums = Sums(sums)


def sampled_firing(latents: Tensor, batch: Batch, number: int) -> dict[str, Tensor]:
    """On how many tokens of a sample each latent is active: every n-th token, from another one each time."""
    n_tokens = latents.shape[0] * latents.shape[1]
    stride = max(over_ranks(n_tokens) // SAMPLE_TOKENS, 1)
    chosen = slice((number // SAMPLE_EVERY - before_this_rank(n_tokens)) % stride, None, stride)
    valid = batch.valid.flatten()[chosen]
    active = (latents.flatten(0, 1)[chosen] > 0) & valid[:, None]
    return {"firing": all_latents(active.sum(0)), "sampled": valid.sum()}
