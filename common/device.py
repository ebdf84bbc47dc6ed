"""Where to compute."""

from __future__ import annotations

import torch

from common.errors import ConfigError


def resolve_device(device: str) -> torch.device:
    """`auto` is a GPU when there is one. A GPU named by its number is the current one from here on.

    Raises:
        ConfigError: not a device of this machine, or of a kind without float64 (mps), which moments need.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    devices = {"cpu": 1, "cuda": torch.cuda.device_count()}
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")  # no such word
    if (chosen.index or 0) >= devices.get(chosen.type, 0):
        there = f"cpu, cuda:0 to cuda:{devices['cuda'] - 1}" if devices["cuda"] else "cpu"
        raise ConfigError(f"--device {device}: not on this machine. There is: {there}.")
    if chosen.index is not None and chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # Triton launches kernels on the current one, wherever their tensors are
    return chosen
