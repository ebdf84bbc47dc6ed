"""`train compare`: from result files alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from common.console import emit_json, table


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--l0", "l0s", metavar="L,…", help="L0 to compare at, comma-separated.  [default: those aimed at]")
@click.option("--baseline", default="batchtopk", show_default=True, help="Learners that differences are taken from.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values instead of a table.")
@click.option("--markdown", "as_markdown", is_flag=True, help="A Markdown table.")
def compare(
    runs: tuple[Path, ...], l0s: str | None, baseline: str, as_json: bool, as_csv: bool, as_markdown: bool
) -> None:
    """Compare learners at equal L0, with 95 % intervals over seeds; RUNS are run or learner folders.

    \b
    train compare runs/variants
    train compare runs/a runs/b --l0 16,32 --markdown
    """
    from train.report.formats import numbers, to_csv, to_markdown
    from train.report.points import read_points
    from train.report.tables import compare as compare_points

    rows = compare_points(read_points(runs), numbers(l0s) if l0s is not None else None, baseline)
    records = [dataclasses.asdict(row) for row in rows]
    if as_json:
        emit_json(records)
    elif as_csv or as_markdown:
        click.echo(to_csv(records) if as_csv else to_markdown(records), nl=False)
    else:
        table("at equal L0", tuple(records[0]), [tuple(record.values()) for record in records])
