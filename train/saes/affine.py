"""An SAE as one affine map of x with an activation: the form that other libraries hold.

    u = (x − b_dec) W_enc + b_enc               x̂ = f W_dec + b_dec
    relu      f = ReLU(u)                       topk      f = the k largest of ReLU(u)
    jumprelu  f = ReLU(u)·1[u > threshold]      gated     f = 1[u > 0] ⊙ ReLU(e^{r_mag} ⊙ (u − b_enc) + b_mag)

Without "− b_dec" where it is not centred.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

UNIT = 1e-5  # rows this near to norm 1 stay as they are: dividing would only change bits
EVEN = 0.01  # norms this alike count as one: what storing unit rows in bfloat16 does to them
GROWING = {"W_enc", "b_enc", "threshold", "b_mag"}  # with their latent's units

Activation = Literal["relu", "topk", "jumprelu", "gated"]


@dataclass(frozen=True)
class AffineForm:
    """Weights in raw units, decoder rows of norm 1; see the module's formulas.

    Attributes:
        centred: whether b_dec is subtracted from x.
        k: for topk.
        threshold: for jumprelu.
        r_mag, b_mag: for gated; its `b_enc` is the gate's bias.
        lost: what the SAE does beside this, in words: a form with something lost is the SAE as it treats a token that
            has no past and no known position. Empty: the form is the SAE.
    """

    W_enc: Float[Tensor, "D L"]
    b_enc: Float[Tensor, " L"]
    W_dec: Float[Tensor, "L D"]
    b_dec: Float[Tensor, " D"]
    activation: Activation
    centred: bool = True
    k: int | None = None
    threshold: Float[Tensor, " L"] | None = None
    r_mag: Float[Tensor, " L"] | None = None
    b_mag: Float[Tensor, " L"] | None = None
    lost: str = ""

    @torch.no_grad()
    def raw(self, scale: Tensor) -> AffineForm:
        """From inputs scaled by `scale` to raw units, with unit decoder rows; copies without gradients.

        Raises:
            ValueError: as `with_unit_rows`.
        """
        fields = {name: value.detach().clone() for name, value in self._tensors().items()}
        for name in {"b_enc", "b_dec", "threshold", "b_mag"} & fields.keys():
            fields[name] = fields[name] / scale
        return dataclasses.replace(self, **fields).with_unit_rows()  # type: ignore[arg-type]

    @torch.no_grad()
    def with_unit_rows(self) -> AffineForm:
        """The same reconstructions from decoder rows of norm 1.

        Raises:
            ValueError: topk with rows of unlike norms: folding them would change which latents are the largest.
        """
        norms = self.W_dec.norm(dim=-1)
        alive = norms[norms > 0]
        norms = torch.where(norms > 0, norms, 1.0)
        if self.activation == "topk" and len(alive):
            if alive.max() > (1 + EVEN) * alive.min():
                raise ValueError(
                    f"decoder norms from {float(alive.min()):.3g} to {float(alive.max()):.3g} decide which latents are "
                    "the k largest, and cannot be folded into the encoder"
                )
            norms = torch.full_like(norms, float(alive.mean()))
        if bool(((norms - 1).abs() <= (EVEN if self.activation == "topk" else UNIT)).all()):
            return self
        return self.with_rows_divided(norms)

    @torch.no_grad()
    def with_rows_divided(self, norms: Float[Tensor, " L"]) -> AffineForm:
        """The same reconstructions, decoder rows divided by `norms` and latents multiplied by them."""
        scaled = {name: self._tensors()[name] * norms for name in self._tensors().keys() & GROWING}
        return dataclasses.replace(self, W_dec=self.W_dec / norms[:, None], **scaled)  # type: ignore[arg-type]

    @torch.no_grad()
    def with_centre(self, centred: bool) -> AffineForm:
        """The same codes with or without b_dec subtracted from x, the difference moved into the biases."""
        if centred == self.centred:
            return self
        shift = self.b_dec @ self.W_enc * (1 if centred else -1)
        b_mag = self.b_mag if self.b_mag is None or self.r_mag is None else self.b_mag + self.r_mag.exp() * shift
        return dataclasses.replace(self, centred=centred, b_enc=self.b_enc + shift, b_mag=b_mag)

    def _tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}
