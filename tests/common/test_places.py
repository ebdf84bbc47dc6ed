"""Stores behind URLs: what an object store of this machine holds is what a folder would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from pydantic import TypeAdapter

from common.checks import problems
from common.errors import ConfigError, StoreError
from common.files import ASIDE, crc32c, exclusive
from common.layout import TOKENS, acts_array
from common.places import Bucket, Location, local_path, mirrors, url_of
from common.store import Store
from harvest.check import recompute
from tests.conftest import HOOK
from tests.harvest.conftest import finished as finished
from tests.harvest.conftest import go, small
from tests.stores import array_files, filled
from train.data.reader import Batches


@pytest.fixture(autouse=True)
def mirror_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRANARY_MIRRORS", str(tmp_path / "mirrors"))
    return tmp_path / "mirrors"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server on this machine."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of an empty bucket."""
    for name, value in (("ENDPOINT_URL", server), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"b{abs(hash(str(tmp_path)))}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"


def test_mirror_path_tells_the_url(mirror_folder: Path) -> None:
    path = local_path("s3://grain/a/x.zarr")
    assert path == mirrors() / "s3" / "grain" / "a" / "x.zarr"
    assert url_of(path) == "s3://grain/a/x.zarr"
    assert url_of(Path("cache/x.zarr")) is None
    assert local_path("cache/x.zarr") == Path("cache/x.zarr")


def test_folder_may_be_said_with_a_tilde_and_as_a_file_url(tmp_path: Path) -> None:
    assert local_path(f"file://{tmp_path}/x.zarr") == tmp_path / "x.zarr"
    assert TypeAdapter(Location).validate_python("~/x.zarr") == Path.home() / "x.zarr"
    assert TypeAdapter(Location).validate_python("file:///x.zarr") == Path("/x.zarr")


def test_chunk_of_an_object_store_is_mapped_without_a_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, values = filled(local_path("memory://unlisted/x.zarr"))
    store = Store.open(made.path)
    monkeypatch.setattr(Bucket, "listing", None)
    assert np.array_equal(store.map_chunk(TOKENS, 1, verify=True), values[TOKENS][4:8])


def test_chunk_that_another_process_is_fetching_is_fetched_beside_it(tmp_path: Path) -> None:
    held = Bucket(tmp_path / "mirror", "memory://beside/x.zarr")
    held.write("acts/c/0", b"whole")
    theirs = tmp_path / "mirror" / "acts" / "c" / ("0" + ASIDE)
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"half of")
    assert held.local("acts/c/0", crc32c(b"whole")).read_bytes() == b"whole"
    assert theirs.read_bytes() == b"half of"


def test_chunk_that_a_worker_said_it_wrote_and_is_not_there_is_one_line(tmp_path: Path) -> None:
    held = Bucket(tmp_path / "mirror", "memory://lost/x.zarr")
    assert held.size("acts/c/0") is None
    with pytest.raises(StoreError, match=r"^memory://lost/x\.zarr/acts/c/0: FileNotFoundError: "):
        held.publish("acts/c/0", "acts/c/0")


def test_bucket_of_an_unknown_kind_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere://x/y: Protocol not known: nowhere"):
        Store.open("nowhere://x/y")
    with pytest.raises(StoreError, match=r"^memory://none/x\.zarr: no store here"):
        Store.open("memory://none/x.zarr")


def test_store_in_an_object_store_holds_what_one_in_a_folder_does(
    bucket: str, finished: Path, tiny_model: Path, texts: Path, mirror_folder: Path
) -> None:
    url = f"{bucket}/x.zarr"
    outcome = go(small(tiny_model, texts, local_path(url)))
    assert outcome.tokens_harvested_now == 1600
    store, alone = Store.open(url), Store.open(finished)
    assert store.id == alone.id
    held = Bucket(local_path(url), url)
    assert {name: held.read(name) for name in held.listing() if "/c/" in name} == array_files(finished)
    assert [name for name in held.listing() if name.startswith("journal/")] == ["journal/0000000009.jsonl"]  # folded
    assert list(problems(store)) == []
    assert list(recompute(store)) == []  # read by zarr-python, straight from the server
    assert not list(mirror_folder.rglob("acts/**/0"))  # nothing was fetched for that
    go(small(tiny_model, texts, local_path(url), tokens=3000))  # goes on from what lies there
    assert Store.open(url).n_sequences == 94


def test_batches_of_an_object_store_are_those_of_a_folder(
    bucket: str, finished: Path, tiny_model: Path, texts: Path, mirror_folder: Path
) -> None:
    url = f"{bucket}/x.zarr"
    go(small(tiny_model, texts, local_path(url)))

    def first(location: str | Path) -> np.ndarray:
        batches = Batches.of(Store.open(location))
        x = batches.batch(0, 256).x.float().numpy()
        batches.close()
        return x

    expected = first(finished)
    assert np.array_equal(first(url), expected)
    kept = sorted(mirror_folder.rglob(f"acts/{HOOK}/c/*/0/0"))
    assert len(kept) == 4
    kept[1].write_bytes(b"x" * kept[1].stat().st_size)  # damaged here: fetched again
    assert np.array_equal(first(url), expected)


def test_journal_cut_off_in_an_object_store_goes_on_without_doing_twice(
    bucket: str, finished: Path, tiny_model: Path, texts: Path
) -> None:
    url = f"{bucket}/x.zarr"
    go(small(tiny_model, texts, local_path(url)))
    store = Store.open(url)
    store.journal.rewrite(drop=[(acts_array(HOOK), 2)])
    outcome = go(small(tiny_model, texts, local_path(url)))
    assert outcome.tokens_harvested_now == 16 * 32
    held = Bucket(local_path(url), url)
    assert {name: held.read(name) for name in held.listing() if "/c/" in name} == array_files(finished)


def test_harvest_into_a_url_that_is_taken_names_the_url(
    tiny_model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = local_path("memory://taken/x.zarr")
    Bucket(path, "memory://taken/x.zarr").write("letter.txt", b"mine")
    with pytest.raises(StoreError, match=r"^memory://taken/x\.zarr: other files are here, and no store\."):
        go(small(tiny_model, texts, path))
    with exclusive(path, "store"), pytest.raises(StoreError, match=r"^memory://taken/x\.zarr: another process is"):
        go(small(tiny_model, texts, path))


def test_object_store_that_does_not_answer_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Bucket(local_path(f"{bucket}x/y.zarr"), f"{bucket}x/y.zarr")
    with pytest.raises(StoreError, match=f"^{bucket}x/y.zarr/a: "):
        held.write("a", b"1")  # no such bucket
