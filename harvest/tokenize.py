"""Stage 1: documents to sequences of exactly `context` tokens, with the document of every position, chunk by chunk.

Packed as `common/packing.py` says. A chunk is a pure function of the corpus and the cursor at which it starts, so a
stopped harvest goes on at the last cursor.
"""

from __future__ import annotations

from common.console import Progress, say
from common.errors import DataError, Interrupted
from common.layout import DOCUMENTS, TOKENS
from common.packing import Cursor, Packer
from common.stopping import Stop
from common.store import Store
from harvest.plan import Plan, dry_error


def tokenise(plan: Plan, store: Store, stop: Stop, only: set[int] | None = None) -> None:
    """Write the tokens and documents of every chunk that lacks them, in order; `only` limits it to some (repair).

    Raises:
        DataError: the corpus ran dry before the tokens asked for, without --allow-fewer.
        Interrupted: asked to stop between two chunks.
    """
    both = set(store.committed(TOKENS)) & set(store.committed(DOCUMENTS))
    done = {chunk for chunk in both if not any(store.check_size(array, chunk) for array in (TOKENS, DOCUMENTS))}
    todo = [chunk for chunk in range(store.n_chunks) if chunk not in done and (only is None or chunk in only)]
    if not todo:
        return
    progress = Progress("tokenise", store.n_chunks, todo[0])
    packer, at = None, -1
    for chunk in todo:
        if stop.asked:
            raise Interrupted(f"stopped by {stop.signal_name} while tokenising; the same command goes on.")
        if packer is None or at != chunk:
            packer = packer_at(plan, store, chunk)
        wanted = store.sequences_in(chunk)
        taken = packer.take(wanted)
        if taken.dry:
            corpus_ran_dry(plan, store, chunk * store.chunk_sequences + len(taken.tokens))
        if len(taken.tokens):
            facts = {"cursor": taken.cursor.to_json()}
            store.commit([(TOKENS, chunk, taken.tokens, facts), (DOCUMENTS, chunk, taken.documents, {})])
        if taken.dry:
            break
        at = chunk + 1
        progress.update(at, f"{at * store.chunk_sequences * store.context:,} tokens")
    progress.total = store.n_chunks  # fewer when the corpus ran dry
    progress.close(store.n_chunks, f"{store.n_sequences * store.context:,} tokens")


def packer_at(plan: Plan, store: Store, chunk: int) -> Packer:
    """A packer that starts where chunk `chunk` starts, from the cursor that the chunk before it left."""
    cursor = Cursor()
    if chunk:
        cursor = Cursor(**store.journal.entries[TOKENS, chunk - 1].extra["cursor"])
    return Packer(plan.corpus, plan.model.tokenizer, store.context, plan.config.packing, plan.bos, cursor)


def corpus_ran_dry(plan: Plan, store: Store, sequences: int) -> None:
    """Shrink the store to what the corpus gave, if the user allows it.

    Raises:
        DataError: no text at all, or fewer tokens than asked for without --allow-fewer.
    """
    found, asked = sequences * store.context, plan.config.tokens
    if sequences == 0:
        raise DataError(
            f"--corpus {plan.config.corpus}: not even one sequence of {store.context} tokens of text in it."
        )
    if not plan.config.allow_fewer:
        raise dry_error(plan, found)
    say(f"the corpus ran dry at {found:,} of {asked:,} tokens: taking what there is")
    store.header = store.header | {"n_sequences": sequences, "corpus_dry": True}
    store.write_metadata()
