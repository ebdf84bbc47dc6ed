"""Language models and their hooks, against transformers itself."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common import models
from common.errors import ConfigError
from common.files import file_sha256
from common.models import ByteTokenizer, LanguageModel, find_model, layer_of, load_model, load_tokenizer
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


def test_find_model_folder_is_known_by_its_weights(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, copy)
    assert find_model(str(copy)).identity() == find_model(str(tiny_model)).identity()
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert find_model(str(copy)).identity() != find_model(str(tiny_model)).identity()


def test_find_model_says_what_a_folder_lacks(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the folder has no config\.json; is it a model saved by transformers\?"):
        find_model(str(tmp_path))
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="the folder has no weights"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match=r"--model \./nowhere: no such folder\."):
        find_model("./nowhere")


def test_find_model_hub_name_offline_fails_in_one_line() -> None:
    with pytest.raises(ConfigError, match="the hub cannot be reached") as caught:
        find_model("nobody/nothing-at-all")
    assert "\n" not in str(caught.value)
    assert "--model demo" in str(caught.value)


def test_find_model_without_network_fails_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as unused:  # bound, not listening: a connection is refused
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ConfigError, match="the hub cannot be reached"):
            find_model("gpt2-that-nobody-has")
    assert time.monotonic() - started < 5


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


def test_byte_tokenizer_goes_both_ways() -> None:
    words = ByteTokenizer(260)
    assert (words.bos, words.special, words.size) == (256, (256,), 257)
    assert words.encode(["aé"])[0].tolist() == [97, 0xC3, 0xA9]
    assert words.decode([256, 97, 0xC3, 0xA9]) == "aé"


def test_byte_tokenizer_without_room_has_no_bos() -> None:
    words = ByteTokenizer(256)
    assert (words.bos, words.special, words.size) == (None, (), 256)
    with pytest.raises(ConfigError, match=r"a vocabulary of 255, too small for raw bytes \(256\)"):
        ByteTokenizer(255)


def test_load_tokenizer_of_the_demo_goes_both_ways() -> None:
    words = load_tokenizer(find_model("demo"), 4096)
    text = "def grain(sack):\n    return 'é'\n"
    ids = words.encode([text, "x"])
    assert ids[0].dtype == np.int64
    assert words.decode(ids[0].tolist()) == text
    assert words.bos in words.special
    assert words.bos not in ids[0]


def test_load_tokenizer_refuses_one_that_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"4,096 ids, but the model embeds 260\. Is it this model's\?"):
        load_tokenizer(find_model(str(tiny_model)), 260, str(models.DEMO_FOLDER))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"--tokenizer .*: cannot be loaded \("):
        load_tokenizer(find_model(str(tiny_model)), 260, str(tmp_path))


def test_hub_answers_when_the_proxy_to_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert not models.hub_answers()  # bound, not listening
        proxy.listen()
        assert models.hub_answers()


def test_weights_of_a_folder_are_read_for_its_identity_alone(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, read = find_model(str(tiny_model)).identity(), []

    def noted(file: Path) -> str:
        read.append(file.name)
        return file_sha256(file)

    monkeypatch.setattr("common.models.file_sha256", noted)
    source = find_model(str(tiny_model))
    load_tokenizer(source, 257)
    assert read == []
    assert source.identity() == source.identity() == expected
    assert read == ["config.json", "model.safetensors"]
