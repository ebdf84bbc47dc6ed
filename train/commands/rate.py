"""`train rate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from common.console import emit_json, table
from common.options import PathType


@click.command()
@click.argument("runs", type=PathType(), nargs=-1, required=True)
@click.option("--rater", metavar="NAME", help="Whose answers these are.  [default: the login name]")
@click.option("--db", default=Path("ratings.sqlite"), type=PathType(), show_default=True,
              help="The file of answers; several raters may share it.")  # fmt: skip
@click.option("--per-learner", default=50, type=click.IntRange(min=1), show_default=True, help="Latents of each.")
@click.option("--seed", default=0, show_default=True, help="Of the sample of latents and of their order.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; any but this one lets others answer.")
@click.option("--port", default=8765, type=click.IntRange(0, 65_535), show_default=True, help="0 takes a free one.")
@click.option("--summary", is_flag=True, help="Serve nothing: say what raters said, learner by learner.")
@click.option("--json", "as_json", is_flag=True, help="With --summary: one JSON list instead of a table.")
@click.pass_obj
def rate(
    stop: Any,
    /,
    runs: tuple[Path, ...],
    rater: str | None,
    db: Path,
    per_learner: int,
    seed: int,
    host: str,
    port: int,
    summary: bool,
    as_json: bool,
) -> None:
    """Rate latents by hand on a local page, without knowing whose they are; RUNS are run or learner folders.

    Needs `train eval RUN --suite latents` first. The same command goes on where the rater stopped.

    \b
    train rate runs/demo
    train rate runs/demo --summary
    """
    from train.folders import learner_folders
    from train.rate.command import login_name
    from train.rate.command import rate as serve
    from train.rate.command import summary as summarise

    learners = learner_folders(runs)
    if not summary:
        serve(learners, rater or login_name(), db, host, port, per_learner, seed, stop)
        return
    records = [dataclasses.asdict(row) for row in summarise(learners, db)]
    if as_json:
        emit_json(records)
    else:
        table(f"ratings in {db}", tuple(records[0]), [tuple(record.values()) for record in records])
