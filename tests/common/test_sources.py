"""Where models lie, and what is said where none does."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.files import file_sha256
from common.sources import find_model, hub_answers
from common.tokenizers import load_tokenizer


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


def test_hub_answers_when_the_proxy_to_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert not hub_answers()  # bound, not listening
        proxy.listen()
        assert hub_answers()


def test_weights_of_a_folder_are_read_for_its_identity_alone(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, read = find_model(str(tiny_model)).identity(), []

    def noted(file: Path) -> str:
        read.append(file.name)
        return file_sha256(file)

    monkeypatch.setattr("common.sources.file_sha256", noted)
    source = find_model(str(tiny_model))
    load_tokenizer(source, 257)
    assert read == []
    assert source.identity() == source.identity() == expected
    assert read == ["config.json", "model.safetensors"]
