"""The `train` command line: options are made from `FitConfig`, commands call the library and print."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import click

from common.console import emit_json, say, table
from common.options import options_from
from train.config import FitConfig, LearnerConfig


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Train sparse autoencoders on a harvested store.

    \b
    train fit --cache cache/demo.zarr --variant batchtopk --variant topk --passes 1
    train resume runs/demo
    train eval runs/demo
    """


@cli.command()
@options_from(FitConfig, leave_out=("learner",))
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file with any of this; flags win.")
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
    """
    from train.settings import fit_config
    from train.trainer import fit as run_fit

    shared = {key: flags.pop(key) for key in ("d_sae", "k", "lr")}
    config = fit_config(
        file, flags, variants, {key: value for key, value in shared.items() if value is not None}, settings
    )
    report(run_fit(config, stop), as_json)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--cache", type=click.Path(path_type=Path), help="Where the store is now, if it has moved.")
@click.option("--device", help="Another device than before.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON record on stdout.")
@click.pass_obj
def resume(stop: Any, run: Path, cache: Path | None, device: str | None, as_json: bool) -> None:
    """Go on with a run that was stopped, exactly where it was.

    \b
    train resume runs/demo
    """
    from train.settings import saved_config
    from train.trainer import fit as run_fit

    report(run_fit(saved_config(run, cache, device), stop), as_json)


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


@cli.command(name="eval")
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--suite", default="heldout", show_default=True, help="Comma-separated suites.")
@click.option("--max-tokens", metavar="N", help="Held-out tokens to look at.  [default: all]")
@click.option("--cache", type=click.Path(path_type=Path), help="Where the store is now, if it has moved.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, …")
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
@click.pass_obj
def evaluate(
    stop: Any,
    /,
    runs: tuple[Path, ...],
    suite: str,
    max_tokens: str | None,
    cache: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate trained SAEs on held-out documents; RUNS are run or learner folders.

    \b
    train eval runs/demo
    train eval runs/demo/topk --max-tokens 1M --json
    """
    from train.evaluate.command import evaluate_runs

    results = evaluate_runs(list(runs), suite, max_tokens, cache, device, stop)
    if as_json:
        emit_json(results)
        return
    for name in dict.fromkeys(result["suite"] for result in results):
        chosen = [result for result in results if result["suite"] == name]
        columns = list(chosen[0]["metrics"])
        table(f"suite {name}", ("learner", *columns), [(r["learner"], *r["metrics"].values()) for r in chosen])


@cli.command()
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


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="A list of objects with name, summary and settings.")
def variants(as_json: bool) -> None:
    """List the variants and their settings."""
    from train.saes import REGISTRY

    described: list[dict[str, Any]] = []
    for name, cls in REGISTRY.items():
        module = inspect.getmodule(cls)
        summary = ((module.__doc__ if module else None) or "").strip().splitlines()[0]
        fields = {
            key: {"default": None if field.is_required() else field.get_default(), "help": field.description}
            for key, field in cls.Config.model_fields.items()
        }
        described.append({"name": name, "summary": summary, "settings": fields})
    if as_json:
        emit_json(described)
        return
    for variant in described:
        rows = [(key, info["default"], info["help"]) for key, info in variant["settings"].items()]
        table(f"{variant['name']} — {variant['summary']}", ("setting", "default", "meaning"), rows)
    common = [
        (k, f.get_default(), f.description)
        for k, f in LearnerConfig.model_fields.items()
        if not f.is_required() and k != "options"
    ]
    table("every learner", ("setting", "default", "meaning"), common)
    say("Set them with --set KEY=VALUE, or in [[learner]] tables of a TOML file.")
