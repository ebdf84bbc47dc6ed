"""SAEs of every variant with drawn weights, and the formulas of `train/saes/affine.py` worked out latent by latent."""

from __future__ import annotations

import torch
from torch import Tensor

from train.saes import REGISTRY, make_sae
from train.saes.affine import AffineForm
from train.saes.base import SAE

D, L, N = 12, 40, 64
PLAIN = {"tree": dict(REGISTRY["tree"].plain or {}), "compositional": {"encoder": "no_comp"}}
FORMS = [(name, PLAIN.get(name, {})) for name in REGISTRY] + [
    ("tree", PLAIN["tree"] | {"sparsity": "budgets", "orientation": "top_down"}),
    ("tree", PLAIN["tree"] | {"sparsity": "budgets", "no_dec_skip": True, "sum_init": True}),
    ("contrastive", {"sparsity": "l1"}),
    ("multiscale", {"convolution": "none", "sparsity": "budgets"}),
    ("multiscale", {"convolution": "mixture"}),
    ("relational", {"memory": "lags", "context_as": "input", "position_gate": True}),
    ("predictor", {"rank": 0}),
]
LOST = {"relational", "multiscale", "predictor"}


def drawn(variant: str, options: dict[str, object], scale: float = 1.0) -> SAE:
    """One with weights that are all drawn, thresholds that let some through, and unit decoder rows."""
    known = REGISTRY[variant].Config.model_fields
    size = {"d_sae": L, "k": 6, "window": 4, "buffer": 0, "keys": 128}
    chosen = {key: value for key, value in size.items() if key in known and (key != "window" or variant in LOST)}
    sae = make_sae(variant, chosen | options, D, 0, "test")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            if name == "theta":
                weight.uniform_(0.1, 1.0, generator=generator)
            elif name not in ("W_dec", "W_low", "coupling"):
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        if (sparsity := getattr(sae, "sparsity", None)) and sparsity.mode != "l1":
            sparsity.threshold.copy_(0.2 + 0.5 * torch.arange(len(sparsity.threshold)))
        sae.scale.fill_(scale)
    if hasattr(sae, "_write_rows"):
        sae._write_rows()
    if variant == "standard":
        sae.calibrate(lambda: [])
    return sae.eval().requires_grad_(False)


def tokens(scale: float = 1.0) -> Tensor:
    return 3 * torch.randn(N, D, generator=torch.Generator().manual_seed(2)) / scale


def codes(form: AffineForm, x: Tensor) -> Tensor:
    """The formulas of the module, latent by latent."""
    out = torch.zeros(len(x), form.W_enc.shape[1])
    for n, row in enumerate(x - form.b_dec if form.centred else x):
        pi = torch.stack([(row * form.W_enc[:, i]).sum() for i in range(form.W_enc.shape[1])])
        u = pi + form.b_enc
        if form.activation == "gated":
            assert form.r_mag is not None
            assert form.b_mag is not None
            out[n] = torch.where(u > 0, torch.relu(torch.exp(form.r_mag) * pi + form.b_mag), 0.0)
        elif form.activation == "jumprelu":
            assert form.threshold is not None
            out[n] = torch.where(u > form.threshold, torch.relu(u), 0.0)
        elif form.activation == "topk":
            kept = sorted(range(len(u)), key=lambda i: -float(u[i]))[: form.k]
            out[n, kept] = torch.relu(u[kept])
        else:
            out[n] = torch.relu(u)
    return out
