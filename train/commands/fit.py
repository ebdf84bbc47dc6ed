"""`train fit` and `train resume`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from common.console import emit_json, table
from common.options import PathType, options_from
from train.config import FitConfig


@click.command()
@options_from(FitConfig, leave_out=("learner",))
@click.option("--config", "file", type=PathType(), help="A TOML file with any of this; flags win.")
@click.option("--variant", "variants", multiple=True, help="A variant to train; give several for several learners.")
@click.option("--d-sae", metavar="N", help="Latents of every learner.  [default: 8 x d_model]")
@click.option("--k", metavar="N", help="Latents kept per token, for variants that have k.  [default: 32]")
@click.option("--lr", metavar="R", help="Peak learning rate of every learner.  [default: by length and width]")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="Any setting of a learner or its variant; NAME.KEY=VALUE for one learner.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="End with one JSON record on stdout.")
@click.pass_obj
def fit(
    stop: Any, /, file: Path | None, variants: tuple[str, ...], settings: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Train one or more learners on one stream of batches; the same command goes on after any stop.

    \b
    train fit --cache cache/demo.zarr --variant topk --k 32 --passes 1
    train fit --cache cache/demo.zarr --variant batchtopk --variant standard --steps 5000 --set standard.l1=0.02
    train fit --config study.toml --out runs/study
    torchrun --nproc-per-node 4 -m train fit --config study.toml --out runs/study
    """
    from train.settings import fit_config

    shared = {key: value for key in ("d_sae", "k", "lr") if (value := flags.pop(key)) is not None}
    carry_out(lambda: fit_config(file, flags, variants, shared, settings), stop, as_json)


@click.command()
@click.argument("run", type=PathType())
@click.option("--cache", metavar="TEXT", help="Where the store is now, if it has moved.")
@click.option("--device", help="Another device than before.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON record on stdout.")
@click.pass_obj
def resume(stop: Any, run: Path, cache: str | None, device: str | None, as_json: bool) -> None:
    """Go on with a run that was stopped, exactly where it was.

    \b
    train resume runs/demo
    """
    from train.settings import saved_config

    carry_out(lambda: saved_config(run, cache, device), stop, as_json)


def carry_out(configuration: Callable[[], FitConfig], stop: Any, as_json: bool) -> None:
    """Train what a command line describes, on this process or on all ranks that torchrun started; rank 0 reports."""
    from train.ranks import join_ranks
    from train.trainer import fit as run_fit

    with join_ranks() as ranks:
        outcome = run_fit(ranks.together(configuration), stop, ranks)
    if ranks.first:
        report(outcome, as_json)


def report(outcome: Any, as_json: bool) -> None:
    """Print how a run ended: one JSON record, or a table of its learners."""
    if as_json:
        emit_json(dataclasses.asdict(outcome))
        return
    rows = []
    for name, result in outcome.learners.items():
        metrics = result["metrics"] or {}
        figures = (metrics.get("explained_variance"), metrics.get("l0"), metrics.get("dead_share"))
        rows.append((name, result["state"], result["training_steps"], result["final_loss"], *figures))
    columns = ("learner", "state", "steps", "final loss", "held-out EV", "L0", "dead")
    table(f"{outcome.path}: {outcome.reason}", columns, rows)
