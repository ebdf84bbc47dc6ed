"""What every variant is trained on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

DOC, POS, TOKEN = range(3)


@dataclass(frozen=True)
class Batch:
    """Windows of activations with their context; flat variants have a window of 1.

    Attributes:
        x: activations in raw units [batch, window, d_model], storage type.
        valid: positions that count, bool [batch, window]; all true when window is 1.
        n_valid: how many there are, known on the host.
        read_context: gives int32 [batch, window, 3]; called once, and only if somebody looks at doc, pos or token: flat
            variants never do, and reading it would be a sixth of the work of a batch.
    """

    x: torch.Tensor
    valid: torch.Tensor
    n_valid: int
    read_context: Callable[[], torch.Tensor]

    @functools.cached_property
    def context(self) -> torch.Tensor:
        """Document, position and token of each place, int32 [batch, window, 3]."""
        return self.read_context()

    @property
    def doc(self) -> torch.Tensor:
        """Document of each position, int32 [batch, window]."""
        return self.context[..., DOC]

    @property
    def pos(self) -> torch.Tensor:
        """Position inside the document's part of its sequence, int32 [batch, window], from 0; -1 where unknown."""
        return self.context[..., POS]

    @property
    def token(self) -> torch.Tensor:
        """Token ids, int32 [batch, window]."""
        return self.context[..., TOKEN]

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        doc: torch.Tensor | None = None,
        pos: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
    ) -> Batch:
        """A batch of windows [batch, window, d_model] from elsewhere.

        Without `doc` each window is one document; without `pos` places in the document are unknown (-1); token ids
        are unknown.
        """
        shape = x.shape[:2]
        unknown = torch.full(shape, -1, dtype=torch.int32, device=x.device)
        rows = torch.arange(shape[0], dtype=torch.int32, device=x.device)[:, None].expand(shape)
        document = rows if doc is None else doc
        mask = torch.ones(shape, dtype=torch.bool, device=x.device) if valid is None else valid
        context = (document, unknown if pos is None else pos, unknown)
        return cls(x, mask, int(mask.sum()), lambda: torch.stack(context, dim=-1))

    def with_x(self, x: torch.Tensor) -> Batch:
        """The same places with other values [batch, window, …]."""
        return Batch(x, self.valid, self.n_valid, lambda: self.context)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(self.x.to(device), self.valid.to(device), self.n_valid, lambda: self.context.to(device))

    @classmethod
    def join(cls, parts: list[Batch]) -> Batch:
        """One batch out of several, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            x=torch.cat([part.x for part in parts]),
            valid=torch.cat([part.valid for part in parts]),
            n_valid=sum(part.n_valid for part in parts),
            read_context=lambda: torch.cat([part.context for part in parts]),
        )
