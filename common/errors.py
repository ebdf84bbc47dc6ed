"""Errors meant for users, each with its exit code.

An error says what, where, got against expected, and what to do, in one to three lines. The command line
prints `<class>: <message>` and leaves with `exit_code`; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GranaryError(Exception):
    """Base of every error that is the user's to settle.

    Attributes:
        told_elsewhere: another process of the same run tells the user.
    """

    exit_code = 1
    told_elsewhere = False


class ConfigError(GranaryError, ValueError):
    """Wrong usage or configuration: an unknown name, a value out of range, a model that cannot be loaded."""

    exit_code = 2


class StoreError(GranaryError, OSError):
    """The store or a run folder is missing, incomplete, damaged, locked, of another identity, or the disk is full."""

    exit_code = 3


class DataError(GranaryError, ValueError):
    """Not enough data for what was asked."""

    exit_code = 4


class TrainingError(GranaryError, RuntimeError):
    """Every learner diverged or failed."""

    exit_code = 5


class Interrupted(GranaryError, RuntimeError):
    """Stopped by a signal; the same command goes on."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest known name, else a list of all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(names)}."
