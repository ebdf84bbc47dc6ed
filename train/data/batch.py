"""What every variant is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Windows of activations with their context; flat variants have a window of 1.

    Attributes:
        x: activations in raw units [batch, window, d_model], storage type.
        doc: document of each position, int32 [batch, window].
        pos: position inside the document's part of its sequence, int32 [batch, window].
        token: token ids, int32 [batch, window].
        valid: positions that count, bool [batch, window]; all true when window is 1.
        n_valid: how many there are, known on the host.
    """

    x: torch.Tensor
    doc: torch.Tensor
    pos: torch.Tensor
    token: torch.Tensor
    valid: torch.Tensor
    n_valid: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in ("x", "doc", "pos", "token", "valid")}
        return Batch(**tensors, n_valid=self.n_valid)

    @classmethod
    def join(cls, parts: list[Batch]) -> Batch:
        """One batch out of several, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            x=torch.cat([part.x for part in parts]),
            doc=torch.cat([part.doc for part in parts]),
            pos=torch.cat([part.pos for part in parts]),
            token=torch.cat([part.token for part in parts]),
            valid=torch.cat([part.valid for part in parts]),
            n_valid=sum(part.n_valid for part in parts),
        )
