"""Cross-entropy and KL divergence of spliced models, against transformers and a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.models import LanguageModel, load_model
from common.sources import DEMO_FOLDER, find_model
from tests.conftest import HOOK
from train.evaluate import downstream
from train.evaluate.core_text import Contexts, contexts_of
from train.evaluate.downstream import Downstream

BOS = 256


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> LanguageModel:
    return load_model(find_model(str(tiny_model)), "cpu")


def contexts(n: int = 3, length: int = 12, vocabulary: int = 256) -> Contexts:
    tokens = torch.randint(0, vocabulary, (n, length), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tokens[:, 0] = BOS
    tokens[-1, 5] = BOS
    return contexts_of(tokens, torch.zeros_like(tokens), [BOS])


def halved(_: Contexts, x: Tensor) -> Tensor:
    return 0.5 * x + 0.1


def transformers_logits(folder: Path, tokens: Tensor, change: Any = None) -> Tensor:
    """Of the model itself, the output of block 1 changed by `change`."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    if change is not None:
        reference.gpt_neox.layers[1].register_forward_hook(
            lambda _, __, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
        )
    with torch.inference_mode():
        return Tensor(reference(tokens).logits)


@pytest.mark.parametrize("keep_special", [False, True])
def test_figures_agree_with_a_plain_loop(tiny: LanguageModel, tiny_model: Path, keep_special: bool) -> None:
    text = contexts()
    text.counted[0, 3:6] = False  # text of a document that is trained on: replaced, but not counted
    measured = Downstream(tiny, HOOK, halved, keep_special)
    measured.add(text[:2])
    measured.add(text[2:])
    keep = text.special[..., None] & keep_special
    logits = {
        "clean": transformers_logits(tiny_model, text.tokens),
        "sae": transformers_logits(tiny_model, text.tokens, lambda x: torch.where(keep, x, halved(text, x))),
        "ablation": transformers_logits(tiny_model, text.tokens, lambda x: 0 * x),
    }
    log_p = {name: value.double().log_softmax(-1) for name, value in logits.items()}
    kl: dict[str, list[float]] = {name: [] for name in log_p}
    ce: dict[str, list[float]] = {name: [] for name in log_p}
    for row in range(3):
        for t in range(12):
            if text.tokens[row, t] == BOS or (row == 0 and 3 <= t < 6):
                continue
            for name, log_q in log_p.items():
                p = log_p["clean"][row, t]
                kl[name].append(float((p.exp() * (p - log_q[row, t])).sum()))
                if t < 11:  # the next token may be special
                    ce[name].append(-float(log_q[row, t, text.tokens[row, t + 1]]))
    assert len(kl["clean"]) == measured.tokens == 3 * 12 - 7
    assert len(ce["clean"]) == measured.predicted == 3 * 11 - 7
    mean = {name: sum(values) / len(values) for name, values in ce.items()}
    divergence = {name: sum(values) / len(values) for name, values in kl.items()}
    assert measured.figures() == pytest.approx(
        {
            "ce_loss_score": (mean["ablation"] - mean["sae"]) / (mean["ablation"] - mean["clean"]),
            "ce_loss_without_sae": mean["clean"],
            "ce_loss_with_sae": mean["sae"],
            "ce_loss_with_ablation": mean["ablation"],
            "kl_div_score": (divergence["ablation"] - divergence["sae"]) / divergence["ablation"],
            "kl_div_with_sae": divergence["sae"],
            "kl_div_with_ablation": divergence["ablation"],
        },
        rel=1e-3,  # float32 logits; the divergences of a model of random weights are near 1e-4
    )


def test_clean_loss_is_the_models_own() -> None:
    from transformers import AutoModelForCausalLM

    model = load_model(find_model("demo"), "cpu")
    tokens = torch.from_numpy(model.tokenizer.encode([Path(__file__).read_text()])[0][:200]).view(2, 100).int()
    text = contexts_of(tokens, torch.zeros_like(tokens), [])
    measured = Downstream(model, "blocks.2.hook_resid_post", lambda _, x: x)
    measured.add(text)
    reference = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()
    with torch.inference_mode():
        loss = float(reference(text.tokens, labels=text.tokens).loss)
    found = measured.figures()
    assert found["ce_loss_without_sae"] == pytest.approx(loss, rel=1e-5)
    assert found["ce_loss_with_sae"] == found["ce_loss_without_sae"]  # replaced by the same
    assert (found["ce_loss_score"], found["kl_div_score"], found["kl_div_with_sae"]) == (1, 1, 0)
    assert found["ce_loss_with_ablation"] > 2 * loss


def test_pieces_of_other_sizes_give_the_same(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    text, sizes = contexts(5), []

    def seen(piece: Contexts, x: Tensor) -> Tensor:
        sizes.append((len(piece), len(x)))
        return halved(piece, x)

    def figures() -> dict[str, float]:
        measured = Downstream(tiny, HOOK, seen)
        measured.add(text)
        return measured.figures()

    whole = figures()
    monkeypatch.setattr(downstream, "LOGIT_BYTES", 2 * 12 * tiny.vocabulary * 4)
    assert figures() == pytest.approx(whole, rel=1e-5)  # other batches of the same matrix product
    monkeypatch.setattr(downstream, "LOGIT_BYTES", 1)
    assert figures() == pytest.approx(whole, rel=1e-5)
    assert sizes == [(5, 5), (2, 2), (2, 2), (1, 1), *[(1, 1)] * 5]


def test_divergence_is_finite_where_probabilities_underflow(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = contexts(1, 6)
    steep = 1e4 * torch.randn(1, 6, tiny.vocabulary, generator=torch.Generator().manual_seed(0))
    assert (steep.softmax(-1) == 0).any()
    monkeypatch.setattr(downstream, "logits_of", lambda *_: steep.clone())
    measured = Downstream(tiny, HOOK, halved)
    measured.add(text)
    assert measured.figures()["kl_div_with_sae"] == 0
