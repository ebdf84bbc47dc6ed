"""What tests share: tiny models made on the spot, small stores, a warm server. Nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():  # read when triton is first imported, which other libraries do too
    os.environ.setdefault("TRITON_INTERPRET", "1")

import granary  # noqa: F401, I001  (binds common, harvest and train)
import pytest
import torch

from common.config import build
from common.stopping import Stop
from common.store import Store
from harvest.config import HarvestConfig
from harvest.run import harvest
from tests.tiny import neox
from tests.warm import WarmServer

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small text files of plain words, 1,500 to 4,000 bytes each."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["grain", "barn", "wheat", "of", "the", "rye", "silo", "and", "oats", "mill", "a", "sack"]
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        n = 300 + 10 * number
        chosen = torch.randint(0, len(words), (n,), generator=generator).tolist()
        (folder / f"{number:02d}.txt").write_text(" ".join(words[i] for i in chosen) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX of 3 layers and 16 dimensions with random weights and no tokenizer (raw bytes are used)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "neox-tiny"
    neox(max_position_embeddings=128).save_pretrained(folder)
    return folder


def harvest_config(model: Path, texts: Path, out: Path, **more: object) -> HarvestConfig:
    """A small harvest: 30,016 tokens in sequences of 64, chunks of 64 sequences."""
    values: dict[str, object] = {
        "model": str(model),
        "layer": (1,),
        "corpus": str(texts),
        "tokens": 30_016,
        "context": 64,
        "chunk_sequences": 64,
        "batch_size": 32,
        "device": "cpu",
        "out": out,
    }
    return build(HarvestConfig, values | more, "test")


@pytest.fixture(scope="session")
def shared_store(tiny_model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that tests only read: 469 sequences of 64 tokens, 8 chunks, 16 dimensions."""
    out = tmp_path_factory.mktemp("stores") / "shared.zarr"
    harvest(harvest_config(tiny_model, texts, out), Stop())
    return out


@pytest.fixture
def store(shared_store: Path) -> Store:
    """The shared store, opened. Copy its folder before changing it."""
    return Store.open(shared_store)


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmServer]:
    """Runs command lines in forked children."""
    with WarmServer() as server:
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: where every process takes whole files, the longest must not begin last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
