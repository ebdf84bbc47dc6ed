"""`train export` and `train import`: to and from the files of other libraries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from common.config import build
from common.console import emit_json, table
from common.options import PathType, options_from
from train.config import ImportConfig

LIBRARIES = ("saelens", "dictionary_learning", "sparsify")


@click.command(name="export")
@click.argument("run", type=PathType())
@click.option("--to", required=True, type=click.Choice(LIBRARIES), help="The library that is to load them.")
@click.option("--out", required=True, type=PathType(), help="Folder; each learner gets one inside.")
@click.option("--context-free", is_flag=True, help="Leave out what an SAE reads from other tokens, and mark it so.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
def export(run: Path, to: str, out: Path, context_free: bool, as_json: bool) -> None:
    """Write trained SAEs in the files of another library; RUN is a run or learner folder.

    \b
    train export runs/demo --to saelens --out published
    train export runs/demo/topk --to sparsify --out published
    """
    from train.exchange.export import export as export_run

    done = [dataclasses.asdict(each) for each in export_run(run, to, out, context_free)]
    if as_json:
        emit_json(done)
        return
    table(f"for {to}", tuple(done[0]), [tuple(each.values()) for each in done])


@click.command(name="import")
@click.argument("path", type=PathType())
@options_from(ImportConfig)
@click.option("--json", "as_json", is_flag=True, help="One JSON record instead of a table.")
@click.pass_obj
def import_(stop: Any, /, path: Path, as_json: bool, **flags: Any) -> None:
    """Make a run of a published SAE, to be evaluated on a store; PATH is a SAELens folder.

    \b
    train import published/topk --cache cache/demo.zarr --out runs/published
    train eval runs/published
    """
    from train.exchange.imports import import_sae

    result = import_sae(path, build(ImportConfig, flags, "train import"), stop)
    if as_json:
        emit_json(result)
        return
    figures = [(name, value) for name, value in result["metrics"].items() if name != "calibration"]
    table(result["reason"], ("on held-out documents", f"{result['name']} ({result['variant']})"), figures)
