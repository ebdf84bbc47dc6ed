"""Compiled blocks: the same activations, refused where they cannot be had, and one way for all chunks of a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from common.errors import ConfigError, StoreError
from common.layout import acts_array
from common.models import LanguageModel, load_model
from common.sources import find_model
from common.store import Store
from harvest import plan, worker
from harvest.cluster import Cluster
from harvest.compiled import compile_blocks
from harvest.forward import pass_of, task_of
from harvest.info import describe
from harvest.plan import make_plan, plan_for_repair
from harvest.worker import harvest_chunk
from tests.conftest import HOOK
from tests.harvest.conftest import go, small
from tests.tiny import gemma2, gpt2, llama, neox

BORDERS = ["hook_embed", "blocks.1.hook_resid_pre", HOOK, "blocks.2.hook_resid_post"]


@pytest.fixture(autouse=True)
def _forget() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [gpt2, neox, gemma2, llama])
def test_compiled_blocks_are_one_graph_with_the_activations_of_the_others(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    model = load_model(find_model(str(tmp_path / "model")), "cpu", tokenizer="bytes")
    tokens = torch.randint(0, 260, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = model.capture(tokens, BORDERS)
    counter = CompileCounter()
    compile_blocks(model, BORDERS, counter)
    found = model.capture(tokens, BORDERS)
    assert counter.frame_count == 1  # for three blocks
    for hook in BORDERS:
        assert torch.allclose(found[hook], expected[hook], atol=1e-6), hook
    model.capture(tokens[:2], BORDERS)
    model.capture(tokens, BORDERS)
    assert counter.frame_count == 2  # each shape has its own


@pytest.mark.study  # half a minute of g++
@pytest.mark.filterwarnings("default")  # of PyTorch, about itself
def test_the_real_compiler_gives_the_activations_of_the_blocks(tiny_model: Path) -> None:
    model = load_model(find_model(str(tiny_model)), "cpu")
    tokens = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(1))
    expected = model.capture(tokens, BORDERS)
    compile_blocks(model, BORDERS)
    for hook, values in model.capture(tokens, BORDERS).items():
        assert torch.allclose(values, expected[hook], atol=1e-5), hook  # float32, sums in another order


def test_a_hook_inside_a_block_is_refused(tiny_model: Path) -> None:
    model = load_model(find_model(str(tiny_model)), "cpu")
    with pytest.raises(ConfigError, match=r"--hook blocks\.1\.hook_mlp_out: inside a block, where --compile"):
        compile_blocks(model, ["blocks.1.hook_mlp_out"], "eager")


def test_blocks_that_are_something_else_without_the_bridge_are_refused(tiny_model: Path) -> None:
    model = load_model(find_model(str(tiny_model)), "cpu")
    bridged = model.bridge.blocks[0].original_component.mlp
    bridged.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ConfigError, match="gives other activations that way"):
        compile_blocks(model, [HOOK], "eager")


def test_a_compiler_that_fails_is_one_line(tiny_model: Path) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler found\nand more")

    model = load_model(find_model(str(tiny_model)), "cpu")
    compile_blocks(model, [HOOK], broken)
    with pytest.raises(
        ConfigError, match=r"torch\.compile fails here \(RuntimeError: no compiler found and more\)\. It needs a C"
    ) as raised:
        model.capture(torch.zeros(1, 4, dtype=torch.int64), [HOOK])
    assert "\n" not in str(raised.value)


@torch._dynamo.config.patch(recompile_limit=1)
def test_more_shapes_than_the_compiler_takes_are_one_line(tiny_model: Path) -> None:
    model = load_model(find_model(str(tiny_model)), "cpu")
    compile_blocks(model, [HOOK], "eager")
    model.capture(torch.zeros(1, 4, dtype=torch.int64), [HOOK])
    with pytest.raises(ConfigError, match=r"--compile: torch\.compile fails here \(.*recompile"):
        model.capture(torch.zeros(2, 4, dtype=torch.int64), [HOOK])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[LanguageModel]:
    """Models that were compiled, by a compiler that does nothing."""
    seen: list[LanguageModel] = []

    def compile_eagerly(model: LanguageModel, hooks: Any) -> None:
        seen.append(model)
        compile_blocks(model, hooks, "eager")

    monkeypatch.setattr(plan, "compile_blocks", compile_eagerly)
    monkeypatch.setattr(worker, "compile_blocks", compile_eagerly)
    return seen


def test_a_store_keeps_to_the_way_it_began(
    tiny_model: Path,
    texts: Path,
    finished: Path,
    tmp_path: Path,
    quick: list[LanguageModel],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.zarr"
    go(small(tiny_model, texts, out, compile=True))
    assert capsys.readouterr().err.count("blocks are compiled with the first batch") == 1  # before minutes of silence
    store, plain = Store.open(out), Store.open(finished)
    assert [(describe(each)["compile"], describe(each)["batch_size"]) for each in (store, plain)] == [
        (True, 8),
        (False, 8),
    ]
    assert store.id == plain.id
    ours, theirs = (each.rows(acts_array(HOOK), 0, 50).astype(np.float32) for each in (store, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-2)  # stored as bfloat16
    assert len(quick) == 1
    go(small(tiny_model, texts, out, tokens=2048))  # as it began, without being told
    plan_for_repair(store)
    assert len(quick) == 3
    with pytest.raises(StoreError, match=r"x\.zarr: begun with --compile, asked for without it; .* Leave out --no"):
        go(small(tiny_model, texts, out, compile=False))
    capsys.readouterr()
    go(small(tiny_model, texts, finished))
    assert "compiled" not in capsys.readouterr().err
    assert len(quick) == 3
    with pytest.raises(StoreError, match=r"x\.zarr: begun without --compile, asked for with it; .* Leave out --comp"):
        go(small(tiny_model, texts, finished, compile=True))


def test_workers_compile_too(tiny_model: Path, texts: Path, tmp_path: Path, quick: list[LanguageModel]) -> None:
    out = tmp_path / "x.zarr"
    config = small(tiny_model, texts, out, compile=True)
    go(config)
    shared = pass_of(Cluster(None, "cpu"), make_plan(config), Store.open(out), [HOOK])
    before = len(quick)
    done = harvest_chunk(task_of(shared, Store.open(out), 0))
    assert len(quick) == before + 1
    (staged,) = done.hooks
    (file,) = (file for file in staged.files if file.entry.array == acts_array(HOOK))
    assert file.entry.crc32c == Store.open(out).journal.entries[acts_array(HOOK), 0].crc32c
