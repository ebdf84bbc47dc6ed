"""The journal where nothing can be appended to: an object per commit, in order, folded into one when a harvest ends."""

from __future__ import annotations

from typing import final

from common.places import Bucket

FOLDER = "journal"


@final
class Segments:
    """`journal/<number>.jsonl`, read one after another."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.last = max((int(name.split("/")[-1].split(".")[0]) for name in self.names()), default=0)

    def names(self) -> list[str]:
        return sorted(name for name in self.bucket.listing(FOLDER) if name.endswith(".jsonl"))

    def read(self) -> bytes:
        """All lines."""
        return b"".join(self.bucket.read(name) or b"" for name in self.names())

    def append(self, data: bytes) -> None:
        self.last += 1
        self.bucket.write(f"{FOLDER}/{self.last:010d}.jsonl", data)

    def replace(self, data: bytes) -> None:
        """One object in the place of all; until the old ones are gone it repeats what they say."""
        old = self.names()
        self.append(data)
        for name in old:
            self.bucket.forget(name)
