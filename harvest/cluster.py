"""Worker processes, through dask.distributed: a few on this machine, or those of a scheduler elsewhere.

The one owner of distributed. A task is submitted only when a worker will soon have room for it, so stopping is quick
and a harvest of a million chunks is no burden on the scheduler. A worker that dies has its tasks done by another.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch

from common.console import say
from common.errors import ConfigError
from common.stopping import Stop

ANSWER_S = 5.0  # how long a scheduler may take to answer
LOOK_EVERY_S = 0.5  # how soon a signal or a lost worker is noticed
LONELY_S = 10.0  # without a worker for so long: say so
RESTART_S = 120.0  # how long worker processes of this machine may take to start, or to start again
THREADS = 2  # per worker: one chunk is in the model while another is written
HALF_A_GPU = {"GPU": 0.5}  # so two chunks share one GPU, and take turns in the model
# without the MALLOC_TRIM_THRESHOLD_ that dask sets: with it every large tensor is new memory from the kernel, and a
# pass takes twice as long
ONE_THREAD = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}
MODULES = ["granary", "harvest.worker", "transformer_lens.model_bridge"]  # imported once, for all workers here

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass
class Cluster:
    """Workers to hand tasks to.

    Attributes:
        client: of `distributed`.
        device: what the workers compute on: cpu or cuda.
        threads: of PyTorch in each worker; None leaves it to the worker.
        lost: workers that went away.
        n_workers: as many as there were when last looked, at least one.
        patience_s: without any worker for so long, give up; workers elsewhere may come at any time.
    """

    client: Any
    device: str
    threads: int | None = None
    lost: int = 0
    n_workers: int = 1
    patience_s: float = float("inf")
    _seen: set[str] = field(default_factory=set)
    _alone_since: float | None = None
    _said: bool = False

    def each(self, function: Callable[[Task], Result], tasks: Iterable[Task], stop: Stop) -> Iterator[Result]:
        """`function` of every task, in the order they end. When asked to stop, of those that have begun.

        Raises:
            GranaryError: one that `function` raised.
            ConfigError: a task killed worker after worker.
        """
        run, to_come = uuid.uuid4().hex[:8], enumerate(tasks)
        under_way: list[Any] = []
        resources = HALF_A_GPU if self.device == "cuda" else None
        try:
            while True:
                slots = self.slots()
                if stop.asked:
                    to_come = enumerate(())
                    begun = slots if self._seen else 0  # first come, first begun: the rest only waits
                    self.client.cancel(under_way[begun:], force=True)
                    del under_way[begun:]
                for number, task in islice(to_come, max(slots + slots // THREADS - len(under_way), 0)):
                    key = f"granary-{run}-{number}"
                    under_way.append(self.client.submit(function, task, key=key, pure=False, resources=resources))
                if not under_way:
                    return
                for future in self.finished(under_way):
                    under_way.remove(future)
                    yield result_of(future)
        finally:
            self.client.cancel(under_way, force=True)

    def slots(self) -> int:
        """How many tasks can run now, at least one; notices workers that went.

        Raises:
            ConfigError: all of them, and none came back; or the scheduler.
        """
        try:
            threads: dict[str, int] = self.client.nthreads()
        except (OSError, RuntimeError):
            raise gone_scheduler() from None
        gone = self._seen - threads.keys()
        for address in sorted(gone):
            self.lost += 1
            say(f"worker {address} is gone: others do its chunks again")
        self._seen, self.n_workers = set(threads), max(len(threads), 1)
        self.bear_being_alone(bool(threads))
        return max(sum(min(count, THREADS) for count in threads.values()), 1)

    def bear_being_alone(self, company: bool) -> None:
        """Say once that no worker is there, and give up in the end.

        Raises:
            ConfigError: no worker for `patience_s`.
        """
        now = time.monotonic()
        if company or self._alone_since is None:
            self._alone_since, self._said = (None if company else now), False
        elif now - self._alone_since > self.patience_s:
            raise ConfigError("all workers ended and none could be started again. Run the same command once more.")
        elif now - self._alone_since > LONELY_S and not self._said:
            say("no worker is there; waiting for one (Ctrl-C stops)")
            self._said = True

    def finished(self, futures: list[Any]) -> list[Any]:
        """Those that have ended, after waiting a moment for one of them.

        Raises:
            ConfigError: the scheduler went away.
        """
        from distributed import wait

        if self.client.status not in ("running", "connecting"):
            raise gone_scheduler()
        with contextlib.suppress(TimeoutError), self.client.as_current():
            wait(futures, timeout=LOOK_EVERY_S, return_when="FIRST_COMPLETED")
        return [future for future in futures if future.done()]


def gone_scheduler() -> ConfigError:
    return ConfigError("the scheduler went away. Start it again, and workers, then run the same command.")


def result_of(future: Any) -> Any:
    """What a task returned.

    Raises:
        GranaryError: what it raised.
        ConfigError: workers died over it, or lack Granary.
    """
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        raise ConfigError(
            f"{error.allowed_failures + 1} workers died one after another over the same chunk, the last one "
            f"{error.last_worker.address}: most likely out of memory. Take fewer --workers, a smaller --batch-size "
            "or --chunk-sequences, or machines with more memory."
        ) from None
    except ModuleNotFoundError as error:
        raise ConfigError(f"a worker cannot import {error.name}. Install Granary where the workers run.") from None


@contextlib.contextmanager
def remote(address: str, device: str) -> Iterator[Cluster]:
    """The workers of a scheduler that runs somewhere.

    Raises:
        ConfigError: nobody answers there within seconds.
    """
    from distributed import Client

    quiet()
    try:
        client = Client(address, timeout=f"{ANSWER_S:.0f}s", set_as_default=False)
    except (OSError, ValueError):
        raise ConfigError(
            f"--dask {address}: no scheduler answers there within {ANSWER_S:.0f} seconds. "
            "Start one with 'dask scheduler', and workers with 'dask worker ADDRESS'."
        ) from None
    try:
        yield Cluster(client, device_of(client.scheduler_info(n_workers=-1), device, address))
    finally:
        client.close()


def device_of(scheduler: dict[str, Any], asked: str, address: str) -> str:
    """The kind of device that the workers compute on: as asked, or cuda if one of them offers the resource GPU.

    Raises:
        ConfigError: a GPU is asked for and no worker offers one; or nothing is asked for and no worker is there.
    """
    workers = scheduler["workers"].values()
    gpus = any(worker["resources"].get("GPU") for worker in workers)
    if asked == "auto" and not workers:
        raise ConfigError(f"--dask {address}: no worker is there yet. Start one, or say --device cpu or --device cuda.")
    kind = asked.split(":")[0]
    if kind == "cuda" and workers and not gpus:
        raise ConfigError(
            f"--device {asked}: no worker of {address} offers a GPU. Start them with: dask worker --resources GPU=1"
        )
    return kind if kind != "auto" else "cuda" if gpus else "cpu"


@contextlib.contextmanager
def local(n_workers: int, device: str) -> Iterator[Cluster]:
    """Workers on this machine, each a process; the GPUs are dealt out among them. They end with this process."""
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster
    from distributed.utils import get_mp_context

    quiet()
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"},
    }
    settings = {
        "distributed.worker.multiprocessing-method": "forkserver",
        "distributed.admin.log-length": 0,
        "distributed.nanny.pre-spawn-environ": ONE_THREAD,
    }
    with dask.config.set(settings):
        context = get_mp_context()
        assert isinstance(context, multiprocessing.context.ForkServerContext)
        context.set_forkserver_preload(MODULES)
        workers = {
            number: {"cls": Nanny, "options": worker_options(number % gpus if gpus else None)}
            for number in range(n_workers)
        }
        with (
            SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            threads = max(torch.get_num_threads() // n_workers, 1)
            yield Cluster(client, device, threads, patience_s=RESTART_S)


def worker_options(gpu: int | None) -> dict[str, Any]:
    return {
        "nthreads": THREADS,
        "memory_limit": 0,  # chunks bound it; dask would count mapped files and kill the worker
        "preload": ["harvest.worker"],
        "env": {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)},
        "resources": {} if gpu is None else {"GPU": 1},
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
    }


def quiet() -> None:
    """No log lines of distributed, whose modules have levels of their own: what a person must know is said here."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "distributed":
            logging.getLogger(name).setLevel(logging.CRITICAL)
