"""Codes made up for the tests of hierarchies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy import sparse
from torch import Tensor

from train.evaluate import bootstrap
from train.evaluate.codes import Codes, halved

DOCUMENT = 50  # tokens of each


def independent(n: int, latents: int, density: float = 0.1, seed: int = 0) -> np.ndarray:
    """Codes in [.5, 1.5] that are active by chance."""
    generator = np.random.default_rng(seed)
    return (generator.random((n, latents)) + 0.5) * (generator.random((n, latents)) < density)


def codes_of(values: np.ndarray, document: int = DOCUMENT) -> Codes:
    """Documents of equal length, in halves."""
    return halved(sparse.csc_array(values.astype(np.float32)), np.arange(len(values)) // document)[0]


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """Intervals from 50 draws of documents: for tests to import that are not about the intervals."""
    draw = bootstrap.resampled_sums

    def fifty(sums: Tensor, n: int, seed: int) -> Iterator[Tensor]:
        return draw(sums, 50, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "resampled_sums", fifty)
        yield
