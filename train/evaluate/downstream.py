"""What a reconstruction does to the language model: cross-entropy and KL divergence with the activations replaced."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.models import LanguageModel
from common.splice import logits_of, zeros
from train.evaluate.core_text import Contexts

LOGIT_BYTES = 256 * 2**20  # of one forward pass; four such arrays are held at once

Reconstruct = Callable[[Contexts, Tensor], Tensor]


class Downstream:
    """Sums over tokens of three passes on the same text: clean, reconstructed, and zero ablation everywhere.

    KL is over all counted positions; cross-entropy over counted positions with a next token, which may be special.

    Args:
        reconstruct: gives new activations [sequences, context, d] for these, at these contexts.
        keep_special: leave special tokens as they are when reconstructing.
    """

    def __init__(self, model: LanguageModel, hook: str, reconstruct: Reconstruct, keep_special: bool = False) -> None:
        self.model, self.hook, self.reconstruct, self.keep_special = model, hook, reconstruct, keep_special
        self.sums: dict[str, float] = {}
        self.tokens, self.predicted = 0, 0

    @torch.inference_mode()
    def add(self, contexts: Contexts) -> None:
        """Look at more text; cut into pieces whose logits fit into memory."""
        row_bytes = contexts.tokens.shape[1] * self.model.vocabulary * 4
        for piece in contexts.pieces(max(LOGIT_BYTES // row_bytes, 1)):
            self._add_piece(piece)

    def _add_piece(self, piece: Contexts) -> None:
        clean = self._log_probabilities(piece, None)
        self._add_loss("ce_loss_without_sae", clean, piece)
        for name, replace in (("sae", self._replaced(piece)), ("ablation", zeros)):
            changed = self._log_probabilities(piece, replace)
            self._add_loss(f"ce_loss_with_{name}", changed, piece)
            divergence = (clean.exp() * changed.neg_().add_(clean)).sum(-1)
            self._add(f"kl_div_with_{name}", divergence[piece.counted])
        self.tokens += int(piece.counted.sum())
        self.predicted += int(piece.counted[:, :-1].sum())

    def _replaced(self, piece: Contexts) -> Callable[[Tensor], Tensor]:
        def replace(x: Tensor) -> Tensor:
            reconstruction = self.reconstruct(piece, x.float())
            return torch.where(piece.special[..., None], x, reconstruction) if self.keep_special else reconstruction

        return replace

    def _log_probabilities(self, piece: Contexts, replace: Callable[[Tensor], Tensor] | None) -> Tensor:
        return logits_of(self.model, piece.tokens, self.hook, replace).float().log_softmax(-1)

    def _add_loss(self, name: str, log_probabilities: Tensor, piece: Contexts) -> None:
        loss = -log_probabilities[:, :-1].gather(-1, piece.tokens[:, 1:, None])[..., 0]
        self._add(name, loss[piece.counted[:, :-1]])

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())

    def figures(self) -> dict[str, float]:
        """Means over tokens, and the two scores: ratios of these means."""
        kl = {name: divided(self.sums[f"kl_div_with_{name}"], self.tokens) for name in ("sae", "ablation")}
        names = ("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation")
        ce = {name: divided(self.sums[name], self.predicted) for name in names}
        clean, ours, ablated = ce.values()
        return {
            "ce_loss_score": divided(ablated - ours, ablated - clean),
            **ce,
            "kl_div_score": divided(kl["ablation"] - kl["sae"], kl["ablation"]),
            "kl_div_with_sae": kl["sae"],
            "kl_div_with_ablation": kl["ablation"],
        }


def divided(a: float, b: float) -> float:
    """a / b, NaN where b is 0."""
    return a / b if b else float("nan")
