"""`train compare`, `train plot` and `train report`: from result files alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from common.console import emit_json, table
from common.options import PathType


@click.command()
@click.argument("runs", type=PathType(), nargs=-1, required=True)
@click.option("--l0", "l0s", metavar="L,…", help="L0 to compare at, comma-separated.  [default: those aimed at]")
@click.option("--baseline", default="batchtopk", show_default=True, help="Learners that differences are taken from.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values instead of a table.")
@click.option("--markdown", "as_markdown", is_flag=True, help="A Markdown table.")
@click.option("--out", type=PathType(), help="Write the table to this file too: .json, .csv or .md.")
def compare(
    runs: tuple[Path, ...],
    l0s: str | None,
    baseline: str,
    as_json: bool,
    as_csv: bool,
    as_markdown: bool,
    out: Path | None,
) -> None:
    """Compare learners at equal L0, with 95 % intervals over seeds; RUNS are run or learner folders.

    \b
    train compare runs/variants
    train compare runs/a runs/b --l0 16,32 --out tables/variants.md
    """
    from train.report.formats import check_table_file, numbers, to_csv, to_markdown, write_table
    from train.report.points import read_points
    from train.report.tables import compare as compare_points

    if out is not None:
        check_table_file(out)
    rows = compare_points(read_points(runs), numbers(l0s) if l0s is not None else None, baseline)
    records = [dataclasses.asdict(row) for row in rows]
    if out is not None:
        write_table(out, records)
    if as_json:
        emit_json(records)
    elif as_csv or as_markdown:
        click.echo(to_csv(records) if as_csv else to_markdown(records), nl=False)
    else:
        table("at equal L0", tuple(records[0]), [tuple(record.values()) for record in records])


@click.command()
@click.argument("runs", type=PathType(), nargs=-1, required=True)
@click.option("--out", type=PathType(), help="Folder for the figures.  [default: RUN/plots]")
@click.option("--figure", "names", metavar="NAME", multiple=True, help="Only this one; repeatable.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
def plot(runs: tuple[Path, ...], out: Path | None, names: tuple[str, ...], as_json: bool) -> None:
    """Draw figures of one or more runs, each with the numbers behind it; RUNS are run or learner folders.

    \b
    train plot runs/demo
    train plot runs/a runs/b --out plots/both --figure l0_fronts
    """
    from train.report.figures import plot as plot_runs

    written = plot_runs(runs, out, names)
    if as_json:
        emit_json([{**dataclasses.asdict(row), "png": str(row.png), "csv": str(row.csv)} for row in written])
        return
    rows = [(row.figure, str(row.png), row.csv.name, row.numbers) for row in written]
    table(
        f"{len(written)} figure{'s' * (len(written) > 1)}", ("figure", "picture", "numbers behind it", "how many"), rows
    )


@click.command()
@click.argument("runs", type=PathType(), nargs=-1, required=True)
@click.option("--out", type=PathType(), help="The page.  [default: RUN/report.html, or report.html here]")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Make one page of runs that needs no network: states, tables, curves, latents; RUNS are run or learner folders.

    \b
    train report runs/demo
    train report runs/a runs/b --out both.html
    """
    from train.report.page import write_page

    click.echo(str(write_page(runs, out)))
