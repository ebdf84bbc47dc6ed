"""The built-in demo model: small, whole, and really trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from common.corpus import stdlib_documents
from common.demo.train_demo import CONTEXT, cross_entropy, learning_rate, pack, unigram_entropy
from common.sources import DEMO_FOLDER

FIGURES = json.loads((DEMO_FOLDER / "training.json").read_text())


def test_demo_files_are_there_and_small() -> None:
    sizes = {file.name: file.stat().st_size for file in DEMO_FOLDER.iterdir() if file.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "train_demo.py"} <= set(
        sizes
    )
    assert sum(sizes.values()) <= 10_000_000
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    assert config["architectures"] == ["GPTNeoXForCausalLM"]
    assert config["vocab_size"] <= 8192


def test_demo_claims_at_least_40_percent_below_unigram() -> None:
    share = 1 - FIGURES["heldout_ce_nats"] / FIGURES["heldout_unigram_entropy_nats"]
    assert share >= 0.4
    assert FIGURES["share_below_unigram"] == pytest.approx(share, abs=1e-4)
    assert 3_000_000 <= FIGURES["parameters"] <= 5_000_000


def test_demo_reaches_the_cross_entropy_it_claims() -> None:
    from transformers import AutoTokenizer, GPTNeoXForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    tokens = pack(tokenizer, [text for _, text in stdlib_documents("heldout")])
    model = GPTNeoXForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()
    assert model.num_parameters() == FIGURES["parameters"]
    found = cross_entropy(model, tokens, tokenizer.bos_token_id, rows=16)
    # 16 of the 512 sequences: the spread of a sequence's mean is about 0.6 nats, so 0.15 for 16 of them; another
    # Python's library differs a little too
    assert found == pytest.approx(FIGURES["heldout_ce_nats"], abs=0.5)
    unigram = unigram_entropy(tokens, tokenizer.bos_token_id)
    assert unigram == pytest.approx(FIGURES["heldout_unigram_entropy_nats"], abs=0.2)
    assert found < 0.6 * unigram


def test_unigram_entropy_of_a_fair_coin_is_log_2() -> None:
    assert unigram_entropy(np.array([0, 1, 2, 1, 2]), bos=0) == pytest.approx(np.log(2))


def test_learning_rate_warms_up_then_falls_to_a_tenth() -> None:
    assert learning_rate(0) == 0
    assert learning_rate(0.02) == pytest.approx(3e-3, rel=0.01)
    assert learning_rate(1) == pytest.approx(3e-4)
    assert CONTEXT == 256
