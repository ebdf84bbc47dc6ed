"""Several processes on one run, *ranks*: `torchrun --nproc-per-node N -m train fit …` (torch.distributed).

    learners   each learner lives on one rank, which writes its folder; ranks meet at the start and at the end
    batch      all ranks do the same, each on its own rows of every batch (`collective`); rank 0 alone writes
    latents    all ranks do the same, each for its own latents (`sharding`); rank 0 alone writes

Rank 0 owns what belongs to the run as a whole: its lock, plan, status and end. All ranks see one store and one run
folder. What is said here goes over gloo, from the CPU: nothing waits for a GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from common.errors import ConfigError, GranaryError, Interrupted, StoreError
from common.stopping import Stop

Mode = Literal["learners", "batch", "latents"]
T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)  # a rank that is gone is noticed by its closed connections, not by the clock
START_PATIENCE = datetime.timedelta(minutes=5)
POLL_S = 0.01
BEAT_S = 0.3  # between two looks at the other ranks
REPEATED_S = 3.0  # torchrun passes a signal on that may have reached the rank already: no second request
ELSEWHERE, LOST = "a signal to another rank", "the loss of another rank"


class RankLost(Interrupted):
    """Another rank ended, killed or failed, while this one waited for it; the same command goes on."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train the run: alone, unless torchrun started it.

    Attributes:
        rank: number of this process, from 0; `size`: how many there are.
        local_rank, local_size: the same among those of this machine.
        mode: how the work is shared.
        control: what ranks tell each other goes over; `data`: tensors of a step, for ranks in step.
        board: key-value store of all ranks, for what they tell of their learners.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    mode: Mode = "learners"
    control: Any = None
    data: Any = None
    board: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes the folders of its learners."""
        return self.first or self.mode == "learners"

    @property
    def in_step(self) -> bool:
        """Whether all ranks take every step together."""
        return self.size > 1 and self.mode != "learners"

    def sharing(self, mode: Mode) -> Ranks:
        """The same ranks, sharing the work in this way."""
        return replace(self, mode=mode)

    def linked(self, device: torch.device) -> Ranks:
        """The same ranks, able to sum tensors of this device where they go in step."""
        if not self.in_step:
            return self
        backend = "nccl" if device.type == "cuda" else "gloo"
        return replace(self, data=dist.new_group(backend=backend, timeout=PATIENCE))

    def own(self, learners: Sequence[T]) -> list[T]:
        """Of what is to be trained, this rank's part."""
        return list(learners)[self.rank :: self.size] if self.mode == "learners" else list(learners)

    def stop_of_all(self, own: Stop) -> Stop:
        """Whether any rank is asked to stop, from whether this one is."""
        if self.size == 1:
            return own
        own.patience_s = REPEATED_S
        return InStepStop(own, self) if self.in_step else LooseStop(own, self)

    def begin(self, stop: Stop) -> None:
        """From here on ranks hear of each other by `stop` alone, until all are done."""
        if isinstance(stop, JointStop):
            stop.begin()

    def all_done(self, stop: Stop, meanwhile: Callable[[], None]) -> None:
        """Wait until no rank has anything left to do, doing `meanwhile` now and then.

        Raises:
            Interrupted: one of them stopped, or is gone.
        """
        if isinstance(stop, JointStop):
            stop.all_done(meanwhile)

    def leave(self, stop: Stop) -> None:
        """Wait, stopped, until the others have stopped too: whoever leaves first would have the rest killed."""
        if isinstance(stop, JointStop):
            stop.leave()

    def device(self, device: torch.device) -> torch.device:
        """This rank's device: of a GPU without a number the one of the rank's own number.

        Raises:
            ConfigError: ranks in step need a GPU each.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        there = torch.cuda.device_count()
        if self.in_step and (device.index is not None or self.local_size > there):
            raise ConfigError(
                f"{self.local_size} ranks on this machine take a GPU each to split batches, and --device {device} has "
                f"{there if device.index is None else 1}. Start fewer with --nproc-per-node, or say --device cpu."
            )
        if device.index is None:
            device = torch.device("cuda", self.local_rank % there)
        torch.cuda.set_device(device)
        return device

    # ---- talking -------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Wait until every rank is here; signals are heard meanwhile.

        Raises:
            RankLost: one is gone.
        """
        if self.size > 1:
            finish_waiting(dist.all_reduce(torch.zeros(1), group=self.control, async_op=True))

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in the order of ranks."""
        if self.size == 1:
            return [value]
        self.meet()
        values: list[Any] = [None] * self.size
        with losing():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """What `action` gives here; where it fails on some rank, all fail with that error, which that rank tells."""
        value, error = attempt(action) if self.size > 1 else (action(), None)
        for rank, found in enumerate(self.gather(error)):
            if found is not None:
                raise said_by(rank == self.rank, found)
        return value  # type: ignore[return-value]

    def first_does(self, action: Callable[[], T]) -> T:
        """What `action` gives on rank 0, which alone does it; where it fails, all fail, and rank 0 tells."""
        if self.size == 1:
            return action()
        value, error = self.gather(attempt(action) if self.first else (None, None))[0]
        if error is not None:
            raise said_by(self.first, error)
        return value  # type: ignore[return-value]

    def tell(self, learners: dict[str, Any]) -> None:
        """Note where this rank's learners stand, for rank 0 to record."""
        if self.first or self.mode != "learners":
            return
        with contextlib.suppress(RuntimeError):  # the board may be gone with the rank that keeps it
            self.board.set(str(self.rank), json.dumps(learners))

    def told(self) -> dict[str, Any]:
        """Where the other ranks' learners stand, as last told."""
        found: dict[str, Any] = {}
        for rank in range(1, self.size if self.mode == "learners" else 1):
            with contextlib.suppress(RuntimeError):
                if self.board.check([str(rank)]):
                    found |= json.loads(self.board.get(str(rank)))
        return found


