"""Chunks spread over worker processes: the same bytes as on one machine, whoever dies in the middle."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import pytest
from distributed import KilledWorker

from common.checks import problems
from common.errors import ConfigError, StoreError
from common.files import canonical_json
from common.journal import Journal
from common.layout import DOCUMENTS, TOKENS, acts_array
from common.sources import find_model
from common.stopping import Stop
from common.store import Store
from harvest.cluster import Cluster, device_of, local, result_of
from harvest.worker import ChunkTask, ModelRecipe, Pass, harvest_chunk
from tests.conftest import HOOK
from tests.stores import metadata_files, unequal
from tests.warm import Child, WarmServer, wait_for

N_CHUNKS = 59
TOKENISED = 2 * N_CHUNKS  # lines of the journal once every chunk's tokens and documents are there
LINES = TOKENISED + 3 * N_CHUNKS


@pytest.fixture(scope="module")
def command(tiny_model: Path, texts: Path) -> Callable[..., list[str]]:
    """`harvest run` of 59 chunks of 8 sequences at one hook; a batch is wider than a chunk."""

    def build(out: Path, *more: str) -> list[str]:
        sizes = ["--tokens", "30000", "--context", "64", "--chunk-sequences", "8"]
        places = ["--model", str(tiny_model), "--corpus", str(texts), "--out", str(out), "--layer", "1"]
        return ["harvest", "run", *places, *sizes, "--device", "cpu", *more]

    return build


@pytest.fixture(scope="module")
def alone(warm: WarmServer, command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    ended = warm.run(command(folder / "x.zarr"), folder)
    assert ended.code == 0, ended.err
    return folder / "x.zarr"


@pytest.fixture(scope="module")
def scheduler(warm: WarmServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dask scheduler in a process of its own."""
    folder = tmp_path_factory.mktemp("scheduler")
    file = folder / "scheduler.json"
    at = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    child = warm.start(["dask", "scheduler", *at], folder)
    wait_for(lambda: file.exists() and file.read_text().endswith("}"))
    yield json.loads(file.read_text())["address"]
    child.kill()


@pytest.fixture
def workers(warm: WarmServer, scheduler: str, tmp_path: Path) -> Iterator[list[Child]]:
    """Two worker processes of that scheduler; nobody starts them again when they are killed."""
    options = ["--no-nanny", "--nthreads", "2", "--no-dashboard", "--memory-limit", "0"]
    folder = tmp_path / "workers"
    folder.mkdir()
    children = [warm.start(["dask", "worker", scheduler, *options], folder) for _ in range(2)]
    wait_for(lambda: all("Starting established connection" in child.err_so_far() for child in children))
    yield children
    for child in children:
        if Path(f"/proc/{child.pid}").exists():
            child.kill()


def lines(path: Path) -> int:
    journal = path / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def holds_the_same(path: Path, alone: Path) -> None:
    """Every array, their metadata and the identity; nothing twice, nothing left over."""
    assert unequal(path, alone) == []
    assert (path / "journal.jsonl").read_bytes() == (alone / "journal.jsonl").read_bytes()
    assert metadata_files(path) == metadata_files(alone)
    store = Store.open(path)
    assert store.id == Store.open(alone).id
    assert lines(path) == lines(alone)  # no chunk was committed a second time
    assert store.leftovers() == []
    assert list(problems(store)) == []


