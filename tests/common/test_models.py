"""Language models and their hooks, against transformers itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import ConfigError
from common.models import LanguageModel, layer_of, load_model
from common.sources import find_model
from common.tokenizers import ByteTokenizer
from tests.tiny import LAYERS, gemma2, gpt2, llama, neox


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> LanguageModel:
    return load_model(find_model(str(tiny_model)), "cpu")


@pytest.mark.parametrize("make", [gpt2, neox, gemma2, llama])
def test_capture_equals_the_hidden_states_of_transformers(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = make().eval()
    reference.save_pretrained(tmp_path / "model")
    model = load_model(find_model(str(tmp_path / "model")), "cpu")
    tokens = torch.randint(0, 260, (2, 24), generator=torch.Generator().manual_seed(1))
    blocks: list[torch.Tensor] = []
    inner = next(part for part in reference.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == LAYERS)
    for block in inner:  # hidden_states[-1] comes after the final norm, so the blocks themselves are the reference
        block.register_forward_hook(lambda _, __, out: blocks.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        hidden = reference(tokens, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        hook = f"blocks.{layer}.hook_resid_post"
        alone = model.capture(tokens, [hook])[hook]
        assert alone.shape == (2, 24, 16)
        assert torch.allclose(alone, blocks[layer], atol=1e-5)  # float32, three layers: rounding is about 1e-6
        if layer + 1 < LAYERS:
            assert torch.allclose(alone, hidden[layer + 1], atol=1e-5)
    every = model.capture(tokens, [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)])
    for layer in range(LAYERS):
        assert torch.allclose(every[f"blocks.{layer}.hook_resid_post"], blocks[layer], atol=1e-5)


def test_capture_stops_after_the_highest_block(tiny: LanguageModel) -> None:
    ran: list[str] = []
    handles = [
        block.register_forward_hook(lambda *_, n=number: ran.append(f"block {n}"))
        for number, block in enumerate(tiny.bridge.blocks)
    ]
    handles.append(tiny.bridge.unembed.register_forward_hook(lambda *_: ran.append("unembed")))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    try:
        tiny.capture(tokens, ["blocks.0.hook_resid_post"])
        assert ran == ["block 0"]
        ran.clear()
        tiny.capture(tokens, ["blocks.2.hook_resid_post"])
        assert ran == ["block 0", "block 1", "block 2"]
    finally:
        for handle in handles:
            handle.remove()


def test_capture_sees_hooks_inside_blocks_and_outside(tiny: LanguageModel) -> None:
    tokens = torch.arange(8)[None]
    seen = tiny.capture(tokens, ["hook_embed", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"])
    assert {hook: tuple(value.shape) for hook, value in seen.items()} == {
        "hook_embed": (1, 8, 16),
        "blocks.1.hook_mlp_out": (1, 8, 16),
        "blocks.1.hook_resid_post": (1, 8, 16),
    }
    weights = load_file(Path(tiny.source.location) / "model.safetensors")
    assert torch.equal(seen["hook_embed"][0], weights["gpt_neox.embed_in.weight"][:8])


def test_capture_leaves_no_hook_behind(tiny: LanguageModel) -> None:
    tokens = torch.arange(8)[None]
    first = tiny.capture(tokens, ["blocks.2.hook_resid_post"])
    second = tiny.capture(tokens, ["blocks.0.hook_resid_post"])
    assert list(second) == ["blocks.0.hook_resid_post"]
    assert torch.equal(tiny.capture(tokens, list(first))["blocks.2.hook_resid_post"], *first.values())


def test_resolve_hook_says_how_many_layers_there_are(tiny: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"--hook blocks\.3\.hook_resid_post: layer 3, but .* has layers 0 to 2\."):
        tiny.resolve_hook("blocks.3.hook_resid_post")


def test_resolve_hook_names_the_nearest_of_that_layer(tiny: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"has no such hook\. Did you mean 'blocks\.1\.hook_resid_post'\?"):
        tiny.resolve_hook("blocks.1.hook_resid_pots")
    assert tiny.resolve_hook("blocks.1.hook_resid_post") == "blocks.1.hook_resid_post"


def test_layer_of_reads_the_block_number() -> None:
    assert [layer_of(hook) for hook in ("blocks.12.hook_out", "hook_embed", "xblocks.1.a")] == [12, None, None]


def test_load_model_names_broken_weights(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"--model .*model: cannot be loaded \("):
        load_model(find_model(str(tmp_path / "model")), "cpu")


def test_unembedding_is_the_output_matrix_of_the_file(tiny: LanguageModel, tiny_model: Path) -> None:
    stored = load_file(tiny_model / "model.safetensors")["embed_out.weight"]
    assert tuple(tiny.unembedding().shape) == (16, 260)
    assert torch.equal(tiny.unembedding(), stored.T)


def test_load_model_without_a_tokenizer_reads_bytes(tiny: LanguageModel) -> None:
    assert isinstance(tiny.tokenizer, ByteTokenizer)
    assert not tiny.bridge.training
    assert not any(parameter.requires_grad for parameter in tiny.bridge.parameters())
