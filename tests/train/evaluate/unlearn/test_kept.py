"""What a sweep keeps: the same bits back, nothing of another identity, no torn line."""

from __future__ import annotations

from pathlib import Path

from train.evaluate.unlearn.kept import Kept


def test_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    file = tmp_path / "eval" / "kept.jsonl"
    kept = Kept(file, {"sae": "a"})
    kept.add("one", [0.1, 1 / 3, 1e-300])
    assert Kept(file, {"sae": "a"}).values == {"one": [0.1, 1 / 3, 1e-300]}


def test_another_identity_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    Kept(file, {"sae": "a"}).add("one", 1)
    assert Kept(file, {"sae": "b"}).values == {}
    assert Kept(file, {"sae": "a"}).values == {}  # and what was there is gone


def test_torn_last_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    Kept(file, 0).add("one", 1)
    with file.open("a") as opened:
        opened.write('{"name": "two", "va')
    Kept(file, 0).add("three", 3)
    assert Kept(file, 0).values == {"one": 1, "three": 3}
