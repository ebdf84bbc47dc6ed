"""Texts as a stream of documents."""

from __future__ import annotations

import errno
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import corpus
from common.corpus import CorpusOptions, HubCorpus, LocalCorpus, StdlibCorpus, open_corpus, stdlib_documents
from common.errors import ConfigError, DataError


def documents(path: Path, **options: object) -> list[str]:
    return list(open_corpus(CorpusOptions(name=str(path), **options)).documents())  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three kinds of files, seven documents, two blank ones."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "notes.md").write_text("not a text for us")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three", "id": 3}\n{"text": " "}\n')
    pq.write_table(pa.table({"text": ["four", None, "", "five", "six"]}), tmp_path / "deep" / "c.parquet")
    (tmp_path / "deep" / "d.txt").write_text("seven é")
    return tmp_path


def test_corpus_one_text_file_is_one_document(folder: Path) -> None:
    assert documents(folder / "a.txt") == ["one"]


def test_corpus_separator_splits_text_files(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one<|end|>two<|end|>\n<|end|>three")
    assert documents(tmp_path / "x.txt", separator="<|end|>") == ["one", "two", "three"]


def test_corpus_jsonl_and_parquet_leave_blank_rows_out(folder: Path) -> None:
    assert documents(folder / "b.jsonl") == ["two", "three"]
    assert documents(folder / "deep" / "c.parquet") == ["four", "five", "six"]


def test_corpus_column_names_another_field(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"content": "one"}\n')
    pq.write_table(pa.table({"content": ["two"], "text": ["no"]}), tmp_path / "x.parquet")
    assert documents(tmp_path / "x.jsonl", column="content") == ["one"]
    assert documents(tmp_path / "x.parquet", column="content") == ["two"]


def test_corpus_folder_holds_every_text_under_it_in_an_order_of_the_seed(folder: Path) -> None:
    texts = ["one", "two", "three", "four", "five", "six", "seven é"]
    orders = {tuple(documents(folder, seed=seed)) for seed in range(8)}
    assert all(sorted(order) == sorted(texts) for order in orders)
    assert len(orders) > 1
    assert documents(folder, seed=3) == documents(folder, seed=3)


def test_corpus_folder_leaves_out_the_stores_under_it(folder: Path) -> None:
    before = open_corpus(CorpusOptions(name=str(folder))).identity()
    (folder / "cache" / "x.zarr").mkdir(parents=True)
    (folder / "cache" / "x.zarr" / "journal.jsonl").write_text('{"array": "tokens"}\n')
    assert open_corpus(CorpusOptions(name=str(folder))).identity() == before


def test_corpus_without_a_name_is_not_the_folder_one_is_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="--corpus: it is empty"):
        open_corpus(CorpusOptions(name=""))


@pytest.mark.parametrize("start", [0, 1, 3, 7, 9])
def test_corpus_documents_from_a_start_equal_skipping(folder: Path, start: int) -> None:
    opened = open_corpus(CorpusOptions(name=str(folder)))
    assert list(opened.documents(start)) == list(opened.documents())[start:]


def test_corpus_identity_follows_content_not_place(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def identity(path: Path, **options: object) -> str:
        return json.dumps(open_corpus(CorpusOptions(name=str(path), **options)).identity())  # type: ignore[arg-type]

    other = tmp_path_factory.mktemp("other") / folder.name
    (other / "deep").mkdir(parents=True)
    for file in folder.rglob("*.*"):
        (other / file.relative_to(folder)).write_bytes(file.read_bytes())
    assert identity(other) == identity(folder)
    assert identity(folder, separator="x") != identity(folder)
    (other / "a.txt").write_text("One")
    assert identity(other) != identity(folder)


def test_corpus_empty_file_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    assert documents(tmp_path / "x.txt") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": \n', r"x\.jsonl line 2: not valid JSON"),
        ("x.jsonl", '{"texts": "a"}\n', r"x\.jsonl line 1: no text under 'text'\. Say which with --column"),
        ("x.jsonl", '{"text": 5}\n', "line 1: no text under 'text'"),
        ("x.jsonl", '["text"]\n', "line 1: no text under 'text'"),
        ("x.parquet", "PAR0", r"x\.parquet: not a readable parquet file"),
    ],
)
def test_corpus_names_the_file_and_line_that_is_bad(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / name)


def test_corpus_jsonl_with_bytes_that_are_no_utf8_is_read_as_text_files_are(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert documents(tmp_path / "x.jsonl") == ["caf\N{REPLACEMENT CHARACTER}"]


def test_corpus_jsonl_with_half_a_surrogate_pair_is_text_that_can_be_encoded(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(r'{"text": "a\ud800b\ud83d\ude00c\udc00"}' + "\n")
    assert documents(tmp_path / "x.jsonl") == ["a\ufffdb\U0001f600c\ufffd"]


def test_corpus_of_the_folder_one_is_in_has_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_corpus(CorpusOptions(name=str(folder))).identity()
    monkeypatch.chdir(folder)
    assert open_corpus(CorpusOptions(name=".")).identity() == expected
    monkeypatch.chdir("deep")
    assert open_corpus(CorpusOptions(name="..")).identity() == expected


def test_corpus_parquet_with_a_damaged_page_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"{number} grains" for number in range(3000)]}), tmp_path / "x.parquet")
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[100:3000] = bytes(2900)
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.parquet: not a readable parquet file \("):
        documents(tmp_path / "x.parquet")


class Rows:
    """A streamed data set of the hub, whose connection ends after its rows."""

    def __init__(self, *rows: dict[str, object]) -> None:
        self.rows = rows

    def shuffle(self, seed: int, buffer_size: int) -> Iterator[dict[str, object]]:
        yield from self.rows
        raise ConnectionError("reset by peer")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[str]]:
    """The documents of a hub data set of these rows."""
    monkeypatch.setattr(HubCorpus, "identity", lambda self: {"revision": "f00d"})

    def made(*rows: dict[str, object]) -> Iterator[str]:
        streamed = SimpleNamespace(load_dataset=lambda *_, **__: Rows(*rows))
        monkeypatch.setitem(sys.modules, "datasets", streamed)  # the real one takes seconds to import
        return open_corpus(CorpusOptions(name="a/b")).documents(1)

    return made


