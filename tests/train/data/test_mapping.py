"""Chunk files side by side in memory."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest

from train.data.mapping import bring_in, can_map, map_side_by_side

SIZE = 2 * mmap.PAGESIZE


def files(folder: Path, n: int) -> list[Path]:
    draw = np.random.default_rng(0)
    paths = [folder / f"{number}.bin" for number in range(n)]
    for path in paths:
        path.write_bytes(draw.integers(0, 256, SIZE, dtype=np.uint8).tobytes())
    return paths


def mapped_lines(name: str) -> int:
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_mapping_equals_the_files_one_after_another(tmp_path: Path) -> None:
    paths = files(tmp_path, 5)
    chosen = [paths[3], paths[0], paths[3], paths[4]]
    memory = map_side_by_side(chosen, SIZE)
    bring_in(memory)
    assert memory.tobytes() == b"".join(path.read_bytes() for path in chosen)


def test_mapping_ends_when_its_last_view_is_gone(tmp_path: Path) -> None:
    memory = map_side_by_side(files(tmp_path, 2), SIZE)
    view = memory[SIZE : SIZE + 8]
    expected = (tmp_path / "1.bin").read_bytes()[:8]
    del memory
    gc.collect()
    assert mapped_lines(str(tmp_path)) == 2
    assert view.tobytes() == expected
    del view
    gc.collect()
    assert mapped_lines(str(tmp_path)) == 0


def test_mapping_of_a_missing_file_leaves_nothing_mapped(tmp_path: Path) -> None:
    paths = files(tmp_path, 2)
    with pytest.raises(FileNotFoundError):
        map_side_by_side([*paths, tmp_path / "absent.bin"], SIZE)
    gc.collect()
    assert mapped_lines(str(tmp_path)) == 0


def test_only_whole_pages_can_be_mapped() -> None:
    assert can_map(SIZE)
    assert not can_map(SIZE + 1)
