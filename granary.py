"""Granary: harvest activations once, train many sparse autoencoders.

The public face: what users import, and the two console entry points.

    import granary
    store = granary.open_store("cache/demo.zarr")
    sae = granary.load_sae("runs/demo/batchtopk")

`common`, `harvest` and `train` are names that users have too. Importing this module binds those three names to
the packages that lie beside it, whatever stands earlier on the import path; the path itself is left alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "open_store": "common.store",
    "Store": "common.store",
    "Batches": "train.data.reader",
    "DataConfig": "train.config",
    "load_sae": "train.saes",
    "for_saebench": "train.exchange.saebench",
    "SAE": "train.saes.base",
    "GranaryError": "common.errors",
}
__all__ = [*_PUBLIC, "harvest_main", "train_main"]


def _claim(name: str) -> None:
    folder = Path(__file__).resolve().parent
    known = sys.modules.get(name)
    if known is not None:
        where = getattr(known, "__file__", None)
        if where is None or Path(where).resolve().parent != folder / name:
            raise ImportError(
                f"granary: another package '{name}' was already imported, from {where}. Import granary before it."
            )
        return
    spec = PathFinder.find_spec(name, [str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"granary: its package '{name}' is missing from {folder}. Install it again.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


for _name in ("common", "harvest", "train"):
    _claim(_name)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'granary' has no attribute '{name}'")


def harvest_main() -> None:
    """The `harvest` command."""
    from common.stopping import Stop

    stop = Stop.on_signals()  # before the slow imports, so that a signal while loading is heard
    from common.console import run_command
    from harvest.cli import cli

    run_command(cli, stop)


def train_main() -> None:
    """The `train` command."""
    # huge pages for tensors: a step makes and drops tens to hundreds of MB, and zeroing them page by page takes up to
    # a fifth of it (docs/performance.md). PyTorch reads this at its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from common.stopping import Stop

    stop = Stop.on_signals()
    from common.console import run_command
    from train.cli import cli

    run_command(cli, stop)
