"""What a suite is given: the tokenizer alone, and errors that say what is wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import build
from common.errors import ConfigError
from common.models import load_model
from common.sources import find_model
from common.stopping import Stop
from common.store import Store
from train.config import DataConfig, EvalConfig
from train.data.reader import Batches
from train.evaluate import subject as subject_module
from train.evaluate.subject import Models, Subject
from train.evaluate.unlearn.exam import open_patient
from train.saes import make_sae


def subject_on(store: Store, held_out: float = 0.2, **options: object) -> Subject:
    """A fresh flat SAE with some of the store's documents held out."""
    batches = Batches.of(store, build(DataConfig, {"held_out": held_out}, "test"))
    sae = make_sae("topk", {"d_sae": 32, "k": 4}, store.d_model(store.hook()), 0, "test")
    device = torch.device("cpu")
    config = build(EvalConfig, dict(options), "test")
    return Subject(Path("runs/x/topk"), sae, {}, batches, config, device, Models(device), Stop())


def test_tokenizer_is_the_models_and_the_model_is_not_loaded(
    store: Store, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_model(find_model(str(tiny_model)), "cpu").tokenizer.identity()

    def refuse(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(subject_module, "load_model", refuse)
    subject = subject_on(store)
    assert subject.tokenizer().identity() == expected == store.identity["tokenizer"]
    assert subject.tokenizer() is subject.tokenizer()  # made once for all learners


def test_model_folder_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []
    monkeypatch.setattr(subject_module, "find_model", lambda *name: looked_up.append(name) or find_model(*name))
    subject = subject_on(store)
    subject.tokenizer()
    subject.language_model()
    assert len(looked_up) == 1


def test_tokenizer_of_another_kind_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="4,096 ids, but the model embeds 260"):
        subject_on(store, model="demo").tokenizer()
    store.header["identity"]["tokenizer"] = "0" * 64  # harvested with another one
    with pytest.raises(ConfigError, match=r"its tokenizer is not the one that .* was harvested with"):
        subject_on(store).tokenizer()


def test_model_with_other_weights_is_refused(store: Store, tiny_model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    config = other / "config.json"
    config.write_text(config.read_text() + "\n")
    subject = subject_on(store, model=str(other))
    assert subject.tokenizer().size == 257
    with pytest.raises(ConfigError, match="other weights"):
        subject.language_model()


def test_an_sae_that_sees_the_future_gets_no_model_to_predict_with(store: Store) -> None:
    subject = subject_on(store)
    assert subject.spliced_model() is subject.language_model()
    options = {"d_sae": 32, "k": 4, "causal": False}
    ahead = replace(subject, sae=make_sae("multiscale", options, subject.sae.d_in, 0, "test"))
    assert ahead.language_model() is subject.language_model()  # activations and tokens may be had
    with pytest.raises(ConfigError, match=r"topk sees the future \(causal = false\)"):
        ahead.spliced_model()
    with pytest.raises(ConfigError, match="sees the future"):
        open_patient(ahead)  # SAEBench's questions, whatever the model


def test_missing_model_is_told(store: Store) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        subject_on(store, model="/nowhere/model").tokenizer()
