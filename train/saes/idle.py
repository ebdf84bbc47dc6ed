"""Settings that nothing reads as the others stand: whoever gave one meant something that would not happen."""

from __future__ import annotations

from common.config import Settings


def refuse_idle(config: Settings, idle: bool, because: str, *names: str) -> None:
    """Nothing, unless `idle` and one of the named settings is not its default.

    Args:
        because: what leaves them without effect, as `sparsity = budgets`.

    Raises:
        ValueError: naming the setting and the reason.
    """
    for name in names if idle else ():
        if getattr(config, name) != type(config).model_fields[name].get_default():
            raise ValueError(f"{name} has no effect with {because}: leave it out")
