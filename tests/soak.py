"""`python -m tests.soak --kills 200`: kill both tools at random moments, hundreds of times, and compare the bytes.

Each round harvests a store and trains on it under SIGKILLs at random delays until the command ends by itself; the
store's files and the SAEs' tensors must equal those of a run that was never stopped.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
import time
from pathlib import Path

import click
import torch

from tests.tiny import gpt2
from tests.warm import WarmServer

HARVEST = ["harvest", "run", "--model", "model", "--layer", "1", "--corpus", "texts", "--tokens", "40k",
           "--context", "64", "--chunk-sequences", "32", "--out", "soak.zarr"]  # fmt: skip
TRAIN = ["train", "fit", "--cache", "soak.zarr", "--variant", "topk", "--variant", "batchtopk", "--variant", "standard",
         "--k", "4", "--d-sae", "64", "--steps", "400", "--passes", "10", "--batch-size", "512", "--log-every", "5",
         "--checkpoint-every", "20", "--out", "run"]  # fmt: skip


def make_inputs(folder: Path) -> None:
    """A tiny model and some texts."""
    torch.manual_seed(0)
    gpt2(n_positions=64, bos_token_id=256, eos_token_id=256).save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    chooser = random.Random(0)
    for number in range(60):
        words = [chooser.choice(["grain", "barn", "rye", "mill", "silo", "and", "of"]) for _ in range(200)]
        (folder / "texts" / f"{number:02d}.txt").write_text(" ".join(words))


def digest(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of every file under `folder` that matches, by relative path."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def under_fire(server: WarmServer, argv: list[str], folder: Path, chooser: random.Random, longest_s: float) -> int:
    """Start `argv` again and again, killing it after a random delay, until it ends by itself: the kills."""
    kills = 0
    while True:
        child = server.start(argv, folder)
        end = time.monotonic() + chooser.uniform(0.02, longest_s)
        while time.monotonic() < end and not child.ended():
            time.sleep(0.002)
        if child.ended():
            ended = child.wait()
            assert ended.code == 0, ended
            return kills
        child.kill()
        kills += 1
        longest_s *= 1.03  # progress is made even where a start takes most of the time


@click.command(help=__doc__)
@click.option("--kills", default=200, show_default=True, help="Stop after the round in which this many were reached.")
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    chooser = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch, WarmServer() as server:
        straight = Path(scratch) / "straight"
        straight.mkdir()
        make_inputs(straight)
        for argv in (HARVEST, TRAIN):
            ended = server.run(argv, straight)
            assert ended.code == 0, ended
        store, saes = digest(straight / "soak.zarr", "**/c/**/*"), digest(straight / "run", "*/sae/*.safetensors")
        done = {"harvest": 0, "train": 0}
        number = 0
        while sum(done.values()) < kills:
            number += 1
            folder = Path(scratch) / f"round-{number}"
            folder.mkdir()
            for name in ("model", "texts"):
                shutil.copytree(straight / name, folder / name)
            done["harvest"] += under_fire(server, HARVEST, folder, chooser, 0.5)
            assert digest(folder / "soak.zarr", "**/c/**/*") == store, f"round {number}: the store differs"
            done["train"] += under_fire(server, TRAIN, folder, chooser, 1.0)
            assert digest(folder / "run", "*/sae/*.safetensors") == saes, f"round {number}: an SAE differs"
            shutil.rmtree(folder)
            click.echo(f"round {number}: {done['harvest']} kills of harvest, {done['train']} of train, bytes equal")
    click.echo(f"{sum(done.values())} kills, every store and every SAE equal to the uninterrupted one")


if __name__ == "__main__":
    main()
