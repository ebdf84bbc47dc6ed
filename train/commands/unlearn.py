"""`train unlearn`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from common.config import build
from common.console import emit_json, say, table
from common.options import PathType, options_from
from train.config import UnlearnConfig

SHOWN = {
    "unlearn": (
        "score", "score_low", "score_high", "area", "score_random", "best", "delta_forget", "delta_retain",
    ),
    "unlearn-saebench": ("score", "best", "accuracy_forget", "accuracy_retain", "questions_forget", "questions_retain"),
}  # fmt: skip


@click.command()
@click.argument("runs", type=PathType(), nargs=-1, required=True)
@options_from(UnlearnConfig)
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
@click.pass_obj
def unlearn(stop: Any, /, runs: tuple[Path, ...], as_json: bool, **flags: Any) -> None:
    """Clamp the latents that carry one kind of text, and see what the model loses of it and of the rest.

    RUNS are run or learner folders. The model that the store was harvested from is needed.

    \b
    train unlearn runs/demo --forget stdlib:asyncio --retain stdlib
    train unlearn runs/gemma --data wmdp --model google/gemma-2-2b-it
    """
    from train.evaluate.unlearn.command import unlearn_runs

    results = unlearn_runs(list(runs), build(UnlearnConfig, flags, "train unlearn"), stop)
    if as_json:
        emit_json(results)
        return
    for suite, columns in SHOWN.items():
        chosen = [result for result in results if result["suite"] == suite]
        if chosen:
            rows = [(result["learner"], *(result["metrics"][name] for name in columns)) for result in chosen]
            table(suite, ("learner", *columns), rows)
        for reason in dict.fromkeys(reason for result in chosen for reason in result["reasons"].values()):
            say(f"– {reason}")
