"""Find what is wrong with a store, and harvest again exactly those chunks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.checks import Problem
from common.checks import problems as problems_of
from common.console import say
from common.errors import Interrupted
from common.files import exclusive
from common.layout import DOCUMENTS, TOKENS
from common.places import url_of
from common.stopping import Stop
from common.store import Store
from harvest.forward import forward, missing_chunks
from harvest.plan import plan_for_repair
from harvest.synthesise import check_truth, is_toy, write_chunks, write_truth_again
from harvest.tokenize import tokenise


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        problems: each with array, chunk and what is wrong.
        checked: committed chunk files looked at.
        missing: chunks not harvested yet, over all hooks: no problem, `harvest run` goes on.
    """

    problems: list[Problem]
    checked: int
    missing: int


def verify(path: Path, stop: Stop) -> Report:
    """Check every committed chunk: present, whole, checksum, finite, token ids in range; journal; summaries; truth.

    Raises:
        Interrupted: asked to stop.
    """

    def go_on() -> None:
        if stop.asked:
            raise Interrupted(f"stopped by {stop.signal_name} while checking; run the same command again.")

    store = Store.open(path)
    problems = [*problems_of(store, go_on), *check_truth(store)]
    return Report(problems, len(store.held()), count_missing(store))


def count_missing(store: Store) -> int:
    return sum(store.n_chunks - len(store.usable_chunks(hook)) for hook in store.hooks)


def repair(path: Path, stop: Stop) -> Report:
    """Harvest the damaged chunks again, with the model and texts that made them, then verify once more.

    Raises:
        StoreError: the model or the corpus is no longer what made the store, or another process writes it.
        Interrupted: asked to stop; the next repair finds what is left.
    """
    Store.open(path)  # nothing there: leave no lock file
    with exclusive(path, "store", name=url_of(path)):
        problems = verify(path, stop).problems
        if problems:
            mend(Store.open(path), problems, stop)
    return verify(path, stop)


def mend(store: Store, problems: list[Problem], stop: Stop) -> None:
    """Harvest the damaged chunks again, then write the summaries and the journal anew.

    The journal file keeps its damaged lines to the end, so that a repair that is killed forgets no damage.
    """
    damaged = {(problem.array, problem.chunk) for problem in problems if problem.chunk is not None}
    damaged |= lost_chunks(store)
    if damaged:
        harvest_again(store, damaged, stop)
    if any(problem.array in store.array_names() and problem.chunk is None for problem in problems):
        store.write_summary()
    store.write_metadata()
    if check_truth(store):
        write_truth_again(store)
    store.journal.rewrite()


def harvest_again(store: Store, damaged: set[tuple[str, int]], stop: Stop) -> None:
    """Take what is damaged for not harvested, and do just those chunks again."""
    plan = None if is_toy(store) else plan_for_repair(store)
    before = {key: store.journal.entries[key].crc32c for key in damaged if key in store.journal.entries}
    store.journal.forget(damaged)
    chunks = {chunk for _, chunk in damaged}
    if plan is None:
        write_chunks(store, stop, only=chunks)
    else:
        tokenise(plan, store, stop, only=chunks)
        todo = {chunk: hooks for chunk, hooks in missing_chunks(store).items() if chunk in chunks}
        if todo:
            forward(plan, store, stop, todo)
    for (array, chunk), old in sorted(before.items()):
        if store.journal.entries[array, chunk].crc32c != old:
            say(f"{store.name} {array} chunk {chunk}: repaired, but this machine computes other bytes than before")


def lost_chunks(store: Store) -> set[tuple[str, int]]:
    """Chunks that count as not there since their journal line is damaged: those that lie on disk, and any tokens
    before what is there, for these are written in order, before all else.
    """
    known = set(store.journal.entries)
    chunks = range(store.n_chunks)
    lost = set()
    if store.journal.damaged_lines:
        every = {(array, chunk) for array in store.array_names() for chunk in chunks}
        lost = {(array, chunk) for array, chunk in every - known if store.place.size(store.chunk_name(array, chunk))}
    last = max((chunk for _, chunk in known | lost if chunk in chunks), default=-1)
    return lost | {(array, chunk) for array in (TOKENS, DOCUMENTS) for chunk in range(last + 1)} - known
