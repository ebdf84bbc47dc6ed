"""What decoder rows are near to, and which tokens they promote."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import ConfigError

N_NEAR = 10
N_TOKENS = 10
ROWS_AT_ONCE = 64  # by 256,000 tokens: 64 MiB
RESIDUAL = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@torch.no_grad()
def neighbours(W_dec: Tensor, chosen: Sequence[int], alive: Tensor) -> list[list[tuple[int, float]]]:
    """Of each chosen latent the 10 alive others with the largest (signed) cosine of decoder rows, the nearest first."""
    others = torch.nonzero(alive.to(W_dec.device))[:, 0]
    rows = torch.nn.functional.normalize(W_dec.float(), dim=-1)
    found = []
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        ours = torch.tensor(chosen[start : start + ROWS_AT_ONCE], dtype=torch.int64, device=W_dec.device)
        cosines = (rows[ours] @ rows[others].t()).masked_fill(ours[:, None] == others, -torch.inf)
        values, places = cosines.topk(min(N_NEAR + 1, len(others)), dim=1)
        indices = others[places]
        for near, cosine in zip(indices.tolist(), values.tolist(), strict=True):
            pairs = zip(near, cosine, strict=True)
            found.append([(index, value) for index, value in pairs if value > -torch.inf][:N_NEAR])
    return found


@torch.no_grad()
def effects(
    W_dec: Tensor, chosen: Sequence[int], W_U: Tensor, hook: str
) -> list[tuple[list[tuple[int, float]], list[tuple[int, float]]]]:
    """Of each chosen latent's decoder row d: the tokens with the 10 largest and the 10 smallest entries of d W_U.

    The direct effect on the logits of one unit of the latent, as the residual stream carries it to the end: what later
    layers do with it, and the final norm's scale and weights, are left out.

    Raises:
        ConfigError: the hook does not write into the residual stream.
    """
    if not hook.endswith(RESIDUAL) or W_dec.shape[1] != len(W_U):
        raise ConfigError(f"{hook} is not the residual stream: its directions have no direct effect on the logits")
    found = []
    n = min(N_TOKENS, W_U.shape[1])
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        logits = W_dec[list(chosen[start : start + ROWS_AT_ONCE])].float() @ W_U.float()
        sides = []
        for largest in (True, False):
            values, tokens = logits.topk(n, dim=1, largest=largest)
            sides.append([list(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)])
        found += list(zip(*sides, strict=True))
    return found
