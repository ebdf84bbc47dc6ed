"""Toys: activations made up of known features, x = Σ_i a_i d_i + noise (specs of the variants, "Synthetic data").

    toy-h               8 high concepts with 3 mid ones each, these with 3 low ones each; 14 lows have a second parent.
                        A high is active w.p. .15, a child w.p. .5 given a parent; mid = norm(Σ its lows), high likewise
    toy-h-independent   the same, every feature a direction of its own: nothing to compose
    toy-h-tree          as toy-h, no low shared
    toy-t               16 slow features (Markov, stay .95, active a tenth of the time), 48 at 5 % of the tokens;
                        8 relations "i at t ⇒ j at t + 3 w.p. .9"
    toy-m               4 groups of 12 features with mean runs of 1, 3, 9, 27 tokens, each active in 1/16 of the tokens

64 dimensions, amplitudes U(.5, 1.5) per token, noise N(0, .05²) per dimension, documents of 64 to 256 tokens.
Document n is a function of (toy, seed, n) alone, so any stretch of the token stream can be made by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator, default_rng

from common.truth import Truth

D_MODEL = 64
NOISE = 0.05
LEAST, MOST = 0.5, 1.5  # amplitude
SHORTEST, LONGEST = 64, 256  # tokens of a document
BLOCK = 64  # documents made at once
STRUCTURE, LENGTHS, VALUES = range(3)  # what a generator is for: one stream of numbers each
NO_PAIRS, NO_TRIPLES = np.zeros((0, 2), np.int32), np.zeros((0, 3), np.int32)

Activity = Callable[[Generator, int], np.ndarray]
"""Which features are active: (generator, documents) -> bool [documents, LONGEST, features]."""


@dataclass(frozen=True)
class Toy:
    """A toy of one seed.

    Attributes:
        parameters: what decides it beside name and seed, for the store's identity.
    """

    truth: Truth
    activity: Activity
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of a toy.

    Attributes:
        activations: float32 [tokens, D_MODEL].
        documents: int32 [tokens].
        tokens: int32 [tokens], number of the strongest active feature, or the number of features where none is.
    """

    activations: np.ndarray
    documents: np.ndarray
    tokens: np.ndarray


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at unit norm, float32."""
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


def hierarchy(generator: Generator, composed: bool, shared_share: float) -> Toy:
    """Toy-H: features in the order high, mid, low."""
    n_high, n_mid, n_low, p_high, p_child = 8, 24, 72, 0.15, 0.5
    first_mid, first_low = n_high, n_high + n_mid
    mids, lows = np.arange(n_mid) + first_mid, np.arange(n_low) + first_low
    upper = np.stack([np.arange(n_mid) // 3, mids], axis=1)
    lower = np.stack([np.arange(n_low) // 3 + first_mid, lows], axis=1)
    shared = np.sort(generator.choice(n_low, int(shared_share * n_low), replace=False))
    other = (shared // 3 + generator.integers(1, n_mid, len(shared))) % n_mid  # any mid but the first parent
    second = np.stack([other + first_mid, shared + first_low], axis=1)
    edges = np.concatenate([upper, lower, second]).astype(np.int32)

    directions = unit(generator.normal(size=(n_high + n_mid + n_low, D_MODEL)))
    if composed:
        for parent in [*mids, *range(n_high)]:  # lows first, then what is made of them
            directions[parent] = unit(directions[edges[edges[:, 0] == parent, 1]].sum(0))

    def activity(generator: Generator, n: int) -> np.ndarray:
        active = np.zeros((n, LONGEST, len(directions)), bool)
        active[..., :n_high] = generator.random((n, LONGEST, n_high)) < p_high
        for pairs in (upper, lower, second):
            given = active[..., pairs[:, 0]] & (generator.random((n, LONGEST, len(pairs))) < p_child)
            active[..., pairs[:, 1]] |= given
        return active

    groups = np.repeat(np.arange(3, dtype=np.int32), [n_high, n_mid, n_low])
    truth = Truth(directions, ("high", "mid", "low"), groups, np.zeros(len(groups), np.float32), edges, NO_TRIPLES)
    return Toy(truth, activity, {"p_high": p_high, "p_child": p_child, "composed": composed, "shared": len(shared)})


def temporal(generator: Generator) -> Toy:
    """Toy-T: features in the order slow, fast; sources and targets of relations are fast."""
    n_slow, n_fast, n_relations, lag = 16, 48, 8, 3
    stay, slow_share, fast_share, p_follow = 0.95, 0.1, 0.05, 0.9
    chosen = generator.permutation(n_fast)[: 2 * n_relations] + n_slow
    sources, targets = chosen[:n_relations], chosen[n_relations:]

    def activity(generator: Generator, n: int) -> np.ndarray:
        slow = markov(generator, n, np.full(n_slow, stay), slow_share)
        active = np.concatenate([slow, generator.random((n, LONGEST, n_fast)) < fast_share], axis=-1)
        follows = generator.random((n, LONGEST - lag, n_relations)) < p_follow
        active[:, lag:, targets] |= active[:, :-lag, sources] & follows
        return active

    group = np.repeat(np.arange(2, dtype=np.int32), [n_slow, n_fast])
    runs = np.repeat(np.array([1 / (1 - stay), 0], np.float32), [n_slow, n_fast])
    relations = np.stack([sources, targets, np.full(n_relations, lag)], axis=1).astype(np.int32)
    directions = unit(generator.normal(size=(n_slow + n_fast, D_MODEL)))
    truth = Truth(directions, ("slow", "fast"), group, runs, NO_PAIRS, relations)
    names = {"stay": stay, "slow_share": slow_share, "fast_share": fast_share, "lag": lag, "p_follow": p_follow}
    return Toy(truth, activity, names)


def multiscale(generator: Generator) -> Toy:
    """Toy-M: features in the order of their runs, from short to long."""
    lengths, n_each, share = (1, 3, 9, 27), 12, 1 / 16
    runs = np.repeat(np.array(lengths, np.float32), n_each)

    def activity(generator: Generator, n: int) -> np.ndarray:
        return markov(generator, n, 1 - 1 / runs, share)

    group = np.repeat(np.arange(len(lengths), dtype=np.int32), n_each)
    directions = unit(generator.normal(size=(len(runs), D_MODEL)))
    truth = Truth(directions, tuple(f"run-{length}" for length in lengths), group, runs, NO_PAIRS, NO_TRIPLES)
    return Toy(truth, activity, {"runs": list(lengths), "share": share})


def markov(generator: Generator, n: int, stay: np.ndarray, share: float) -> np.ndarray:
    """On and off by chains that stay on with probability `stay` [features] and are on for `share` of the time.

    bool [n, LONGEST, features]; stationary from the first token on.
    """
    start = share * (1 - stay) / (1 - share)
    chance = generator.random((LONGEST, n, len(stay)))
    active = np.empty(chance.shape, bool)
    active[0] = chance[0] < share
    for t in range(1, LONGEST):
        active[t] = chance[t] < np.where(active[t - 1], stay, start)
    return active.swapaxes(0, 1)


MAKERS: dict[str, Callable[[Generator], Toy]] = {
    "toy-h": functools.partial(hierarchy, composed=True, shared_share=0.2),
    "toy-h-independent": functools.partial(hierarchy, composed=False, shared_share=0.2),
    "toy-h-tree": functools.partial(hierarchy, composed=True, shared_share=0.0),
    "toy-t": temporal,
    "toy-m": multiscale,
}


def make_toy(name: str, seed: int) -> Toy:
    """The toy of that name (one of `common.truth.TOYS`) and seed."""
    return MAKERS[name](default_rng([seed, STRUCTURE]))


class TokenStream:
    """The documents of a toy end to end; any stretch of it, always the same numbers."""

    def __init__(self, toy: Toy, seed: int) -> None:
        self.toy, self.seed = toy, seed
        self._ends: list[int] = []  # token at which each block of documents ends

    def lengths(self, block: int) -> np.ndarray:
        """Tokens of each document of a block, [BLOCK]."""
        return default_rng([self.seed, LENGTHS, block]).integers(SHORTEST, LONGEST + 1, BLOCK)

    def block(self, block: int) -> Stretch:
        """All tokens of a block of documents."""
        generator, toy = default_rng([self.seed, VALUES, block]), self.toy
        kept = np.arange(LONGEST) < self.lengths(block)[:, None]
        active = toy.activity(generator, BLOCK)[kept]
        amplitudes = np.where(active, generator.uniform(LEAST, MOST, active.shape), 0).astype(np.float32)
        noise = generator.normal(0, NOISE, (len(active), D_MODEL)).astype(np.float32)
        strongest = np.where(active.any(-1), amplitudes.argmax(-1), active.shape[-1])
        documents = np.nonzero(kept)[0] + block * BLOCK
        return Stretch(
            amplitudes @ toy.truth.directions + noise, documents.astype(np.int32), strongest.astype(np.int32)
        )

    def take(self, start: int, stop: int) -> Stretch:
        """Tokens `start` to `stop`."""
        while not self._ends or self._ends[-1] < stop:
            last = self._ends[-1] if self._ends else 0
            self._ends.append(last + int(self.lengths(len(self._ends)).sum()))
        first, last = (int(np.searchsorted(self._ends, token, side="right")) for token in (start, stop - 1))
        blocks = [self.block(number) for number in range(first, last + 1)]
        begin = self._ends[first - 1] if first else 0
        wanted = slice(start - begin, stop - begin)
        return Stretch(
            *(np.concatenate([getattr(b, name) for b in blocks])[wanted] for name in Stretch.__annotations__)
        )
