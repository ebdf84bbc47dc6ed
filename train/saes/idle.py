"""Settings that nothing reads as the others stand: whoever gave one meant something that would not happen."""

from __future__ import annotations

from typing import Any


class Idle:
    """Settings that have no effect where `here` holds.

    Args:
        because: what leaves them without effect, as `sparsity = budgets`.
    """

    def __init__(self, here: bool, because: str, *names: str) -> None:
        self.here, self.because, self.names = here, because, names

    def wrong(self, values: dict[str, Any], defaults: dict[str, Any]) -> str | None:
        """What to say if one of them is not its default; None if all are, or have an effect."""
        for name in self.names if self.here else ():
            if values[name] != defaults[name]:
                return f"{name} has no effect with {self.because}: leave it out"
        return None
