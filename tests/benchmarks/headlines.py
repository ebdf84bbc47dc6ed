"""`python -m tests.benchmarks.headlines RUN… [--k 32]`: each variant's own figure, mean over the seeds of a sweep.

The figures of docs/variants.md that are not in result.json: own-part scores of composed levels, consistency of trees,
what the past is worth to decoders that see it, and how long latents persist by group. All on held-out documents.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import granary  # noqa: F401  (binds common, harvest and train)
from common.files import read_json
from common.store import Store
from train.data.batch import Batch
from train.data.reader import Batches
from train.evaluate.matching import dense_mass, density_matched
from train.evaluate.own_parts import own_part_score
from train.evaluate.persistence import mass_weighted, measure_persistence
from train.evaluate.structure import edges_of, hierarchy_scores
from train.prepare import load_plan
from train.saes import load_sae
from train.saes.base import SAE
from train.saes.compositional import Compositional
from train.saes.contrastive import Contrastive
from train.saes.multiscale import MultiScale
from train.saes.predictor import Predictor
from train.saes.relational import Relational
from train.saes.tree import Tree
from train.settings import saved_config

LAG = 8


class HeldOut:
    """Held-out windows of a run's store, as often as they are wanted."""

    def __init__(self, run: Path, window: int) -> None:
        store = Store.open(saved_config(run).cache)
        plan = load_plan(run, store)
        assert plan is not None, f"{run}: no data plan"
        self.batches, self.window = Batches(store, plan), window

    def __call__(self) -> Iterator[Batch]:
        return self.batches.held_out(self.window)


def codes_of(sae: SAE, held_out: HeldOut) -> torch.Tensor:
    """Latents of every held-out token [tokens, latents], in order."""
    return torch.cat([sae.encode(batch)[batch.valid] for batch in held_out()])


def composed(sae: Compositional, held_out: HeldOut) -> dict[str, float]:
    """Own-part R² of the upper levels, with another latent's parts for comparison."""
    codes = codes_of(sae, held_out)
    low, mid, high = (codes[:, place] for place in sae.places)
    pairs = (("mid", low, mid), ("high", mid, high))
    figures = {}
    for (name, lower, upper), weights in zip(pairs, sae.compositions(), strict=True):
        score = own_part_score(lower, upper, weights)
        figures |= {f"own-part R² {name}": score.active, f"null {name}": score.active_null}
    return figures


def consistent(sae: Tree, held_out: HeldOut) -> dict[str, float]:
    """Hierarchical consistency of each pair of levels, with its permuted null."""
    figures = {}
    for name, edges in zip(
        ("top–mid", "mid–leaf"), edges_of(sae.parent, sae.edge_weights(), sae.forest.spans), strict=True
    ):
        own, null = hierarchy_scores(sae, edges, held_out)
        figures |= {f"HCS {name}": own.hcs(), f"null {name}": null.hcs()}
    return figures


def without_past(sae: Relational | Predictor, held_out: HeldOut) -> dict[str, float]:
    """Explained variance with the term from past codes left out, and by that term alone, asked by no code."""
    error = alone = 0.0
    x = torch.cat([batch.x[batch.valid].float() for batch in held_out()]).double()
    spread = float((x - x.mean(0)).square().sum())
    for batch in held_out():
        latents = sae.encode(batch)
        past = sae.from_past(latents * sae.scale, batch) / sae.scale
        error += float((batch.x.float() - sae.decode(latents, batch) + past)[batch.valid].double().square().sum())
        if isinstance(sae, Relational):
            past = sae.from_past(latents * sae.scale, batch, query=torch.zeros_like(latents)) / sae.scale
        rest = batch.x.float() - sae.b_dec / sae.scale - past
        alone += float(rest[batch.valid].double().square().sum())
    return {"EV without the past": 1 - error / spread, "EV of the past alone": 1 - alone / spread}


def persistent(sae: SAE, flat: SAE, held_out: HeldOut, groups: dict[str, slice]) -> dict[str, float]:
    """ρ(8) of groups of latents at equal density with the flat SAE; mass in features active on over 40 % of tokens."""
    measured, reference = measure_persistence(sae, held_out()), measure_persistence(flat, held_out())
    figures = {}
    for name, group in groups.items():
        matched = density_matched(measured, reference, LAG, group)
        figures |= {f"ρ(8) {name}": mass_weighted(measured.rho[LAG], measured.mass, group)}
        figures |= {f"matched {name}": matched.value, f"flat at {name}'s densities": matched.reference}
    return figures | {"dense mass": dense_mass(measured)}


def headline(sae: SAE, flat: SAE, held_out: HeldOut) -> dict[str, float]:
    """The figures that a variant stands for; {} for one that has none of its own."""
    match sae:
        case Compositional():
            return composed(sae, held_out)
        case Tree():
            return consistent(sae, held_out)
        case Relational() | Predictor():
            return without_past(sae, held_out)
        case Contrastive():
            return persistent(sae, flat, held_out, {"high": sae.groups()["high"]})
        case MultiScale():
            return persistent(sae, flat, held_out, sae.groups())
    return {}


@torch.no_grad()
def main() -> None:
    """Measure every learner of the runs that was asked for this k, and print means and ranges over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--baseline", default="batchtopk")
    arguments = parser.parse_args()
    folders = sorted(path.parent for run in arguments.runs for path in run.glob("*/sae"))
    configs = {folder: read_json(folder / "config.json") for folder in folders}
    configs = {folder: config for folder, config in configs.items() if config["options"].get("k") == arguments.k}
    flat = {c["seed"]: load_sae(f) for f, c in configs.items() if c["variant"] == arguments.baseline}
    found: dict[str, list[dict[str, float]]] = {}
    for folder, config in configs.items():
        if config["seed"] in flat:
            sae = load_sae(folder)
            figures = headline(sae, flat[config["seed"]], HeldOut(folder.parent, max(sae.window, 2 * LAG)))
            if figures:
                found.setdefault(config["variant"], []).append(figures)
    print("| variant | figure | mean over seeds | seeds |\n|---|---|---|---|")
    for variant, seeds in found.items():
        for name in seeds[0]:
            values = [figures[name] for figures in seeds]
            spread = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            print(f"| {variant} | {name} | {spread} | {len(values)} |")


if __name__ == "__main__":
    main()
