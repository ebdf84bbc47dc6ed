"""`train bench`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from common.config import build
from common.console import emit_json, table
from common.options import options_from
from train.config import BenchConfig


@click.command()
@options_from(BenchConfig)
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
@click.pass_obj
def bench(stop: Any, /, as_json: bool, **flags: Any) -> None:
    """Time training steps on made-up data, without a store, to size a run.

    \b
    train bench
    train bench --variant batchtopk --variant tree --d-model 2304 --d-sae 16384 --k 64 --batch-size 4096
    """
    from train.bench import bench as run_bench

    speeds = run_bench(build(BenchConfig, flags, "train bench"), stop)
    if as_json:
        emit_json([dataclasses.asdict(speed) for speed in speeds])
        return
    one = speeds[0]
    shape = f"d {one.d_model}, {one.d_sae:,} latents, k {one.k}, {one.batch_size:,} tokens a step"
    rows = [
        (
            *(s.variant, f"{s.tokens_per_s:,.0f}", s.step_ms, s.fraction_of_floor, s.relative),
            f"{s.kernels}, recorded" if s.recorded else s.kernels,
        )
        for s in speeds
    ]
    columns = ("variant", "tokens/s", "ms a step", "of the floor", f"against {one.variant}", "kernels")
    table(f"{shape}; {one.device}, {one.precision}", columns, rows)