ALONE = Ranks()


def attempt(action: Callable[[], T]) -> tuple[T | None, GranaryError | None]:
    """What an action gives, or the user's error that it ends with."""
    try:
        return action(), None
    except GranaryError as error:
        return None, error
    except OSError as error:
        if error.filename is None:
            raise
        return None, StoreError(f"{error.filename}: {error.strerror}")


def said_by(here: bool, error: GranaryError) -> GranaryError:
    """An error of this or another rank, which is told to the user where it happened."""
    error.told_elsewhere = not here
    return error


@contextlib.contextmanager
def losing() -> Iterator[None]:
    """A collective that breaks in here is the loss of another rank.

    Raises:
        RankLost: it broke.
    """
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RankLost(
            f"another rank ended, so this one cannot go on ({first[:120]}). The same command goes on from the newest "
            "checkpoints."
        ) from None


def finish_waiting(work: Any, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait for a collective, signals heard and `meanwhile` done.

    Raises:
        RankLost: another rank is gone.
    """
    with losing():
        while not work.is_completed():
            meanwhile()
            time.sleep(POLL_S)
        work.wait()


@contextlib.contextmanager
def join_ranks() -> Iterator[Ranks]:
    """This process's place among the ranks that torchrun started, or alone where it did not.

    Raises:
        RankLost: the others do not answer.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield Ranks()
        return
    here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with losing():
        store, rank, size = next(rendezvous("env://", timeout=START_PATIENCE))
        if here[1] == size:  # what ranks said that torchrun has started anew since is still there
            store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=START_PATIENCE)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield Ranks(rank, size, *here, control=control, board=PrefixStore("standing", store))
    finally:
        dist.destroy_process_group()


class JointStop(Stop, ABC):
    """Whether any rank was asked to stop. Ranks ask each other by *beats*: sums of flags that run in the background.

    Attributes:
        heard: a beat said that some rank stops: every rank knows it, and none begins another beat.
        lost: a rank is gone.
    """

    def __init__(self, own: Stop, ranks: Ranks) -> None:
        super().__init__()
        self.own, self.ranks = own, ranks
        self.heard = self.lost = False
        self._work: Any = None
        self._flags = torch.zeros(2, dtype=torch.int64)

    def _begin(self, stopping: bool, done: bool = False) -> None:
        self._flags = torch.tensor([stopping, done], dtype=torch.int64)
        with losing():
            self._work = dist.all_reduce(self._flags, group=self.ranks.control, async_op=True)

    def begin(self) -> None:
        """See `Ranks.begin`."""

    @abstractmethod
    def all_done(self, meanwhile: Callable[[], None]) -> None:
        """See `Ranks.all_done`."""

    def _end(self, meanwhile: Callable[[], None] = lambda: None) -> int:
        """What a beat came to: how many ranks are done.

        Raises:
            RankLost: one is gone.
        """
        work, self._work = self._work, None
        try:
            finish_waiting(work, meanwhile)
        except RankLost:
            self.lost = True
            raise
        self.heard = bool(self._flags[0])
        return int(self._flags[1])

    def leave(self) -> None:
        """See `Ranks.leave`."""
        try:
            while not (self.heard or self.lost):
                if self._work is None:
                    self._begin(stopping=True)
                self._end()
            if not self.lost:
                self.ranks.meet()
        except RankLost:
            self.lost = True


class LooseStop(JointStop):
    """For ranks at their own pace: a request stops the rank that got it at once, the others within a beat or a step."""

    def __init__(self, own: Stop, ranks: Ranks) -> None:
        super().__init__(own, ranks)
        self._next_s = math.inf

    def begin(self) -> None:
        self._next_s = 0.0

    @property
    def asked(self) -> bool:
        if not self.signal_name:
            self.signal_name = self.own.signal_name or self._look()
        return bool(self.signal_name)

    def _look(self) -> str:
        """Why another rank's end or stop stops this one, or nothing; waits for nobody."""
        if self._work is None and time.monotonic() < self._next_s:
            return ""
        try:
            if self._work is None:
                self._begin(stopping=False)
            if not self._work.is_completed():
                return ""
            self._end()
        except RankLost:
            self.lost = True
            return LOST
        self._next_s = time.monotonic() + BEAT_S
        return ELSEWHERE if self.heard else ""

    def all_done(self, meanwhile: Callable[[], None]) -> None:
        n_done = 0
        while n_done < self.ranks.size:
            if self._work is None:
                self._begin(stopping=self.own.asked, done=True)
            n_done = self._end(meanwhile)
            if self.heard:
                name = self.own.signal_name or ELSEWHERE
                raise Interrupted(f"stopped by {name}, this rank's learners done. Go on with the same command.")
            time.sleep(POLL_S)


class InStepStop(JointStop):
    """For ranks in step, which ask equally often: all hear of a request at the same time, one call after it came."""

    @property
    def asked(self) -> bool:
        if not self.signal_name:
            if self._work is not None:
                self._end()
            if self.heard:
                self.signal_name = self.own.signal_name or ELSEWHERE
            else:
                self._begin(stopping=self.own.asked)
        return bool(self.signal_name)

    def all_done(self, meanwhile: Callable[[], None]) -> None:
        if self._work is not None:
            self._end()
        self.ranks.meet()
