"""The scales of an int8 store's dimensions: measured once per hook, on its first tokens, and kept in its header."""

from __future__ import annotations

import torch

from common.files import fingerprint
from common.quantise import dimension_scales
from common.store import Store
from harvest.chunks import Forward, chunk_tokens

SAMPLE_TOKENS = 8192  # known to about a hundredth, and far less is needed: a scale only shares out the precision


def unscaled_hooks(store: Store) -> list[str]:
    """The int8 hooks whose scales are not measured yet."""
    return [hook for hook, info in store.hooks.items() if "scales" in info and info["scales"] is None]


def sample_sequences(store: Store) -> int:
    """How many of the store's first sequences are the sample; all in the first chunk."""
    return min(-(-SAMPLE_TOKENS // store.context), store.sequences_in(0))


def sample_scales(runner: Forward, store: Store) -> dict[str, list[float]]:
    """Scales of each hook that `runner` sees, from as many of the store's first sequences as its chunks have."""
    tokens, trainable = chunk_tokens(store, 0)
    buffer = runner.new_buffer()
    runner.run(tokens[: runner.chunk_sequences], trainable[: runner.chunk_sequences], buffer)
    buffer.wait()
    measured = {}
    for hook, filled in buffer.hooks.items():
        sums, facts = filled.partial.result()
        measured[hook] = dimension_scales(torch.from_numpy(sums[0, 1]) / max(facts["count"], 1)).tolist()
    return measured


def keep_scales(store: Store, measured: dict[str, list[float]]) -> None:
    """Write scales down for good: they are part of what identifies the hook's data."""
    hooks = store.hooks
    for hook, scales in measured.items():
        made_of = {"store": store.id, "hook": hook, "scales": scales}
        hooks[hook] = hooks[hook] | {"scales": scales, "id": fingerprint(made_of)}
    store.header = store.header | {"hooks": hooks}
    store.write_metadata()
