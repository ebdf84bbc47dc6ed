"""Explanations of latents and how well they detect, by a judge (evaluation spec §4, AutoInterp).

The judge sees ten of a latent's strongest passages and five drawn by activation, and says what they have in common;
then, of fourteen others, two and two of the same kinds and ten at random, which of them fit what was said. The score is
the share told right. A passage is a token with ten on either side.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import StoreError
from common.files import fingerprint
from train.evaluate.judge import Judge
from train.evaluate.sample import Sample
from train.record import read_lines

BUFFER = 10  # tokens on either side
TOP_SHOWN, DRAWN_SHOWN = 10, 5
TOP_ASKED, DRAWN_ASKED, RANDOM_ASKED = 2, 2, 10
ACTIVE_SHARE = 0.01  # of the latent's largest activation, above which a token counts as active
TRIES = 3  # for an answer that can be read

EXPLAIN = """Each of the passages below was read by a language model. One latent inside the model was active on the
parts between << and >>, and silent on the rest. Find what makes it active: a word, a kind of word, a topic, a piece of
syntax, a place in the text, or what comes next.

{passages}

Answer with nothing but a description in one short sentence."""

DETECT = """A latent inside a language model is said to be active on this: {explanation}

Which of these passages have a part on which it would be active?

{passages}

Answer with nothing but the numbers of those passages, separated by commas, or the word none."""


@dataclass(frozen=True)
class Passage:
    """A few tokens of one document.

    Attributes:
        pieces: their texts.
        active: on which of them the latent is active.
    """

    pieces: list[str]
    active: list[bool]

    def plain(self) -> str:
        """The text as a JSON string: quotes and line breaks cannot be taken for the prompt's own."""
        return json.dumps("".join(self.pieces), ensure_ascii=False)

    def marked(self) -> str:
        """The same with << and >> around the active parts."""
        text, before = "", False
        for piece, active in zip(self.pieces, self.active, strict=True):
            text += ("<<" if active and not before else ">>" if before and not active else "") + piece
            before = active
        return json.dumps(text + (">>" if before else ""), ensure_ascii=False)


@dataclass(frozen=True)
class Exam:
    """What the judge is shown about one latent, and asked.

    Attributes:
        shown: with the active parts marked.
        asked: without, in a random order.
    """

    latent: int
    shown: list[Passage]
    asked: list[Passage]

    @property
    def expected(self) -> list[bool]:
        return [any(passage.active) for passage in self.asked]

    def explain_prompt(self) -> str:
        return EXPLAIN.format(passages=numbered(passage.marked() for passage in self.shown))

    def detect_prompt(self, explanation: str) -> str:
        return DETECT.format(passages=numbered(passage.plain() for passage in self.asked), explanation=explanation)

    def key(self, model: str) -> str:
        """What the result hangs on: latent, judge, and the prompts, as a fingerprint."""
        return fingerprint([self.latent, model, self.explain_prompt(), self.detect_prompt(""), self.expected])


@dataclass(frozen=True)
class Verdict:
    """A judge's result; `score` is the share of passages told right, `problem` says why there is none."""

    latent: int
    explanation: str
    score: float | None
    problem: str | None = None


def numbered(lines: Iterable[str]) -> str:
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


# ---- passages --------------------------------------------------------------------------------------------------------


