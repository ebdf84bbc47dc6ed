"""How much of a figure m of the model's logits comes from each latent, by integrated gradients at the hook.

With x the activations at the hook, x̂ = b_dec + Σ f_i d_i and e = x − x̂ at the positions looked at, and ḡ the gradient
of m averaged along the straight line from b_dec to x (8 midpoints, all positions at once; Sundararajan et al. 2017):

    latent i at position t    f_ti ⟨ḡ_t, d_i⟩
    error                     Σ_t ⟨ḡ_t, e_t⟩
    complete                  Σ_ti + error = m(x) − m(b_dec), but for the error of 8 steps

Other positions (special tokens, other documents) keep their activations throughout. Where d_i are rows of W_dec the
latents' part is ⟨ḡ, x̂ − b_dec⟩ to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models import LanguageModel
from common.splice import fixed, gradient_of, logits_of
from train.data.batch import Batch
from train.data.split import positions_in_document
from train.saes.base import SAE

STEPS = 8
MOST_LOGITS = 2**22  # held at once: the rows of a batch share the model's weights, which halves the time on a CPU


@dataclass(frozen=True)
class Text:
    """Whole sequences with what an SAE makes of them, on one device.

    Attributes:
        tokens, doc: ids and documents, int64 [rows, context].
        mask: positions looked at, bool [rows, context].
        x: activations, float32 [rows, context, d].
        latents: codes, 0 where the mask is false [rows, context, d_sae].
        error: x − x̂, 0 where the mask is false [rows, context, d].
    """

    tokens: Tensor
    doc: Tensor
    mask: Tensor
    x: Tensor
    latents: Tensor
    error: Tensor

    @property
    def predicting(self) -> Tensor:
        """Positions looked at whose next token is of the same document, bool [rows, context − 1]."""
        return self.mask[:, :-1] & (self.doc[:, :-1] == self.doc[:, 1:])


@torch.no_grad()
def read_text(sae: SAE, model: LanguageModel, hook: str, tokens: Tensor, doc: Tensor, mask: Tensor) -> Text:
    """Run the model over sequences [rows, context] and encode what the hook has, in windows of the SAE's own length."""
    device = sae.W_dec.device
    length = tokens.shape[1] // sae.window * sae.window
    tokens, doc, mask = (part[:, :length].to(device) for part in (tokens, doc, mask))
    x = model.capture(tokens, [hook])[hook].flatten(2).float().clone()
    flat = doc.reshape(-1).cpu().numpy()
    pos = torch.from_numpy(positions_in_document(flat, length)).view_as(doc).to(device)
    context = torch.stack([doc, pos, tokens], dim=-1).int()

    def windows(values: Tensor) -> Tensor:
        return values.reshape(-1, sae.window, *values.shape[2:])

    batch = Batch(windows(x), windows(mask), int(mask.sum()), lambda: windows(context))
    latents = sae.encode(batch)
    reconstruction = sae.decode(latents, batch).view_as(x)
    latents = latents.view(*mask.shape, -1) * mask[..., None]
    return Text(tokens, doc, mask, x, latents, (x - reconstruction) * mask[..., None])


@dataclass(frozen=True)
class Attribution:
    """Of a figure m of the logits.

    Attributes:
        latents: of every latent at every position [rows, context, d_sae].
        error: of what the SAE leaves over.
        total: m(x) − m(b_dec).
        start: m(b_dec).
    """

    latents: Tensor
    error: float
    total: float
    start: float

    @property
    def missing(self) -> float:
        """What is not accounted for: the error of the steps."""
        return self.total - self.error - float(self.latents.double().sum())


def attribute(
    sae: SAE, model: LanguageModel, hook: str, text: Text, figure: Callable[[Tensor], Tensor], steps: int = STEPS
) -> Attribution:
    """Attribute a scalar figure of the logits [rows, context, vocabulary] to latents; x̂ must be b_dec + f W_dec."""
    start = torch.where(text.mask[..., None], sae.b_dec / sae.scale, text.x)
    shares = (torch.arange(steps, device=start.device) + 0.5) / steps
    gradient = torch.zeros_like(text.x)
    for some in shares.split(copies_at_once(model, text)):
        points = start + some[:, None, None, None] * (text.x - start)
        tokens = text.tokens.repeat(len(some), 1)
        found = gradient_of(model, tokens, hook, points.flatten(0, 1), lambda logits: each(figure, logits, text))[1]
        gradient += found.view_as(points).sum(0) / steps
    with torch.no_grad():
        latents = text.latents * (gradient @ sae.W_dec.T)
        error = float((gradient.double() * text.error.double()).sum())
        ends = [float(figure(logits_of(model, text.tokens, hook, fixed(put)))) for put in (text.x, start)]
    return Attribution(latents, error, total=ends[0] - ends[1], start=ends[1])


def each(figure: Callable[[Tensor], Tensor], logits: Tensor, text: Text) -> Tensor:
    """A figure of the logits of each copy of a text, summed: copies do not see each other, nor do their gradients."""
    return torch.stack([figure(copy) for copy in logits.split(len(text.tokens))]).sum()


def copies_at_once(model: LanguageModel, text: Text) -> int:
    """How many copies of a text go through the model together."""
    return max(MOST_LOGITS // (text.tokens.numel() * model.vocabulary), 1)
