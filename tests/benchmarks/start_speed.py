"""From the command to the first step, fresh and in the middle of a run, and the memory of a fit on a longer store.

Whole processes, imports included: what a person waits for. Memory is anonymous memory alone (`RssAnon`, its highest
value): pages of the mapped store belong to the kernel and come and go.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.measure import Row
from tests.benchmarks.read_speed import make_store
from tests.warm import ROOT

WANTED_S = 5.0
POOL_TOKENS = 4 * 512 * 128  # four chunks: the small store is one pool, the large one six
STEPS = 120
NEVER = "1000000"


def start(folder: Path, store: Path, out: str, *words: str) -> subprocess.Popen[bytes]:
    """`train fit` on `store`, with a metrics line for every step."""
    command = [sys.executable, "-m", "train", "fit", "--cache", str(store), "--out", out, "--variant", "topk"]
    settings = [
        "--d-sae",
        "128",
        "--k",
        "8",
        "--batch-size",
        "2048",
        "--device",
        "cpu",
        "--pool-tokens",
        str(POOL_TOKENS),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, *settings, "--log-every", "1", *words], cwd=folder, env=environment, stdout=log, stderr=log
        )


def lines_of(metrics: Path) -> list[str]:
    return metrics.read_text().splitlines() if metrics.exists() else []


def seconds_to_first_step(folder: Path, store: Path, out: str) -> float:
    """Wall time from the start of the process to its first step; the process is then stopped, with a checkpoint."""
    metrics = folder / out / "topk" / "metrics.jsonl"
    known = len(lines_of(metrics))
    started = time.perf_counter()
    child = start(folder, store, out, "--steps", str(STEPS), "--checkpoint-every", NEVER)
    while len(lines_of(metrics)) <= known:
        if child.poll() is not None:
            raise RuntimeError(f"train fit left with {child.returncode}: {(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.005)
    seconds = time.perf_counter() - started
    child.send_signal(signal.SIGTERM)
    child.wait()
    return seconds


def peak_anonymous(folder: Path, store: Path, out: str) -> float:
    """The highest `RssAnon` in MB of a fit over one pass."""
    child = start(folder, store, out, "--passes", "1")
    peak = 0
    while child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.02)
    if child.returncode:
        raise RuntimeError(f"train fit left with {child.returncode}: {(folder / 'log').read_text()[-2000:]}")
    return peak / 1000


def run(rounds: int = 3) -> list[Row]:
    fresh, resumed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small, large = (make_store(folder / f"{chunks}.zarr", chunks).path for chunks in (4, 24))
        for number in range(rounds):
            fresh.append(seconds_to_first_step(folder, small, f"run-{number}"))
            resumed.append(seconds_to_first_step(folder, small, f"run-{number}"))
            step = json.loads((folder / f"run-{number}" / "status.json").read_text())["step"]
            if not 1 < step < STEPS:
                raise RuntimeError(f"the run was not stopped in its middle, but at step {step}")
        memory = [peak_anonymous(folder, store, f"memory-{store.stem}") for store in (small, large)]
    a, b = statistics.median(fresh), statistics.median(resumed)
    return [
        Row("train fit to its first step, whole process", f"{a:.2f} s", f"{WANTED_S:g} s", WANTED_S / a, 1.0),
        Row("resume in mid-run to its next step", f"{b:.2f} s", f"{WANTED_S:g} s", WANTED_S / b, 1.0),
        Row("peak anonymous memory, store of 4 chunks / of 24", f"{memory[1]:,.0f} MB", f"{memory[0]:,.0f} MB",
            memory[0] / memory[1], 0.9),
    ]  # fmt: skip
