"""The object that SAEBench evaluates, for every variant: `granary.for_saebench`.

SAEBench calls `encode` and `decode` with [B, T, d_model] in true token order, or with [N, d_model], unrelated rows. It
says nothing of documents. A variant that looks at other tokens needs to know where they begin: `set_context` tells it;
without that a row of zeros (how SAEBench masks special tokens) or of a norm above ten medians (the attention sink that
a BOS is in many models) begins a document and is itself no context for others. A [N, d_model] row has no past.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from train.data.batch import Batch
from train.exchange.about import About, about_sae
from train.exchange.bench_config import BenchConfig
from train.saes import load_sae
from train.saes.base import SAE

SINK = 10.0  # medians of norm above which a row is taken for a special token's
ARCHITECTURES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}


class BenchSAE(nn.Module):
    """A trained SAE as SAEBench takes it.

    It computes in float32 whatever its type: inputs and outputs are converted. Latents are in raw activation units.

    Attributes:
        W_enc, W_dec, b_enc, b_dec: raw units, unit decoder rows, in the object's type: what a token's own activation
            does. A gated SAE also has `b_mag`.
        cfg: SAEBench's settings.
        n_inferred: documents that began at a row of the last `encode` because it looked like a special token's.
    """

    def __init__(self, sae: SAE, about: About) -> None:
        super().__init__()
        self.__dict__["_sae"] = sae  # no submodule: it stays in float32
        form = sae.as_affine()
        if sae.sees_future:
            raise ConfigError(f"{about.name} sees the future (causal = false): SAEBench's losses with it mean nothing.")
        if about.layer is None:
            raise ConfigError(f"SAEBench needs a hook inside a block; {about.name} was trained at {about.hook}.")
        self.W_enc = nn.Parameter(sae.direct_encoder().detach() if form is None else form.W_enc, requires_grad=False)
        self.W_dec = nn.Parameter(sae.W_dec.detach() if form is None else form.W_dec, requires_grad=False)
        self.b_enc = nn.Parameter(sae.b_enc / sae.scale if form is None else form.b_enc, requires_grad=False)
        self.b_dec = nn.Parameter(sae.b_dec / sae.scale if form is None else form.b_dec, requires_grad=False)
        if form is not None and form.b_mag is not None:
            self.b_mag = nn.Parameter(form.b_mag, requires_grad=False)
        self.flat = form is not None and not form.lost
        self.sink = SINK * about.median_norm if about.median_norm else torch.inf
        self.n_inferred = 0
        self._doc: Tensor | None = None
        self._places: dict[str, Tensor] | None = None
        self.cfg = BenchConfig(
            model_name=about.model,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            hook_layer=about.layer,
            hook_name=about.hook,
            context_size=about.context,
            architecture=ARCHITECTURES[form.activation] if form is not None and self.flat else about.variant,
            apply_b_dec_to_input=True if form is None else form.centred,
            prepend_bos=about.bos,
            dataset_path=about.corpus or "",
            training_tokens=about.training_tokens,
        )

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def to(self, *args: Any, **kwargs: Any) -> BenchSAE:
        """As `nn.Module.to`; `cfg` follows."""
        super().to(*args, **kwargs)
        self.sae.to(self.device)
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    @property
    def sae(self) -> SAE:
        """The SAE itself."""
        found: SAE = self.__dict__["_sae"]
        return found

    def set_context(self, doc_ids: Tensor | None) -> None:
        """Say which documents the tokens of the following inputs are of: integers [B, T]; None: to be inferred.

        A negative id marks a token that is no text (padding, BOS): no context for others.
        """
        self._doc = doc_ids

    def encode(self, x: Tensor) -> Tensor:
        """Latents: [N, d_in] -> [N, d_sae], [B, T, d_in] -> [B, T, d_sae].

        Raises:
            ValueError: `set_context` gave ids of another shape.
        """
        values = x.to(self.device, torch.float32)
        self._places = None if self.flat or x.dim() == 2 else self._places_of(values)
        given = values if self._places is None else Batch.of(values, **self._places)
        return self.sae.encode(given).to(self.dtype)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction. Latents [B, T, d_sae] are taken to be of the tokens last encoded, if there are as many."""
        latents = feature_acts.to(self.device, torch.float32)
        batch, places = None, self._places
        if places is not None and latents.dim() == 3 and latents.shape[:2] == places["doc"].shape:
            batch = Batch.of(latents[..., :0], **places)
        return self.sae.decode(latents, batch).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`decode(encode(x))`."""
        return self.decode(self.encode(x))

    def _places_of(self, x: Tensor) -> dict[str, Tensor]:
        """Documents, places in them counted from where each begins, and which tokens are text."""
        if self._doc is None:
            norms = x.norm(dim=-1)
            special = (norms == 0) | (norms > self.sink)
            begins = special.clone()
            self.n_inferred = int(special.sum())
        else:
            doc = self._doc.to(x.device)
            if doc.shape != x.shape[:2]:
                raise ValueError(f"set_context was given {list(doc.shape)} ids, the input is {list(x.shape)}")
            special = doc < 0
            # a document begins at the special token before it, and special tokens each at themselves, as in training
            changed = (doc[:, 1:] != doc[:, :-1]) & ~special[:, :-1]
            begins = special | nn.functional.pad(changed, (1, 0))
        begins[:, 0] = True
        rows, length = begins.shape
        places = torch.arange(length, device=x.device)
        first = torch.where(begins, places, 0).cummax(-1).values
        number = begins.cumsum(-1) + (length + 1) * torch.arange(rows, device=x.device)[:, None]
        return {"doc": number.int(), "pos": (places - first).int(), "valid": ~special}


def for_saebench(path: str | Path, device: str = "cpu") -> BenchSAE:
    """A trained SAE as SAEBench takes it: a learner's folder or its `sae/`.

    Raises:
        StoreError: no trained SAE there.
        ConfigError: its hook is in no block, which SAEBench cannot evaluate; or it sees the future.
    """
    folder = Path(path).expanduser()
    sae = load_sae(folder)
    return BenchSAE(sae, about_sae(folder, sae)).to(device=device)
