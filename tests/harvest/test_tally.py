"""What the progress line says binds."""

from __future__ import annotations

import pytest

from common.console import Progress
from harvest.tally import Tally
from harvest.worker import ChunkDone


@pytest.mark.parametrize(
    ("waited", "read", "model", "write", "binds"),
    [
        (9.0, 0.0, 0.0, 0.0, "model"),  # under a tenth
        (30.0, 20.0, 0.0, 0.0, "reading tokens"),
        (30.0, 1.0, 0.0, 0.0, "disk"),  # here: what is not reading is waiting for a writer
        (30.0, 0.0, 70.0, 150.0, "disk"),  # on a cluster: writing a chunk takes longer than the model
        (30.0, 0.0, 70.0, 10.0, "handing out tasks"),
    ],
)
def test_tally_says_what_binds(waited: float, read: float, model: float, write: float, binds: str) -> None:
    progress = Progress("harvest", 1000)
    progress.started -= 100.0
    tally = Tally(progress, waited_s=waited, read_s=read, model_s=model, write_s=write)
    assert tally.binds() == binds
    assert tally.describe(0.0).endswith(f"waited {waited:.0f}% ({binds} binds)")


def test_tally_of_a_cluster_waits_where_its_workers_model_is_idle() -> None:
    progress = Progress("harvest", 1000)
    progress.started -= 30.0
    tally = Tally(progress)
    tally.add_remote(ChunkDone(0, [], None, forward_s=4.0, write_s=1.0, size_bytes=50), n_workers=2, tokens=100)
    # 25 s until the first chunk began, then 5 s in which one of two workers was in the model for 4 s
    assert tally.start_s == pytest.approx(25.0, abs=0.2)
    assert tally.waited_s == pytest.approx(3.0, abs=0.4)
    assert (tally.tokens, tally.written_bytes) == (100, 50)
