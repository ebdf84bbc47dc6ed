"""The `train` command line. Commands call the library and print; `train/commands/` has them."""

from __future__ import annotations

import inspect
from typing import Any

import click

from common.console import emit_json, say, table
from train.commands.bench import bench
from train.commands.evaluate import evaluate
from train.commands.exchange import export, import_
from train.commands.fit import fit, resume
from train.commands.rate import rate
from train.commands.report import compare, plot, report
from train.commands.unlearn import unlearn
from train.config import LearnerConfig


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Train sparse autoencoders on a harvested store.

    \b
    train fit --cache cache/demo.zarr --variant batchtopk --variant topk --passes 1
    train resume runs/demo
    train eval runs/demo
    train compare runs/demo
    train plot runs/demo
    train report runs/demo
    train bench
    """


for command in (fit, resume, evaluate, unlearn, compare, plot, report, rate, export, import_, bench):
    cli.add_command(command)


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
