"""Chunks through the model, against the model called directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.models import LanguageModel, load_model
from common.sources import find_model
from harvest.chunks import ChunkBuffer, Forward, files_of
from tests.conftest import HOOK

CONTEXT, CHUNK = 12, 10


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return load_model(find_model(str(tiny_model)), "cpu")


def tokens(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (CHUNK, CONTEXT), dtype=np.int32)[:rows]


def run(model: LanguageModel, rows: int, batch_size: int = 4, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    forward = Forward(model, {HOOK: 16}, dtype, CHUNK, CONTEXT, batch_size)
    buffer = forward.new_buffer()
    buffer.hooks[HOOK].acts.fill_(7)
    assert forward.run(tokens(rows), np.ones((rows, CONTEXT), bool), buffer) == 0
    buffer.wait()
    assert buffer.hooks[HOOK].partial.result()[1]["count"] == rows * CONTEXT
    return acts_and_norms(buffer, rows)


def acts_and_norms(buffer: ChunkBuffer, rows: int) -> tuple[np.ndarray, np.ndarray]:
    (acts, norms, _), _ = files_of(HOOK, 0, rows, buffer.hooks[HOOK])
    return acts[2], norms[2]


def test_forward_equals_the_model_called_directly(model: LanguageModel) -> None:
    acts, norms = run(model, CHUNK)
    expected = model.capture(torch.from_numpy(tokens(CHUNK).astype(np.int64)), [HOOK])[HOOK].numpy()
    assert np.allclose(acts, expected, atol=1e-5)  # another batch size rounds otherwise, at 1e-7
    assert np.allclose(norms, np.linalg.norm(acts, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_forward_of_a_short_chunk_has_the_bits_of_a_full_one(model: LanguageModel, rows: int) -> None:
    full, _ = run(model, CHUNK, dtype="bfloat16")
    short, _ = run(model, rows, dtype="bfloat16")
    assert short.shape == (rows, CONTEXT, 16)
    assert short.tobytes() == full[:rows].tobytes()


NO_MEMORY = [torch.OutOfMemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["gpu", "cpu"])
def test_forward_halves_its_batch_when_memory_runs_out(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    expected, _ = run(model, CHUNK, batch_size=2)
    run_hooks, sizes = model.run_hooks, []

    def small_device(batch: torch.Tensor, *rest: object) -> None:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise error
        run_hooks(batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "run_hooks", small_device)
    forward = Forward(model, {HOOK: 16}, "float32", CHUNK, CONTEXT, 8)
    buffer = forward.new_buffer()
    assert forward.run(tokens(CHUNK), np.ones((CHUNK, CONTEXT), bool), buffer) == 2
    assert forward.batch_size == 2
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert acts_and_norms(buffer, CHUNK)[0].tobytes() == expected.tobytes()
    assert buffer.hooks[HOOK].partial.result()[1]["count"] == CHUNK * CONTEXT  # nothing counted twice


def test_forward_gives_up_when_one_sequence_does_not_fit(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model, "run_hooks", no_memory)
    forward = Forward(model, {HOOK: 16}, "float32", CHUNK, CONTEXT, 8)
    with pytest.raises(ConfigError, match="single sequence"):
        forward.run(tokens(CHUNK), np.ones((CHUNK, CONTEXT), bool), forward.new_buffer())


def test_forward_lets_other_errors_through(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(model, "run_hooks", wrong)
    forward = Forward(model, {HOOK: 16}, "float32", CHUNK, CONTEXT, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        forward.run(tokens(CHUNK), np.ones((CHUNK, CONTEXT), bool), forward.new_buffer())
