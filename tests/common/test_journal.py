"""The journal: what is committed."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from common import journal as module
from common.errors import StoreError
from common.journal import Entry, Journal


def entry(chunk: int, crc: str = "00000000", **extra: object) -> Entry:
    return Entry(array="tokens", chunk=chunk, crc32c=crc, size_bytes=64, sequences=4, extra=dict(extra))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three chunks."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([entry(0), entry(1, cursor={"document": 3, "offset": 5})])
    journal.append([entry(2)])
    return journal.path


def test_entry_reads_back_from_its_line() -> None:
    written = entry(7, "1f2e3d4c", max_abs=1.25, cursor={"document": 1, "offset": 2})
    assert Entry.from_line(written.to_line().rstrip(b"\n")) == written


@pytest.mark.parametrize("line", [b"", b"null", b"[]", b"{}", b"{", b'{"line":"00000000"}', b"\xff"])
def test_entry_from_a_damaged_line_is_none(line: bytes) -> None:
    assert Entry.from_line(line) is None


def test_entry_with_one_changed_digit_is_none() -> None:
    assert Entry.from_line(entry(7).to_line().replace(b'"chunk":7', b'"chunk":8')) is None


def test_journal_reads_back_what_was_appended(path: Path) -> None:
    journal = Journal(path)
    assert sorted(journal.entries) == [("tokens", 0), ("tokens", 1), ("tokens", 2)]
    assert journal.of("tokens")[1].extra == {"cursor": {"document": 3, "offset": 5}}
    assert journal.of("documents") == {}
    assert (journal.torn_bytes, journal.damaged_lines) == (0, [])


def test_journal_missing_file_is_empty(tmp_path: Path) -> None:
    assert Journal(tmp_path / "none").entries == {}


@pytest.mark.parametrize("torn", [b"{", entry(3).to_line()[:-1]])
def test_journal_drops_a_torn_last_line_and_cuts_it_before_the_next_append(path: Path, torn: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    journal = Journal(path)
    assert journal.torn_bytes == len(torn)
    assert ("tokens", 3) not in journal.entries
    journal.append([entry(4)])
    assert journal.torn_bytes == 0
    assert path.read_bytes() == whole + entry(4).to_line()
    assert sorted(chunk for _, chunk in Journal(path).entries) == [0, 1, 2, 4]


def test_journal_reports_a_damaged_middle_line_and_forgets_its_chunk(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"document":3', b'"document":4')
    path.write_bytes(b"".join(lines))
    journal = Journal(path)
    assert journal.damaged_lines == [2]
    assert sorted(chunk for _, chunk in journal.entries) == [0, 2]


def test_journal_last_line_about_a_chunk_wins(path: Path) -> None:
    journal = Journal(path)
    journal.append([entry(1, "ffffffff")])
    assert journal.entries["tokens", 1].crc32c == "ffffffff"
    assert Journal(path).entries["tokens", 1].crc32c == "ffffffff"


def test_journal_rewrite_drops_chunks_and_superseded_torn_and_damaged_lines(path: Path) -> None:
    path.write_bytes(b"garbage\n" + path.read_bytes() + b"{")
    journal = Journal(path)
    journal.append([entry(2, "ffffffff")])
    journal.rewrite(drop=[("tokens", 0), ("tokens", 99)])
    assert path.read_bytes() == Journal(path).entries["tokens", 1].to_line() + entry(2, "ffffffff").to_line()
    assert journal.damaged_lines == []
    journal.append([entry(5)])
    assert sorted(chunk for _, chunk in Journal(path).entries) == [1, 2, 5]


def test_journal_append_to_a_full_disk_commits_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = path.read_bytes()
    journal = Journal(path)

    def half(descriptor: int, data: bytes, offset: int) -> int:
        if offset > len(whole):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:10], offset)

    real = module.os.pwrite
    monkeypatch.setattr(module.os, "pwrite", half)
    with pytest.raises(StoreError, match="no space left on the disk"):
        journal.append([entry(3)])
    monkeypatch.undo()
    assert path.read_bytes() == whole
    assert ("tokens", 3) not in journal.entries
    journal.append([entry(4)])
    assert sorted(chunk for _, chunk in Journal(path).entries) == [0, 1, 2, 4]


def test_journal_that_is_new_is_synced_into_its_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(module, "sync_folder", synced.append)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([entry(0)])
    journal.append([entry(1)])
    assert synced == [tmp_path]


def test_journal_forget_leaves_the_file_alone(path: Path) -> None:
    whole = path.read_bytes()
    journal = Journal(path)
    journal.forget([("tokens", 1), ("tokens", 99)])
    assert sorted(chunk for _, chunk in journal.entries) == [0, 2]
    assert path.read_bytes() == whole
    journal.append([entry(1, "ffffffff")])
    assert Journal(path).entries["tokens", 1].crc32c == "ffffffff"


def test_a_folded_journal_says_nothing_of_who_was_faster(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal, other = Journal(path), Journal(tmp_path / "other.jsonl")
    for chunk in (2, 0, 1):
        journal.append([entry(chunk)])
    other.append([entry(chunk) for chunk in range(3)])
    journal.fold()
    assert path.read_bytes() == other.path.read_bytes()
    before = path.stat().st_ino
    journal.fold()
    assert path.stat().st_ino == before  # in order already: not written again
    journal.append([entry(3)])
    assert list(Journal(path).entries) == [("tokens", chunk) for chunk in range(4)]
