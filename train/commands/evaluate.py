"""`train eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from common.config import build
from common.console import emit_json, say, table
from common.options import PathType, options_from
from train.config import EvalConfig

SIDE_BY_SIDE = 8  # learners in a table: more do not fit on a page
NAMED = 3  # metrics that one reason is given for


@click.command(name="eval")
@click.argument("runs", type=PathType(), nargs=-1, required=True)
@options_from(EvalConfig)
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
@click.pass_obj
def evaluate(stop: Any, /, runs: tuple[Path, ...], as_json: bool, **flags: Any) -> None:
    """Evaluate trained SAEs on held-out documents; RUNS are run or learner folders.

    \b
    train eval runs/demo
    train eval runs/demo/topk --max-tokens 50k --json
    """
    from train.evaluate.command import evaluate_runs

    results = evaluate_runs(list(runs), build(EvalConfig, flags, "train eval"), stop)
    if as_json:
        emit_json(results)
        return
    for name in dict.fromkeys(result["suite"] for result in results):
        print_suite(name, [result for result in results if result["suite"] == name])


def print_suite(name: str, results: list[dict[str, Any]]) -> None:
    """A table with a row for each metric and a column for each learner, then why some have no figure."""
    several = len({result["run"] for result in results}) > 1
    for start in range(0, len(results), SIDE_BY_SIDE):
        shown = results[start : start + SIDE_BY_SIDE]
        learners = [f"{Path(r['run']).name}/{r['learner']}" if several else r["learner"] for r in shown]
        rows = [(metric, *(result["metrics"][metric] for result in shown)) for metric in shown[0]["metrics"]]
        table(f"suite {name}", ("metric", *learners), rows)
    reasons: dict[str, dict[str, None]] = {}
    for metric, reason in (pair for result in results for pair in result["reasons"].items()):
        reasons.setdefault(reason, {})[metric] = None
    for reason, metrics in reasons.items():
        named, more = list(metrics)[:NAMED], len(metrics) - NAMED
        say(f"– {', '.join(named)}{f' and {more} more' if more > 0 else ''}: {reason}")
