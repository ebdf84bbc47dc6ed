"""Result files of suite latents, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>alert(1)</script>"


def latent(index: int, n_contexts: int = 2, largest: float = 4.0) -> dict[str, Any]:
    context = {
        "document": 1,
        "activation": largest,
        "peak": 1,
        "tokens": ["a", HOSTILE, "\n"],
        "values": [0, largest, 1.0],
    }
    return {
        "index": index,
        "group": "dilation 4",
        "density": 0.1,
        "mean": 1.0,
        "max": largest,
        "contexts": [context] * n_contexts,
        "promoted": [["x", 1.5]],
    }


def learner(folder: Path, n: int = 6) -> Path:
    """A learner's folder with `n` latents to rate, and one that was never active."""
    (folder / "eval").mkdir(parents=True)
    (folder / "sae").mkdir()
    latents = [latent(index) for index in range(n)] + [latent(99, n_contexts=0)]
    (folder / "eval" / "latents.json").write_text(json.dumps({"latents": latents}))
    return folder
