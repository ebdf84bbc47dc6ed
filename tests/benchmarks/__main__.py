"""`python -m tests.benchmarks [PROGRAM…]`, all of them by default: this machine against its floors and its peers."""

from __future__ import annotations

import os
import platform
import sys

import torch

import granary  # noqa: F401  (binds common, harvest and train)
from common.console import table
from tests.benchmarks import (
    gpu_speed,
    harvest_speed,
    peer_speed,
    read_speed,
    start_speed,
    step_speed,
    stream_speed,
    variant_speed,
)

PROGRAMS = {
    "harvest": harvest_speed.run,
    "read": read_speed.run,
    "step": step_speed.run,
    "start": start_speed.run,
    "variants": variant_speed.run,
    "peers": peer_speed.run,
    "stream": stream_speed.run,
    "gpu": gpu_speed.run,
}


def main() -> None:
    """Run the programs named on the command line, or all of them."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the `train` command does
    chosen = sys.argv[1:] or list(PROGRAMS)
    rows = [row for name in chosen for row in PROGRAMS[name]()]
    title = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians, interleaved"
    drawn = [
        (r.name, r.ours, r.against, round(r.ratio, 3), r.wanted, "yes" if r.ratio >= r.wanted else "NO") for r in rows
    ]
    table(title, ("what", "ours", "floor or peer", "ratio", "wanted", "met"), drawn)


if __name__ == "__main__":
    main()
