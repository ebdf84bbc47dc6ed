"""What is made of measured times; no time itself is judged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import Interrupted
from train.evaluate import timing
from train.evaluate.timing import MOST_REPEATS, REPEATS, WARM_UPS, Timing, in_turn


def asked(stop: bool = False) -> Any:
    def refuse() -> None:
        if stop:
            raise Interrupted("stopped")

    return SimpleNamespace(device=torch.device("cpu"), refuse_when_stopped=refuse)


def test_figures_are_medians_of_pairs() -> None:
    times = Timing(*(torch.tensor(values, dtype=torch.float64) for values in ([1, 2, 9, 4, 3], [1, 1, 3, 1, 2])))
    assert times.ms == 3000
    assert times.ratio == 2.0  # of 1, 2, 3, 4, 1.5; not 3 / 1, the ratio of the medians
    described = times.described()
    assert described["quartiles_ms"] == [2000, 3000, 4000]
    assert described["flat_quartiles_ms"] == [1000, 1000, 2000]
    assert described["ratio_quartiles"] == [1.5, 2, 3]
    assert described["repeats"] == 5


@pytest.mark.parametrize(("enough", "repeats"), [(0.0, REPEATS), (1e9, MOST_REPEATS)])
def test_both_are_measured_in_turn_after_a_warm_up(
    enough: float, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "ENOUGH_S", enough)
    calls: list[str] = []
    found = in_turn(lambda: calls.append("ours"), lambda: calls.append("flat"), asked())
    assert calls == ["ours", "flat"] * (WARM_UPS + repeats)
    assert len(found.ours) == len(found.flat) == repeats
    assert bool((found.ours > 0).all())


def test_measuring_stops_when_asked() -> None:
    with pytest.raises(Interrupted):
        in_turn(lambda: None, lambda: None, asked(stop=True))
