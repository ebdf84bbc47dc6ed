"""Stopping on request: the first SIGTERM or SIGINT asks, the second one leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from types import FrameType

EXIT_INTERRUPTED = 75
STDERR = 2


@dataclass
class Stop:
    """Whether somebody has asked this process to stop, and how.

    Attributes:
        signal_name: "SIGTERM" or "SIGINT" once asked, else empty.
        patience_s: a second request so soon after the first is the same one, passed on by a launcher.
    """

    signal_name: str = ""
    patience_s: float = 0.0
    asked_at_s: float = 0.0

    @property
    def asked(self) -> bool:
        return bool(self.signal_name)

    def request(self, number: int, frame: FrameType | None = None) -> None:
        """Note the request; leave at once when it is the second."""
        if self.asked and time.monotonic() >= self.asked_at_s + self.patience_s:
            os._exit(EXIT_INTERRUPTED)
        if self.asked:
            return
        self.signal_name, self.asked_at_s = signal.Signals(number).name, time.monotonic()
        line = f"\n{self.signal_name}: finishing what is under way; once more to leave at once.\n"
        with contextlib.suppress(OSError):  # nobody listens: stop all the same
            os.write(STDERR, line.encode())  # sys.stderr may be in the middle of a write: it is not reentrant

    @classmethod
    def on_signals(cls) -> Stop:
        """A `Stop` wired to SIGTERM and SIGINT of this process."""
        stop = cls()
        signal.signal(signal.SIGTERM, stop.request)
        signal.signal(signal.SIGINT, stop.request)
        return stop
