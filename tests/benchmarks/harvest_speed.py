"""Harvest against the bare truncated forward: the same model, tokens and batch, with nothing done to the result.

A Pythia-70m-shaped model (512 wide, 6 layers, random weights), hook at block 3, bfloat16 store.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from common.models import LanguageModel
from common.stopping import Stop
from common.store import Store
from harvest.forward import forward, missing_chunks
from harvest.plan import make_plan
from harvest.prepare import prepare_store
from harvest.tokenize import tokenise
from tests.benchmarks.measure import Row, interleaved, median_ratio
from tests.conftest import harvest_config

TOKENS = 49_152  # three chunks: short pieces, often in turn, since a machine's speed drifts by a tenth within a minute
CONTEXT = 128
BATCH = 32
LAYER = 3


def make_model(folder: Path) -> Path:
    """Pythia-70m's shape with random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    )
    GPTNeoXForCausalLM(shape).save_pretrained(folder / "pythia-shape")
    return folder / "pythia-shape"


def bare_forward(model: LanguageModel) -> None:
    """The truncated forward alone, over as many tokens."""
    tokens = torch.randint(0, 256, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for _ in range(TOKENS // (BATCH * CONTEXT)):
            model.bridge(tokens, stop_at_layer=LAYER + 1, return_type=None)


def run(rounds: int = 9) -> list[Row]:
    """The forward stage of a harvest, store written and synced, against the bare forward; bytes per token.

    The last of three chunks is written with nothing to compute meanwhile: a long harvest waits for less.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = make_model(folder)
        out = folder / "bench.zarr"
        options = {"layer": (LAYER,), "tokens": TOKENS, "context": CONTEXT, "batch_size": BATCH, "chunk_sequences": 128}
        plan = make_plan(harvest_config(source, Path("stdlib"), out, corpus="stdlib", **options))

        def tokenise_once() -> None:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            tokenise(plan, prepare_store(plan), Stop())

        def forward_once() -> None:
            store = Store.open(out)
            forward(plan, store, Stop(), missing_chunks(store))

        times = interleaved(
            {"tokenise": tokenise_once, "forward": forward_once, "bare": lambda: bare_forward(plan.model)}, rounds
        )
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / TOKENS
    rate, floor = TOKENS / times["forward"].median, TOKENS / times["bare"].median
    return [
        Row("harvest / bare truncated forward", f"{rate:,.0f} tok/s", f"{floor:,.0f} tok/s",
            median_ratio(times["bare"], times["forward"]), 0.95),
        Row("bytes per token on disk (d=512, bf16)", f"{size:,.1f}", "1,060", 1060 / size, 1.0),
    ]  # fmt: skip
