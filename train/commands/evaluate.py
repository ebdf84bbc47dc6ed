"""`train eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from common.config import build
from common.console import emit_json, say, table
from common.options import options_from
from train.config import EvalConfig


@click.command(name="eval")
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
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
        chosen = [result for result in results if result["suite"] == name]
        columns = list(chosen[0]["metrics"])
        table(f"suite {name}", ("learner", *columns), [(r["learner"], *r["metrics"].values()) for r in chosen])
        for reason in dict.fromkeys(reason for result in chosen for reason in result["reasons"].values()):
            say(f"– {reason}")
