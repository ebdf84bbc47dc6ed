"""Timing training steps: what is reported and what is refused. The figures themselves are not judged here."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from common.config import build
from common.errors import ConfigError, Interrupted
from common.stopping import Stop
from train.bench import ROUND, STEP, bench, learner_for, median_ratio, name_of, products_of, sentences, step_of
from train.cli import cli
from train.config import BenchConfig

SMALL = {"d_model": 16, "d_sae": 64, "k": 4, "batch_size": 128, "steps": 4}


def asked(**changes: Any) -> BenchConfig:
    return build(BenchConfig, SMALL | changes, "test")


def test_each_variant_is_timed_and_described() -> None:
    speeds = bench(asked(variant=("batchtopk", "standard")))
    assert [speed.variant for speed in speeds] == ["batchtopk", "standard"]
    for speed in speeds:
        assert speed.tokens_per_s == pytest.approx(128 / speed.step_ms * 1e3, rel=0.01)
        assert speed.fraction_of_floor > 0
        assert (speed.d_model, speed.d_sae, speed.k, speed.batch_size) == (16, 64, 4, 128)
    assert speeds[0].relative == 1
    assert [speed.kernels for speed in speeds] == ["sparse", "sparse"]


def test_the_plain_way_can_be_timed() -> None:
    (speed,) = bench(asked(kernels="plain", precision="bfloat16"))
    assert (speed.kernels, speed.precision) == ("plain", "bfloat16")


def test_the_floor_is_the_products_that_a_step_needs() -> None:
    assert products_of(64, 4) == 1 + 4 * 4 / 64  # 2·d·m + 8·d·k in units of 2·d·m


def test_however_many_steps_the_run_gets_no_older() -> None:
    learner = learner_for("topk", 16, 64, 4, torch.device("cpu"), torch.float32, "auto")
    step, seen = step_of(learner, sentences(128, 16)), []
    for _ in range(3 * ROUND):
        seen.append(learner.step)
        step()
    assert seen == 3 * list(range(STEP, STEP + ROUND))  # what is done in every fourth step is
    assert int(learner.sae.tokens_silent.max()) < ROUND * 128


def test_the_data_are_whole_documents_of_unit_norm() -> None:
    batch = sentences(256, 512)
    assert batch.x.shape == (2, 128, 512)
    assert float(batch.x.square().sum(-1).mean()) == pytest.approx(1, abs=0.02)
    assert batch.doc[0].unique().tolist() == [0]
    assert batch.pos[1].tolist() == list(range(128))


def test_ratios_are_taken_pair_by_pair() -> None:
    assert median_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": ("batchtpok",)}, "^--variant: unknown variant 'batchtpok'.* Did you mean 'batchtopk'"),
        ({"variant": ("nope",)}, r"^--variant: unknown variant 'nope'\. Known: batchtopk, .*, topk, tree\.$"),
        ({"variant": ("pca",)}, "takes no training steps"),
        ({"batch_size": 100}, "give a multiple of 128"),
        ({"k": 65}, "k = 65 is more than d_sae = 64"),
        ({"device": "cuda:9"}, "not on this machine"),
        ({"d_sae": 10**12}, "out of memory in the first step"),
    ],
)
def test_what_cannot_be_timed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(asked(**changes))


def test_a_request_to_stop_is_heard() -> None:
    with pytest.raises(Interrupted, match="SIGTERM"):
        bench(asked(), Stop("SIGTERM"))


def test_the_command_prints_a_table_or_json() -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    told = CliRunner().invoke(cli, ["bench", "--variant", "topk", "--variant", "topk", *flags])
    assert told.exit_code == 0, told.output
    assert "d 16, 64 latents, k 4, 128 tokens a step" in told.output
    as_json = CliRunner().invoke(cli, ["bench", *flags, "--json"])
    (record,) = json.loads(as_json.stdout)
    assert {"variant", "tokens_per_s", "fraction_of_floor"} <= record.keys()
    assert record["variant"] == "batchtopk"


def test_without_a_gpu_it_says_that_nothing_is_recorded() -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    ended = CliRunner().invoke(cli, ["bench", *flags, "--device", "cpu", "--graphs", "--json"])
    assert ended.stderr.count("--graphs: nothing is recorded, since there is no GPU") == 1
    assert json.loads(ended.stdout)[0]["recorded"] is False


@pytest.mark.parametrize(("threads", "said"), [(1, "1 thread"), (2, "2 threads")])
def test_processor_is_named_with_its_threads(threads: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert name_of(torch.device("cpu")).endswith(f", {said}")
