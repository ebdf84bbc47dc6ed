"""Spliced forward passes, against transformers with the output of a block changed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from common.models import LanguageModel, load_model
from common.sources import DEMO_FOLDER, find_model
from common.splice import fixed, gradient_of, logits_of, zeros
from tests.tiny import LAYERS, gemma2, gpt2, llama, neox

HOOK = "blocks.1.hook_resid_post"


def tilted(activations: Tensor) -> Tensor:
    """Something that depends on every value and position."""
    return 0.5 * activations + torch.arange(activations.shape[1])[:, None] / 10


def by_hand(reference: Any, tokens: Tensor, change: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Logits of transformers itself, the output of block 1 changed."""
    blocks = next(part for part in reference.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == LAYERS)

    def after(module: Any, inputs: Any, output: Any) -> Any:
        if change is None:
            return output
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = blocks[1].register_forward_hook(after)
    try:
        with torch.inference_mode():
            return Tensor(reference(tokens).logits)
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> LanguageModel:
    return load_model(find_model(str(tiny_model)), "cpu")


@pytest.mark.parametrize("make", [gpt2, neox, gemma2, llama])
def test_logits_equal_those_of_transformers_clean_and_with_a_block_changed(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    reference = make().eval()
    reference.save_pretrained(tmp_path / "model")
    # the libraries make up a tokenizer for a folder without one, but not for Llama's
    tokenizer = str(DEMO_FOLDER) if make is llama else None
    model = load_model(find_model(str(tmp_path / "model")), "cpu", tokenizer=tokenizer)
    tokens = torch.randint(0, 260, (2, 24), generator=torch.Generator().manual_seed(1))
    clean = logits_of(model, tokens)
    assert clean.shape == (2, 24, model.vocabulary)
    for change in (None, tilted, zeros):
        ours = clean if change is None else logits_of(model, tokens, HOOK, change)
        assert torch.allclose(ours, by_hand(reference, tokens, change), atol=1e-5)  # float32, three layers
    assert (logits_of(model, tokens, HOOK, zeros) - clean).abs().max() > 1e-3
    assert torch.equal(logits_of(model, tokens), clean)  # nothing stays behind


def test_replacing_by_the_same_changes_nothing(tiny: LanguageModel) -> None:
    tokens = torch.arange(12)[None]
    assert torch.equal(logits_of(tiny, tokens, HOOK, lambda x: x), logits_of(tiny, tokens))


def test_capture_sees_the_same_before_and_after_a_splice(tiny: LanguageModel) -> None:
    tokens = torch.arange(12)[None]
    before = tiny.capture(tokens, [HOOK])[HOOK]
    seen: list[Tensor] = []
    logits_of(tiny, tokens, HOOK, lambda x: seen.append(x.clone()) or x)  # type: ignore[func-returns-value]
    assert torch.equal(seen[0], before)
    assert torch.equal(tiny.capture(tokens, [HOOK])[HOOK], before)


def test_heads_are_laid_flat_for_the_replacement(tiny: LanguageModel) -> None:
    tokens, shapes = torch.arange(12)[None], []

    def keep(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x

    clean = logits_of(tiny, tokens)
    assert torch.equal(logits_of(tiny, tokens, "blocks.1.attn.hook_z", keep), clean)
    assert shapes == [(1, 12, 16)]
    assert not torch.allclose(logits_of(tiny, tokens, "blocks.1.attn.hook_z", zeros), clean)


def test_a_hook_that_never_fires_is_refused(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.bridge, "run_with_hooks", lambda tokens, **_: torch.zeros(1, 2, 3))
    with pytest.raises(ConfigError, match=r"blocks\.1\.hook_resid_post: it exists in .* but never fires"):
        logits_of(tiny, torch.zeros(1, 2, dtype=torch.int64), HOOK, zeros)


def test_gradient_is_that_of_finite_differences(tiny: LanguageModel) -> None:
    tokens = torch.arange(12)[None]
    x = tiny.capture(tokens, [HOOK])[HOOK].clone()

    def figure(logits: Tensor) -> Tensor:
        return logits[0, :, 7].double().square().sum()

    value, gradient = gradient_of(tiny, tokens, HOOK, x, figure)
    assert value == pytest.approx(float(figure(logits_of(tiny, tokens))))
    for place, dimension in ((0, 3), (5, 0), (11, 15)):
        step = torch.zeros_like(x)
        step[0, place, dimension] = 1e-3
        ends = [float(figure(logits_of(tiny, tokens, HOOK, fixed(x + sign * step)))) for sign in (1, -1)]
        assert float(gradient[0, place, dimension]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.02, abs=1e-4)
    assert torch.equal(tiny.capture(tokens, [HOOK])[HOOK], x)  # nothing stays behind
