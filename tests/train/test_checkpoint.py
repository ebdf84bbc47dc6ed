"""Checkpoints: whole or absent, never pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train.checkpoint
from common.errors import StoreError
from train.checkpoint import checkpoints, newest_whole, prune, read_checkpoint, save_checkpoint

TENSORS = {
    "weights": {"W": torch.arange(6, dtype=torch.float32).view(2, 3).t(), "n": torch.tensor(3)},
    "optimizer": {},
}


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, TENSORS, {"step": step}, {"store": "abc"})


def test_a_checkpoint_reads_back_equal(tmp_path: Path) -> None:
    found = read_checkpoint(save(tmp_path, 7))
    assert found.path.name == "step-00000007"
    assert torch.equal(found.tensors["weights"]["W"], TENSORS["weights"]["W"])
    assert found.tensors["weights"]["n"].dtype == torch.int64
    assert found.tensors["optimizer"] == {}
    assert found.facts == {"step": 7, "identity": {"store": "abc"}}


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "optimizer.safetensors",
        "weights.safetensors",
    ]
    for file in path.glob("*.safetensors"):
        size = int.from_bytes(file.read_bytes()[:8], "little")
        json.loads(file.read_bytes()[8 : 8 + size])  # a header of JSON, then bytes


@pytest.mark.parametrize("call", range(4))
def test_a_stop_anywhere_in_a_save_leaves_no_checkpoint_by_its_name(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)
    calls = 0

    def dying(real: object) -> object:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > call:
                raise KeyboardInterrupt
            return real(*args, **kwargs)  # type: ignore[operator]

        return wrapped

    for name in ("write_file", "write_json"):
        monkeypatch.setattr(train.checkpoint, name, dying(getattr(train.checkpoint, name)))
    monkeypatch.setattr(train.checkpoint.os, "replace", dying(train.checkpoint.os.replace))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 20)
    monkeypatch.undo()
    found, skipped = newest_whole(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000010"
    assert skipped == []
    assert read_checkpoint(save(tmp_path, 20)).facts["step"] == 20  # and the next try succeeds


def test_a_damaged_newest_checkpoint_is_skipped_and_said(tmp_path: Path) -> None:
    save(tmp_path, 10)
    weights = save(tmp_path, 20) / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    (save(tmp_path, 30) / "manifest.json").write_text("{")
    (save(tmp_path, 40) / "optimizer.safetensors").unlink()
    found, skipped = newest_whole(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000010"
    assert len(skipped) == 3
    assert "skipped step-00000040" in skipped[0]
    assert "missing from the checkpoint" in skipped[0]
    assert "not valid JSON" in skipped[1]
    assert "sha256" in skipped[2]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    weights = save(tmp_path, 20) / "weights.safetensors"
    weights.write_bytes(b"")
    save(tmp_path, 20)
    found, skipped = newest_whole(tmp_path)
    assert found is not None
    assert skipped == []


def test_a_whole_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    save(tmp_path, 20)
    save_checkpoint(tmp_path, 20, {"weights": {}}, {"step": 99}, {})
    assert read_checkpoint(tmp_path / "step-00000020").facts["step"] == 20


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "absent") == (None, [])


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, {"weights": {"a": torch.ones(1)}}, {}, {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(StoreError, match="format 99 of checkpoints; this version reads 2"):
        read_checkpoint(path)


def test_pruning_keeps_the_last_two_the_best_and_every_kth(tmp_path: Path) -> None:
    for step in range(10, 110, 10):
        save(tmp_path, step)
    (tmp_path / "step-00000110.aside").mkdir()
    prune(tmp_path, best_step=30, keep_every=40)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [30, 40, 80, 90, 100]
    assert not list(tmp_path.glob("*.aside"))


def test_what_is_put_beside_checkpoints_is_left_alone(tmp_path: Path) -> None:
    for step in (7, 100_000_000, 99_999_999):  # in the order of their numbers, not of their names
        save(tmp_path, step)
    (tmp_path / "step-00000007.bak").mkdir()
    (tmp_path / "step-notes").write_text("mine")
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [7, 99_999_999, 100_000_000]
    found, skipped = newest_whole(tmp_path)
    assert found is not None
    assert found.path.name == "step-100000000"
    assert skipped == []
    prune(tmp_path, best_step=None, keep_every=None)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-99999999", "step-100000000", "step-00000007.bak", "step-notes"}


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.checkpoint.os, "replace", full)
    with pytest.raises(StoreError, match="no space left on the disk"):
        save(tmp_path, 20)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
