"""How far the forward stage is, and what binds it: the text of its progress line."""

from __future__ import annotations

import time
from dataclasses import dataclass

from common.console import Progress
from harvest.worker import ChunkDone


@dataclass
class Tally:
    """How far the forward stage is, and its progress line.

    Attributes:
        waited_s: how long the model waited: for the disk, for tokens, or for tasks.
        read_s: part of it, reading tokens.
        model_s, write_s: on a cluster, in the model and writing, over all workers.
        start_s: on a cluster, until the first worker had its model loaded.
        nonfinite: NaN or infinite values met.
    """

    progress: Progress
    tokens: int = 0
    written_bytes: int = 0
    waited_s: float = 0.0
    read_s: float = 0.0
    model_s: float = 0.0
    write_s: float = 0.0
    start_s: float = 0.0
    nonfinite: int = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.progress.started

    def add(self, tokens: int) -> None:
        """Count tokens, and draw the line if it is time to."""
        self.tokens += tokens
        self.progress.update(self.tokens, self.describe(self.progress.rate(self.tokens)))

    def add_remote(self, done: ChunkDone, n_workers: int, tokens: int) -> None:
        """Count what a worker did."""
        self.start_s = self.start_s or self.elapsed - done.forward_s - done.write_s
        self.model_s += done.forward_s
        self.write_s += done.write_s
        self.waited_s = max(self.elapsed - self.start_s - self.model_s / n_workers, 0.0)
        self.written_bytes += done.size_bytes
        self.add(tokens)

    def close(self) -> None:
        """Draw the last line, if there was anything to do."""
        if self.progress.total:
            self.progress.close(self.tokens, self.describe(self.tokens / max(self.elapsed, 1e-9)))

    def describe(self, rate: float) -> str:
        """`412,000 tokens · 9,120 tok/s · 0.02 GB/s · waited 0 % (model binds)`.

        Args:
            rate: tokens per second; bytes go as they do.
        """
        speed = f"{rate:,.0f} tok/s · {rate * self.written_bytes / max(self.tokens, 1) / 1e9:.3f} GB/s"
        waited = f"waited {self.waited_s / max(self.elapsed, 1e-9):.0%} ({self.binds()} binds)"
        return f"{self.tokens:,} tokens · {speed} · {waited}"

    def binds(self) -> str:
        """What the harvest would be faster without: the model, unless it waited for more than a tenth of the time."""
        if self.waited_s <= 0.1 * self.elapsed:
            return "model"
        if self.read_s > 0.5 * self.waited_s:
            return "reading tokens"
        return "handing out tasks" if self.model_s > self.write_s else "disk"
