"""Explaining and detecting: the passages, the answers that can be read, and results that are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, StoreError
from tests.train.evaluate.chat import Asked, Chat, Reply, chat
from tests.train.evaluate.samples import sample_of
from train.evaluate.detection import (
    BUFFER,
    Exam,
    Passage,
    Verdict,
    examine,
    examine_all,
    last_words,
    make_exam,
    numbers_in,
    read_verdicts,
)
from train.evaluate.judge import Judge
from train.evaluate.sample import Sample

EVERY = 25  # tokens between activations
N = 60 * EVERY
ACTIVE = range(12, N, EVERY)


def example() -> Sample:
    """Sixty passages of a latent, the later the stronger, in three documents; token ids are their places."""
    codes = np.zeros((N, 1))
    codes[ACTIVE, 0] = np.arange(1, 61)
    codes[13, 0] = 0.1  # less than a hundredth of the maximum
    return sample_of(list(range(N)), np.repeat([0, 1, 2], N // 3).tolist(), codes)


def exam_of(sample: Sample, latent: int = 0) -> Exam:
    exam = make_exam(sample, latent, lambda token: f" {token}")
    assert exam is not None
    return exam


def places(passages: list[Passage]) -> list[list[int]]:
    return [[int(piece) for piece in passage.pieces] for passage in passages]


def peaks(passages: list[Passage]) -> list[int]:
    """The place of the active token of each passage, −1 where there is none."""
    found = []
    for passage in passages:
        active = [int(piece) for piece, yes in zip(passage.pieces, passage.active, strict=True) if yes]
        assert len(active) <= 1
        found.append(active[0] if active else -1)
    return found


def test_passages_are_those_of_the_protocol() -> None:
    exam = exam_of(example())
    top = set(list(ACTIVE)[-12:])
    shown, asked = peaks(exam.shown), peaks(exam.asked)
    assert len(shown) == 15
    assert set(shown[:10]) <= top
    assert not set(shown[10:]) & top
    assert len(asked) == 14
    assert len([peak for peak in asked if peak in top]) == 2
    assert exam.expected == [peak >= 0 for peak in asked]
    assert sum(exam.expected) >= 4  # random ones may hold an activation too
    every = [place for passage in places([*exam.shown, *exam.asked]) for place in passage]
    assert len(every) == len(set(every))  # nothing twice
    assert all(len(passage) <= 2 * BUFFER + 1 for passage in places(exam.shown))
    assert exam == exam_of(example())


def test_drawn_passages_are_the_likelier_the_stronger() -> None:
    sample = example()
    sample.codes.data[:] = np.where(np.arange(61) % 2, 1000.0, 1.0)[: len(sample.codes.data)]
    strong = {int(place) for place, value in zip(*sample.column_of(0), strict=True) if value > 1}
    drawn = peaks(exam_of(sample).shown[10:])
    assert len(drawn) == 5
    assert set(drawn) <= strong


def test_passages_end_with_their_document() -> None:
    sample = example()
    for passage in places([*exam_of(sample).shown, *exam_of(sample).asked]):
        assert len({int(sample.doc[place]) for place in passage}) == 1


def test_a_latent_with_few_passages_has_no_exam() -> None:
    sample = example()
    codes = sample.codes.toarray()
    codes[codes < 43] = 0  # eighteen are left; nineteen are needed
    assert make_exam(sample_of(sample.token.tolist(), sample.doc.tolist(), codes), 0, str) is None
    codes = np.zeros((N, 1))
    codes[:300] = 1.0  # often active, and everywhere side by side: 300 tokens are fifteen passages at most
    assert make_exam(sample_of(sample.token.tolist(), sample.doc.tolist(), codes), 0, str) is None


def test_active_parts_are_marked_and_quotes_and_line_breaks_escaped() -> None:
    passage = Passage(['a "', "b", " c", "\n", "d"], [False, True, True, False, True])
    assert passage.marked() == '"a \\"<<b c>>\\n<<d>>"'
    assert passage.plain() == '"a \\"b c\\nd"'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2, 5, 14", {2, 5, 14}),
        (" 3 ", {3}),
        ("[1, 2] and 3.", {1, 2, 3}),
        ("1\nNone.", set()),
        ("NONE", set()),
        ("I think that\n**4**, 7", {4, 7}),
        ("<think>1, 2</think>\n\n9", {9}),
        ("Passages 2 and 5 fit.", None),
        ("15", None),
        ("0", None),
        ("1" * 5000, None),
        ("", None),
        ("none of these but 3", None),
    ],
)
def test_answers_are_read_or_not_at_all(answer: str, expected: set[int] | None) -> None:
    assert numbers_in(answer, 14) == expected


def test_thoughts_are_not_the_answer() -> None:
    assert last_words("<think>it may be\nx</think> grain ") == "grain"
    assert last_words("grain") == "grain"


# ---- with a judge ----------------------------------------------------------------------------------------------------


def perfect(asked: Asked, exam: Exam) -> Reply:
    """Explains, and then knows it all."""
    if "Answer with nothing but a description" in asked.prompt:
        return Reply("words of {grain}\nand such")
    return Reply(", ".join(str(number) for number, yes in enumerate(exam.expected, 1) if yes) or "none")


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Judge, Chat, Exam]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    exam = exam_of(example())
    with chat(lambda asked, _: perfect(asked, exam)) as server, Judge(server.address, "owl", None, fail) as client:
        yield client, server, exam


def fail(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s")


def test_a_judge_who_knows_scores_one(judge: tuple[Judge, Chat, Exam]) -> None:
    client, server, exam = judge
    assert examine(client, exam) == Verdict(0, "words of {grain} and such", 1.0)
    explain, detect = [asked.prompt for asked in server.asked]
    assert explain.count("<<") == 15 + 1  # one in the text
    assert "words of {grain} and such" in detect
    assert "<<" not in detect
    assert all(f"{number}. " in detect for number in range(1, 15))


def test_score_is_the_share_told_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    exam = exam_of(example())
    with chat(lambda asked, _: Reply("none")) as server, Judge(server.address, "owl", None, fail) as client:
        found = examine(client, exam)
    assert found.score == pytest.approx(exam.expected.count(False) / 14)


def test_answers_that_cannot_be_read_are_asked_for_again_and_then_left(tmp_path: Path) -> None:
    exam = exam_of(example())
    answers = ["grain", "it is hard to say", "maybe", "none"]
    with chat(lambda _, number: Reply(answers[number])) as server, Judge(server.address, "owl", None, fail) as client:
        assert examine(client, exam).score is not None
    path = tmp_path / "eval" / "found.jsonl"
    with chat(lambda *_: Reply("hard to say")) as server, Judge(server.address, "owl", None, fail) as client:
        (found,) = examine_all(client, [exam], path)
        assert (found.score, found.problem) == (None, "the judge named no passages in 3 answers")
        assert len(server.asked) == 4
    assert not path.exists()  # asked again next time
    with chat(lambda *_: Reply(" ")) as server, Judge(server.address, "owl", None, fail) as client:
        assert examine(client, exam).problem == "the judge explained nothing"


def test_results_are_kept_as_they_come_and_not_paid_for_twice(tmp_path: Path) -> None:
    sample = example()
    both = sample_of(sample.token.tolist(), sample.doc.tolist(), np.repeat(sample.codes.toarray(), 2, axis=1))
    exams = [exam_of(both, 0), exam_of(both, 1)]
    path = tmp_path / "eval" / "found.jsonl"

    def answer(asked: Asked, number: int) -> Reply:
        return Reply(status=401) if number == 2 else perfect(asked, exams[number > 2])

    with chat(answer) as server, Judge(server.address, "owl", None, fail) as client:
        with pytest.raises(ConfigError, match="HTTP 401"):
            list(examine_all(client, exams, path))
        assert [line["latent"] for line in map(json.loads, path.read_text().splitlines())] == [0]
        with path.open("a") as file:
            file.write('{"key": "tor')  # a kill in the middle of a line
        found = list(examine_all(client, exams, path))
        assert [verdict.latent for verdict in found] == [0, 1]
        assert len(server.asked) == 2 + 1 + 2
        assert list(examine_all(client, exams, path)) == found
        assert len(server.asked) == 5
    with chat(lambda asked, n: perfect(asked, exams[0])) as server, Judge(server.address, "crow", None, fail) as other:
        list(examine_all(other, exams[:1], path))
        assert len(server.asked) == 2  # another model is another judge
    assert len(read_verdicts(path)) == 3


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    for content in (
        b'{"a": 1}\n',
        b"[1]\n",
        b"\xff\xfe\n",
        b'{"key": 1, "latent": "x", "explanation": "", "score": 1}\n',
    ):
        path.write_bytes(content)
        with pytest.raises(StoreError, match="not a file of judged latents"):
            read_verdicts(path)
