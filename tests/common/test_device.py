"""Where to compute."""

from __future__ import annotations

import pytest
import torch

from common.device import resolve_device
from common.errors import ConfigError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine that says it has two GPUs; those that were made the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return current


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_resolve_device_takes_what_is_there(name: str) -> None:
    assert resolve_device(name) == torch.device(name)
    assert resolve_device("auto") == torch.device("cuda")


def test_a_gpu_named_by_its_number_is_the_current_one(two_gpus: list[torch.device]) -> None:
    for name in ("cpu", "cuda", "auto", "cuda:1"):
        resolve_device(name)
    assert two_gpus == [torch.device("cuda:1")]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cuda:2", "cuda:9", "mps", "meta", "warp", "", "cuda:"])
def test_resolve_device_refuses_what_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--device {name}: not on this machine\. There is: cpu, cuda:0 to cuda:1\."):
        resolve_device(name)


def test_resolve_device_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"--device cuda: not on this machine\. There is: cpu\."):
        resolve_device("cuda")