def test_worker_killed_in_the_middle_loses_and_doubles_nothing(
    warm: WarmServer,
    command: Callable[..., list[str]],
    alone: Path,
    scheduler: str,
    workers: list[Child],
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.zarr"
    child = warm.start(command(path, "--dask", scheduler), tmp_path)
    wait_for(lambda: lines(path) >= TOKENISED + 3 or child.ended())
    assert workers[0].kill().code == -signal.SIGKILL
    assert lines(path) < LINES  # in the middle
    ended = child.wait()
    assert ended.code == 0, ended.err
    assert "is gone: others do its chunks again" in ended.err
    holds_the_same(path, alone)


def test_coordinator_killed_or_stopped_goes_on_by_the_same_command(
    warm: WarmServer,
    command: Callable[..., list[str]],
    alone: Path,
    scheduler: str,
    workers: list[Child],
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.zarr"
    argv = command(path, "--dask", scheduler)
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        child = warm.start(argv, tmp_path)
        before = max(lines(path), TOKENISED)
        wait_for(lambda before=before, child=child: lines(path) >= before + 6 or child.ended())
        child.signal(number)
        ended = child.wait()
        assert ended.code == code, ended.err
        assert before < lines(path) < LINES
    assert "Interrupted: stopped by SIGTERM after" in ended.err
    assert list(problems(Store.open(path))) == []
    ended = warm.run(argv, tmp_path)
    assert ended.code == 0, ended.err
    holds_the_same(path, alone)


@pytest.mark.slow
def test_workers_of_this_machine_give_the_same_bytes(
    warm: WarmServer, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    alone, path = tmp_path / "alone.zarr", tmp_path / "x.zarr"
    assert warm.run(command(alone, "--dtype", "int8"), tmp_path).code == 0  # its scales are measured by a worker too
    ended = warm.run(command(path, "--dtype", "int8", "--workers", "2", "--json"), tmp_path)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["tokens_harvested_now"] == 469 * 64
    assert [line for line in ended.err.splitlines() if not line.startswith(("tokenise", "harvest"))] == []
    holds_the_same(path, alone)
    again = warm.run(command(path, "--dtype", "int8", "--workers", "2"), tmp_path)
    assert "nothing left to do" in again.err


def test_cli_errors_of_clusters_are_one_line(
    warm: WarmServer, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    cases = [
        (["--dask", "tcp://127.0.0.1:9"], "ConfigError: --dask tcp://127.0.0.1:9: no scheduler answers there within"),
        (["--dask", "nowhere"], "ConfigError: --dask nowhere: no scheduler answers there within 5 seconds."),
        (["--dask", "tcp://127.0.0.1:9", "--workers", "2"], "ConfigError: harvest run: --workers starts processes"),
        (["--workers", "0"], "ConfigError: --workers 0: "),
    ]
    for more, message in cases:
        ended = warm.run(command(tmp_path / "x.zarr", *more), tmp_path)
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
        assert ended.err.startswith(message)
    assert not (tmp_path / "x.zarr").exists()


# ---- one task, in this process --------------------------------------------------------------------------------


@pytest.fixture
def task(alone: Path, tiny_model: Path) -> Callable[..., ChunkTask]:
    """Builds the task of chunk 3, with some of it changed."""

    def build(model: Path = tiny_model, path: Path = alone, identity: str | None = None) -> ChunkTask:
        store = Store.open(alone)
        known = canonical_json(find_model(str(tiny_model)).identity())
        recipe = ModelRecipe(str(model), None, None, "cpu", "float32", identity or known)
        shared = Pass(recipe, ((HOOK, 16),), "bfloat16", 8, 64, 32, None)
        entries = tuple(store.journal.entries[array, 3] for array in (TOKENS, DOCUMENTS))
        return ChunkTask(shared, str(path), store.header, 3, entries)

    return build


def test_chunk_computed_twice_lies_aside_twice_and_counts_once(
    task: Callable[..., ChunkTask], alone: Path, tmp_path: Path
) -> None:
    store = Store.create(tmp_path / "x.zarr", Store.open(alone).header)
    entries = task().entries
    for entry in entries:
        data = Store.open(alone).map_chunk(entry.array, 3)
        store.commit([(entry.array, 3, data, entry.extra)])
    first, second = harvest_chunk(task(path=store.path)), harvest_chunk(task(path=store.path))
    assert first.batch_size is None  # memory did not run out
    asides = [item.aside for done in (first, second) for hook in done.hooks for item in hook.files]
    assert len(store.leftovers()) == len(set(asides)) == len(asides) == 6
    assert Store.open(store.path).committed(acts_array(HOOK)) == []  # nothing counts before it is published
    store.publish(first.hooks[0].files)
    assert Store.open(store.path).usable_chunks(HOOK) == [3]
    assert store.map_chunk(acts_array(HOOK), 3, verify=True).tobytes() == (
        Store.open(alone).map_chunk(acts_array(HOOK), 3).tobytes()
    )
    assert len(store.leftovers()) == 3


def test_task_errors_name_the_worker(task: Callable[..., ChunkTask], tmp_path: Path) -> None:
    where = r"^worker on \S+, process \d+: "
    with pytest.raises(ConfigError, match=where + f"--model {tmp_path}/gone: no such folder."):
        harvest_chunk(task(model=tmp_path / "gone"))
    with pytest.raises(ConfigError, match=where + ".*another model lies there"):
        harvest_chunk(task(identity='{"weights":"other"}'))
    with pytest.raises(StoreError, match=where + f"{tmp_path}: no store here. It must lie where all workers"):
        harvest_chunk(task(path=tmp_path))


def test_result_of_a_task_that_killed_its_workers_is_a_clear_error() -> None:
    def die() -> None:
        raise KilledWorker("granary-1", SimpleNamespace(address="tcp://10.0.0.2:1234"), 3)  # type: ignore[arg-type]

    def lack() -> None:
        raise ModuleNotFoundError("No module named 'harvest'", name="harvest")

    with pytest.raises(ConfigError, match=r"4 workers died .* the last one tcp://10.0.0.2:1234: most likely out of"):
        result_of(SimpleNamespace(result=die))
    with pytest.raises(ConfigError, match=r"a worker cannot import harvest\. Install Granary where"):
        result_of(SimpleNamespace(result=lack))


def test_workers_here_keep_the_memory_that_tensors_gave_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        pass

    def begin(**_: Any) -> None:
        seen.update(dask.config.get("distributed.nanny.pre-spawn-environ"))
        raise Begun

    seen: dict[str, Any] = {}
    monkeypatch.setattr("distributed.SpecCluster", begin)
    with pytest.raises(Begun), local(2, "cpu"):
        pass
    assert seen == {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}  # no MALLOC_TRIM_THRESHOLD_


def test_cluster_without_workers_says_so_once_and_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("harvest.cluster.time", SimpleNamespace(monotonic=lambda: clock[0]))
    there: dict[str, int] = {"tcp://a": 2, "tcp://b": 8}
    cluster = Cluster(SimpleNamespace(nthreads=lambda: there), "cpu", patience_s=100.0)
    assert (cluster.slots(), cluster.n_workers) == (4, 2)  # a worker needs no more than two chunks at a time
    there.clear()
    for clock[0] in (1.0, 5.0, 12.0, 30.0):
        assert cluster.slots() == 1
    assert cluster.lost == 2
    assert capsys.readouterr().err.count("no worker is there; waiting for one") == 1
    clock[0] = 102.0
    with pytest.raises(ConfigError, match="all workers ended and none could be started again"):
        cluster.slots()
    there["tcp://c"] = 1
    assert cluster.slots() == 1


@pytest.mark.parametrize(("threads", "begun"), [({}, 0), ({"tcp://a": 2}, 2)])
def test_stop_drops_what_has_not_begun(monkeypatch: pytest.MonkeyPatch, threads: dict[str, int], begun: int) -> None:
    dropped: list[str] = []
    client = SimpleNamespace(
        nthreads=lambda: threads,
        submit=lambda function, task, **_: SimpleNamespace(result=lambda: function(task), task=task),
        cancel=lambda futures, force: dropped.extend(future.task for future in futures),
    )
    stop = Stop()

    def finished(self: Cluster, futures: list[Any]) -> list[Any]:
        if not stop.asked:
            stop.request(signal.SIGTERM)
            return []
        return futures[:1]

    monkeypatch.setattr(Cluster, "finished", finished)
    done = list(Cluster(client, "cpu").each(str.upper, ["a", "b", "c", "d"], stop))
    assert done == ["A", "B"][:begun]
    assert dropped == ["a", "b", "c"][begun : max(begun + begun // 2, 1)]


def test_device_of_a_cluster_is_what_its_workers_offer() -> None:
    plain, gpu = {"resources": {}}, {"resources": {"GPU": 1.0}}
    assert device_of({"workers": {"a": plain}}, "auto", "tcp://s") == "cpu"
    assert device_of({"workers": {"a": plain, "b": gpu}}, "auto", "tcp://s") == "cuda"
    assert device_of({"workers": {"a": gpu}}, "cpu", "tcp://s") == "cpu"
    assert device_of({"workers": {}}, "cuda", "tcp://s") == "cuda"  # they may come
    with pytest.raises(ConfigError, match=r"--device cuda: no worker of tcp://s offers a GPU\. Start them with"):
        device_of({"workers": {"a": plain}}, "cuda", "tcp://s")
    with pytest.raises(ConfigError, match=r"--dask tcp://s: no worker is there yet\. Start one, or say --device"):
        device_of({"workers": {}}, "auto", "tcp://s")


def test_journal_of_given_entries_reads_no_file(alone: Path) -> None:
    entry = Store.open(alone).journal.entries[TOKENS, 3]
    journal = Journal(alone / "journal.jsonl", (entry,))
    assert journal.entries == {(TOKENS, 3): entry}