def make_exam(sample: Sample, latent: int, pieces: Callable[[int], str]) -> Exam | None:
    """The passages of a latent, always the same; None if it is active in too few places that do not overlap.

    Args:
        pieces: from a token's id to its text.
    """
    generator = np.random.default_rng([0, latent])
    places, values = sample.column_of(latent)
    taken: list[int] = []
    n_top, n_drawn = TOP_SHOWN + TOP_ASKED, DRAWN_SHOWN + DRAWN_ASKED
    top = apart(places[np.argsort(-values, kind="stable")], n_top, taken)
    # sorted by u^(1/w), u uniform, the first so many are a draw with weights w without putting back
    keys = np.log(generator.random(len(values))) / values
    drawn = apart(places[np.argsort(-keys, kind="stable")], n_drawn, taken)
    others = apart(generator.permutation(np.flatnonzero(sample.valid)), RANDOM_ASKED, taken)
    if len(top) < n_top or len(drawn) < n_drawn or len(others) < RANDOM_ASKED:
        return None
    top, drawn = [generator.permutation(part).tolist() for part in (top, drawn)]
    least = ACTIVE_SHARE * float(values.max())
    active = dict.fromkeys(places[values > least].tolist(), True)

    def passage(place: int) -> Passage:
        start, stop = max(place - BUFFER, 0), min(place + BUFFER + 1, len(sample.token))
        inside = [other for other in range(start, stop) if sample.doc[other] == sample.doc[place]]
        return Passage([pieces(int(sample.token[p])) for p in inside], [active.get(p, False) for p in inside])

    shown = [*top[:TOP_SHOWN], *drawn[:DRAWN_SHOWN]]
    asked = generator.permutation([*top[TOP_SHOWN:], *drawn[DRAWN_SHOWN:], *others]).tolist()
    return Exam(latent, [passage(place) for place in shown], [passage(place) for place in asked])


def apart(places: np.ndarray, n: int, taken: list[int]) -> list[int]:
    """The first `n` of `places` whose passages do not overlap with one another's or those in `taken`, which grows."""
    chosen: list[int] = []
    for place in places.tolist():
        if len(chosen) == n:
            break
        if all(abs(place - other) > 2 * BUFFER for other in taken):
            chosen.append(place)
            taken.append(place)
    return chosen


# ---- the judge's part ------------------------------------------------------------------------------------------------


def examine(judge: Judge, exam: Exam) -> Verdict:
    """Ask for an explanation and for what fits it.

    Raises:
        ConfigError: the endpoint cannot be used, see `Judge.answer`.
    """
    explanation = " ".join(last_words(judge.answer(exam.explain_prompt())).split())
    if not explanation:
        return Verdict(exam.latent, "", None, "the judge explained nothing")
    for _ in range(TRIES):
        named = numbers_in(judge.answer(exam.detect_prompt(explanation)), len(exam.asked))
        if named is not None:
            right = [(number in named) == yes for number, yes in enumerate(exam.expected, 1)]
            return Verdict(exam.latent, explanation, sum(right) / len(right))
    return Verdict(exam.latent, explanation, None, f"the judge named no passages in {TRIES} answers")


def last_words(answer: str) -> str:
    """An answer without the thoughts that some models put before it."""
    return answer.rsplit("</think>", 1)[-1].strip()


def numbers_in(answer: str, most: int) -> set[int] | None:
    """The passages that an answer names in its last line; None if that line is anything else than numbers or `none`."""
    line = (last_words(answer).splitlines() or [""])[-1]
    if re.fullmatch(r"\W*none\W*", line, re.IGNORECASE):
        return set()
    if not re.fullmatch(r"\W*\d{1,9}(?:(?:\W|\band\b)+\d{1,9})*\W*", line):
        return None
    found = {int(number) for number in re.findall(r"\d+", line)}
    return found if all(1 <= number <= most for number in found) else None


# ---- results as they come --------------------------------------------------------------------------------------------


def examine_all(judge: Judge, exams: list[Exam], path: Path) -> Iterator[Verdict]:
    """The verdict on each exam; those that `path` has are taken from there, new ones are added to it at once."""
    known = read_verdicts(path)
    for exam in exams:
        key = exam.key(judge.model)
        if key not in known:
            verdict = examine(judge, exam)
            if verdict.score is not None:  # what failed is asked again next time
                append(path, {"key": key, "model": judge.model, **vars(verdict)})
            known[key] = verdict
        yield known[key]


def read_verdicts(path: Path) -> dict[str, Verdict]:
    """The verdicts of a file by their keys; a torn line does not count.

    Raises:
        StoreError: it holds something else.
    """
    found = {}
    try:
        for line in read_lines(path) if path.exists() else []:
            found[str(line["key"])] = Verdict(int(line["latent"]), str(line["explanation"]), float(line["score"]))
    except (UnicodeDecodeError, LookupError, TypeError, ValueError):
        raise StoreError(
            f"{path}: not a file of judged latents. Move it away and run the same command again."
        ) from None
    return found


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line, durably; a torn last one is closed first."""
    path.parent.mkdir(exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
