"""The `harvest` command line: options are made from `HarvestConfig`, commands call the library and print."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from common.checks import Problem
from common.config import build
from common.console import emit_json, format_bytes, say, table
from common.errors import ConfigError, GranaryError, StoreError
from common.options import PathType, options_from
from common.places import local_path
from common.store import Store
from common.truth import TOYS
from harvest.config import CACHE, HarvestConfig, ToyConfig


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Run a language model over a corpus and keep its activations: harvest once, train for ever.

    \b
    harvest run --model demo --layer 3 --tokens 1M
    harvest run --model gemma-2-2b --layer 19 --corpus monology/pile-uncopyrighted --tokens 100M
    """


@cli.command()
@options_from(HarvestConfig)
@click.option("--dry-run", is_flag=True, help="Print sequences, bytes, free disk, speed and time; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON record on stdout.")
@click.pass_obj
def run(stop: Any, /, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Harvest activations into a store; the same command goes on after any stop.

    \b
    harvest run --model demo --layer 3 --tokens 1M
    harvest run --model ./my-model --hook blocks.2.hook_mlp_out --corpus texts/ --tokens 20M --out cache/mine.zarr
    """
    from harvest.run import describe_dry_run, harvest
    from harvest.run import dry_run as plan_only

    config = build(HarvestConfig, flags, "harvest run")
    if dry_run:
        facts = plan_only(config)
        emit_json(facts) if as_json else table("harvest run --dry-run", ("", ""), describe_dry_run(facts))
        return
    report(harvest(config, stop), as_json)


@cli.command()
@click.argument("name", type=click.Choice(TOYS))
@options_from(ToyConfig, leave_out=("name",))
@click.option("--json", "as_json", is_flag=True, help="End with one JSON record on stdout.")
@click.pass_obj
def toy(stop: Any, /, name: str, as_json: bool, **flags: Any) -> None:
    """Write a store of made-up activations whose features are known; the same command goes on after any stop.

    \b
    harvest toy toy-h --tokens 2M
    train fit --cache cache/toy-h.zarr --variant batchtopk --d-sae 182 --k 7 --passes 1
    """
    from harvest.synthesise import synthesise

    report(synthesise(build(ToyConfig, {"name": name} | flags, "harvest toy"), stop), as_json)


def report(outcome: Any, as_json: bool) -> None:
    """Print what a harvest did: one JSON record, or one line."""
    if as_json:
        emit_json(dataclasses.asdict(outcome))
    else:
        now = f" ({outcome.tokens_per_s:,.0f} tokens/s)" if outcome.tokens_per_s else ", nothing left to do"
        hooks = ", ".join(outcome.hooks)
        say(f"{outcome.path}: {outcome.tokens:,} tokens at {hooks}, {format_bytes(outcome.bytes)}{now}")


@cli.command()
@click.argument("path", type=PathType(local_path))
@click.option(
    "--texts", default=2, type=click.IntRange(min=0), show_default=True,
    help="Sequences to decode, if the tokenizer is at hand.",
)  # fmt: skip
@click.option("--check", is_flag=True, help="Compute moments and norms again from the data; exit 3 if they differ.")
@click.option("--json", "as_json", is_flag=True, help="One JSON record instead of tables.")
def info(path: Path, texts: int, check: bool, as_json: bool) -> None:
    """Show a store: identity, progress, hooks, moments, first texts."""
    from harvest.check import recompute
    from harvest.info import describe, first_texts

    store = Store.open(path)
    facts = describe(store) | {"first_texts": first_texts(store, texts)}
    found = list(recompute(store)) if check else []
    if check:
        facts["check"] = [dataclasses.asdict(problem) for problem in found]
    if as_json:
        emit_json(facts)
    else:
        show_store(store, facts)
    if found:
        if not as_json:
            click.echo("\n".join(map(str, found)))
        wrong = f"{store.name}: {count(found)}: figures that are not those of the data"
        raise StoreError(f"{wrong}. Run: harvest verify {store.name}")
    if check:
        say(f"{store.name}: moments and norms agree with the data")


def show_store(store: Store, facts: dict[str, Any]) -> None:
    """What `harvest info` prints for people."""
    rows = [(key, value) for key, value in facts.items() if key not in ("hooks", "identity", "first_texts", "check")]
    table(store.name, ("", ""), rows)
    table("identity", ("", ""), list(facts["identity"].items()))
    keys = ["hook", "d_model", "chunks", "mean_squared_norm", "variance_share", "max_abs"]
    columns = ["hook", "d_model", "chunks", "mean ‖x‖²", "variance share", "max |x|"]
    if store.identity["dtype"] == "int8":
        keys, columns = [*keys, "storage_error"], [*columns, "storage error"]
    table("hooks", columns, [[hook[key] for key in keys] for hook in facts["hooks"]])
    for number, text in enumerate(facts["first_texts"]):
        click.echo(f"sequence {number}: {text!r}")


@cli.command()
@click.argument("path", type=PathType(local_path))
@click.option("--repair", is_flag=True, help="Harvest the damaged chunks again, and only those.")
@click.option("--json", "as_json", is_flag=True, help="One JSON record instead of lines.")
@click.pass_obj
def verify(stop: Any, path: Path, repair: bool, as_json: bool) -> None:
    """Check every committed chunk against the journal; exit 3 if something is wrong."""
    from harvest.verify import repair as mend
    from harvest.verify import verify as check

    name = Store.open(path).name
    report = mend(path, stop) if repair else check(path, stop)
    left = f", {report.missing} not harvested yet" if report.missing else ""
    counted = f"{name}: {report.checked:,} chunk files checked, {count(report.problems)}{left}"
    if as_json:
        emit_json(dataclasses.asdict(report))
    else:
        click.echo("\n".join(map(str, report.problems)) or counted)
    if report.problems:
        raise StoreError(f"{counted}. Run: harvest verify {name} --repair")


def count(problems: list[Problem]) -> str:
    """`no problem`, `1 problem`, `3 problems`."""
    return "1 problem" if len(problems) == 1 else f"{len(problems) or 'no'} problem{'s' if problems else ''}"


@cli.command(name="list")
@click.argument("folder", type=PathType(), default=CACHE)
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
def list_stores(folder: Path, as_json: bool) -> None:
    """List the stores under FOLDER (default: cache)."""
    from harvest.info import describe

    if folder != CACHE and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder.")
    stores = []
    itself = folder / "zarr.json"
    paths = [itself] if itself.exists() else sorted(folder.rglob("*.zarr/zarr.json"))
    for path in paths:
        try:
            stores.append(describe(Store.open(path.parent)))
        except GranaryError as error:  # one that is foreign or damaged hides none of the others
            say(str(error))
        except OSError as error:
            say(f"{error.filename}: {error.strerror}")
    if as_json:
        emit_json(stores)
        return
    if not paths:
        say(f"{folder}: no store here. Make one: harvest run --model demo --layer 3 --tokens 1M")
    if not stores:
        return
    keys = ("path", "model", "hooks", "tokens", "harvested", "size")
    rows = [[", ".join(h["hook"] for h in s["hooks"]) if key == "hooks" else s[key] for key in keys] for s in stores]
    table(f"stores in {folder}/", ("store", *keys[1:]), rows)
