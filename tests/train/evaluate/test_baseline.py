"""Which flat learner stands beside a learner; suite `temporal`'s tests have --baseline."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.files import read_json, write_json
from train.evaluate.baseline import aim_of, flat_of


def facts(variant: str, seed: int = 0, **options: Any) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, "options": {"d_sae": 64} | options, "store": "s", "hook": "h"}


def chosen(run: Path, name: str) -> str | None:
    subject: Any = SimpleNamespace(folder=run / name, facts=read_json(run / name / "sae" / "config.json"))
    folder = flat_of(run, subject).folder
    return None if folder is None else folder.name


@pytest.fixture
def run(tmp_path: Path) -> Path:
    learners = {
        "flat": facts("batchtopk", k=8),
        "flat-other-k": facts("batchtopk", k=16),
        "flat-other-seed": facts("batchtopk", seed=1, k=8),
        "flat-wide": facts("batchtopk", k=8, d_sae=256),
        "led": facts("jumprelu", target_l0=8.0),
        "tree": facts("tree", k=8, d_sae=60),
        "tree-wide": facts("tree", k=8, d_sae=200),
        "tree-seed": facts("tree", seed=1, k=8),
        "tree-alone": facts("tree", seed=2, k=8),
        "mean": facts("mean"),
    }
    for name, said in learners.items():
        (tmp_path / name / "sae").mkdir(parents=True)
        write_json(tmp_path / name / "sae" / "config.json", said)
    (tmp_path / "aaa-stopped").mkdir()  # not finished: no sae/
    write_json(tmp_path / "aaa-stopped" / "config.json", facts("batchtopk", k=8))
    return tmp_path


@pytest.mark.parametrize(
    ("learner", "flat"),
    [
        ("tree", "flat"),
        ("led", "flat"),  # a target L0 of 8 is a k of 8
        ("tree-wide", "flat-wide"),
        ("tree-seed", "flat-other-seed"),
        ("flat-wide", "flat-wide"),
        ("flat", "flat"),
        ("tree-alone", None),
        ("mean", None),
    ],
)
def test_the_flat_learner_has_the_same_aim_and_seed_and_about_the_same_size(
    run: Path, learner: str, flat: str | None
) -> None:
    assert chosen(run, learner) == flat


def test_the_aim_is_k_or_a_target() -> None:
    assert aim_of(facts("topk", k=4)) == 4
    assert aim_of(facts("gated", target_l0=4.5)) == 4.5
    assert aim_of(facts("gated", target_l0=None)) is None
