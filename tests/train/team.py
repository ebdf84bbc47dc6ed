"""Several ranks on one run in real processes, as torchrun would start them, forked from the warm server."""

from __future__ import annotations

import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from tests.warm import Child, Ended, WarmServer, wait_for
from train.checkpoint import checkpoints, step_of


@dataclass
class Team:
    """The ranks of one run, in order."""

    children: list[Child]

    def signal(self, number: signal.Signals) -> None:
        for child in self.children:
            child.signal(number)

    def wait(self) -> list[Ended]:
        return [child.wait() for child in self.children]


def start_team(warm: WarmServer, argv: list[str], cwd: Path, n_ranks: int = 2) -> Team:
    """Start the ranks of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(n_ranks)]
    return Team([warm.start(argv, cwd, {key: str(value) for key, value in place.items()}) for place in places])


def run_team(warm: WarmServer, argv: list[str], cwd: Path, n_ranks: int = 2) -> list[Ended]:
    """Run the ranks to their end, which is a good one."""
    ended = start_team(warm, argv, cwd, n_ranks).wait()
    assert [one.code for one in ended] == [0] * n_ranks, "\n".join(one.err for one in ended)
    return ended


def newest_step(learner: Path) -> int:
    """Of a learner's checkpoints; 0 while there is none."""
    return max((step_of(path) for path in checkpoints(learner / "checkpoints")), default=0)


def wait_for_steps(learner: Path, n_steps: int) -> None:
    """Until a checkpoint lies so many steps after the newest there is."""
    before = newest_step(learner)
    wait_for(lambda: newest_step(learner) >= before + n_steps)