def test_corpus_of_the_hub_gives_its_texts_until_it_breaks_off(hub: Callable[..., Iterator[str]]) -> None:
    texts = hub({"text": "one"}, {"text": " "}, {"text": None}, {"text": "two"}, {"text": "three"})
    assert [next(texts), next(texts)] == ["two", "three"]
    with pytest.raises(ConfigError, match=r"--corpus a/b: .* can be reached \(ConnectionError: reset by peer\)\. "):
        next(texts)


def test_corpus_of_the_hub_names_a_wrong_column(hub: Callable[..., Iterator[str]]) -> None:
    with pytest.raises(ConfigError, match=r"--corpus a/b: column 'text' holds int, not text\."):
        next(hub({"text": 5}))
    with pytest.raises(ConfigError, match=r"--corpus a/b: no column 'text'\. Did you mean 'texts'\?"):
        next(hub({"texts": "one"}))


def test_corpus_parquet_without_the_column_names_the_nearest(tmp_path: Path) -> None:
    pq.write_table(pa.table({"texts": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column 'text'\. Say which with --column\. Did you mean 'texts'\?"):
        documents(tmp_path / "x.parquet")


def test_corpus_parquet_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: column 'text' holds int64, not text\. Say which with --column\."):
        documents(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "none.txt", "~/no-such-folder"])
def test_corpus_missing_path_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--corpus {name}: no such file or folder\."):
        open_corpus(CorpusOptions(name=name))


def test_corpus_folder_without_texts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("no")
    for path in (tmp_path, tmp_path / "x.md"):
        with pytest.raises(ConfigError, match=r"no \.txt, \.jsonl, \.parquet file here\."):
            open_corpus(CorpusOptions(name=str(path)))


def test_corpus_hub_name_offline_fails_in_one_line() -> None:
    opened = open_corpus(CorpusOptions(name="nobody/nothing-at-all"))
    with pytest.raises(ConfigError, match="neither a local path nor a hub data set that can be reached") as caught:
        opened.identity()
    assert "\n" not in str(caught.value)


def test_corpus_stdlib_splits_are_disjoint_by_module() -> None:
    train = {path.split("/")[0] for path, _ in stdlib_documents("train")}
    held_out = {path.split("/")[0] for path, _ in stdlib_documents("heldout")}
    assert not train & held_out
    assert len(train) > 5 * len(held_out) > 0
    assert not any("site-packages" in path or "/test/" in path for path, _ in stdlib_documents("heldout"))


def test_corpus_stdlib_has_a_split_of_its_own_and_no_other() -> None:
    opened = open_corpus(CorpusOptions(name="stdlib", split="heldout"))
    assert isinstance(opened, StdlibCorpus)
    every = list(opened.documents())
    assert every[2:] == list(opened.documents(2))
    assert sorted(every) == sorted(text for _, text in stdlib_documents("heldout"))
    with pytest.raises(ConfigError, match=r"no such split\. Did you mean 'heldout'\?"):
        open_corpus(CorpusOptions(name="stdlib", split="held-out"))


def test_corpus_stdlib_can_be_some_of_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"asyncio/base.py": "one", "asyncio/sub/x.py": "two", "asynchat.py": "three", "json/a.py": "four"}
    monkeypatch.setattr("common.corpus.stdlib_documents", lambda split: iter(files.items()))
    some = open_corpus(CorpusOptions(name="stdlib:asyncio, json"))
    assert sorted(some.documents()) == ["four", "one", "two"]
    assert list(open_corpus(CorpusOptions(name="stdlib:asynchat")).documents()) == ["three"]
    names = ["stdlib", "stdlib:asyncio", "stdlib:json"]
    assert len({str(open_corpus(CorpusOptions(name=name)).identity()) for name in names}) == 3
    with pytest.raises(ConfigError, match=r"stdlib has no module 'asincio'\. Did you mean 'asyncio'\?"):
        open_corpus(CorpusOptions(name="stdlib:json,asincio"))


def test_corpus_prefers_a_path_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "x.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_corpus(CorpusOptions(name="books")), LocalCorpus)


def test_corpus_hub_without_network_fails_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as unused:  # bound, not listening: a connection is refused
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        started = time.monotonic()
        with pytest.raises(ConfigError, match="the hub does not answer") as caught:
            next(open_corpus(CorpusOptions(name="nobody/nothing-at-all")).documents())
    assert time.monotonic() - started < 5  # the hub's client retries for minutes
    assert "\n" not in str(caught.value)


def test_corpus_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("here")

    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(corpus, "file_sha256", denied)
    with pytest.raises(ConfigError, match=r"--corpus .*x\.txt: cannot be read \(Permission denied\)\."):
        open_corpus(CorpusOptions(name=str(tmp_path))).identity()
