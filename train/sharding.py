"""A dictionary spread over ranks: each holds as many neighbouring latents, laid out and gathered by PyTorch's DTensor.

A step's products run on each rank's own part; what all latents have a say in goes over the ranks (`collective`).
Checkpoints hold whole tensors, so that they load with any number of ranks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train.ranks import losing
from train.saes.base import SAE

DIMENSIONS = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "tokens_silent": 0}  # which one runs over latents


class Shards:
    """How the tensors of a dictionary lie on the ranks of `group`."""

    def __init__(self, group: Any, device_type: str) -> None:
        from torch.distributed.device_mesh import DeviceMesh  # not above: DTensor takes half a second to import

        self.mesh = DeviceMesh.from_group(group, device_type)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that belongs to the weight of this name."""
        from torch.distributed.tensor import Shard, distribute_tensor

        if name not in DIMENSIONS or not whole.dim():
            return whole
        whole = whole.detach().to(self.mesh.device_type).contiguous()
        with losing():
            return distribute_tensor(whole, self.mesh, [Shard(DIMENSIONS[name])]).to_local().contiguous()

    def whole(self, name: str, own: Tensor) -> Tensor:
        """The tensor that this rank's part was cut from."""
        from torch.distributed.tensor import DTensor, Shard

        if name not in DIMENSIONS or not own.dim():
            return own
        with losing():
            return DTensor.from_local(own.detach(), self.mesh, [Shard(DIMENSIONS[name])]).full_tensor()

    def shard_(self, sae: SAE) -> None:
        """Let an SAE keep its part of the latents alone."""
        for name, tensor in {**dict(sae.named_parameters()), **dict(sae.named_buffers())}.items():
            if name in DIMENSIONS:
                part = self.cut(name, tensor)
                setattr(sae, name, nn.Parameter(part) if isinstance(tensor, nn.Parameter) else part)
