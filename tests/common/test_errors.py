"""Errors for users."""

from __future__ import annotations

import pytest

from common.errors import (
    ConfigError,
    DataError,
    GranaryError,
    Interrupted,
    StoreError,
    TrainingError,
    nearest,
)


@pytest.mark.parametrize(
    ("error", "code", "builtin"),
    [
        (ConfigError, 2, ValueError),
        (StoreError, 3, OSError),
        (DataError, 4, ValueError),
        (TrainingError, 5, RuntimeError),
        (Interrupted, 75, RuntimeError),
    ],
)
def test_errors_have_their_exit_code_and_builtin_kind(
    error: type[GranaryError], code: int, builtin: type[Exception]
) -> None:
    assert error.exit_code == code
    assert issubclass(error, builtin)
    assert str(error("what happened")) == "what happened"


def test_nearest_names_the_closest_or_all() -> None:
    assert nearest("topp", ["topk", "gated"]) == " Did you mean 'topk'?"
    assert nearest("xyz", ["topk", "gated"]) == " Known: gated, topk."
