"""What SAEBench asks, of whom: Gemma-2-it with an SAE at a hook, and the questions that it always answers rightly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.console import Progress, say
from common.errors import ConfigError, StoreError
from common.files import fingerprint, read_json, write_json
from common.models import LanguageModel
from common.tokenizers import HfTokenizer
from train.evaluate.subject import Subject
from train.evaluate.unlearn.clamp import Clamp
from train.evaluate.unlearn.losses import Patient
from train.evaluate.unlearn.passages import Passages
from train.evaluate.unlearn.questions import Question, as_rows, letter_ids, prompt, subject_of_set

ORDERS = tuple(itertools.permutations(range(4)))


@dataclass(frozen=True)
class Exam:
    """Questions asked: rows, and the index of the right letter of each."""

    rows: Passages
    answers: Tensor

    def of(self, which: Tensor) -> Exam:
        """Some of them."""
        return Exam(self.rows.of(which), self.answers[which]) if len(which) else self


# ---- the model ---------------------------------------------------------------------------------------------------


def open_patient(subject: Subject) -> Patient:
    """The model that is asked, in bfloat16, with the SAE at its hook.

    Raises:
        ConfigError: SAEBench does not know it, or it does not fit the SAE, or the SAE sees the future.
    """
    subject.refuse_future()
    name = subject.config.model or subject.store.header["settings"]["model"]
    short = name.rstrip("/").split("/")[-1].lower()
    if "gemma-2" not in short or "-it" not in short:
        raise ConfigError(
            f"--data: SAEBench's protocol is for gemma-2-2b-it and gemma-2-9b-it, not {name}. "
            "Name one with --model; for other models there is --forget and --retain, on losses."
        )
    model = subject.models.load(name, dtype="bfloat16")
    if not isinstance(model.tokenizer, HfTokenizer):
        raise ConfigError(f"--model {name}: it has no tokenizer of its own.")
    hook = model.resolve_hook(subject.plan.hook)
    refuse_other_width(model, hook, subject)
    return Patient(model, subject.sae, hook, subject.refuse_when_stopped)


def refuse_other_width(model: LanguageModel, hook: str, subject: Subject) -> None:
    """Raises:
    ConfigError: the hook's activations are not as wide as the SAE's.
    """
    seen = model.capture(torch.zeros(1, 2, dtype=torch.int64, device=model.device), [hook])[hook].flatten(2)
    if seen.shape[-1] != subject.sae.d_in:
        raise ConfigError(
            f"--model {model.source.name}: {seen.shape[-1]} dimensions at {hook}, the SAE takes {subject.sae.d_in}. "
            "Name the tuned version of the model that the store was harvested from."
        )


@torch.no_grad()
def letters(patient: Patient, exam: Exam, clamp: Clamp | None = None) -> Tensor:
    """Which letter the model prefers after each prompt, int64 [questions]: the likeliest of both its tokens."""
    assert isinstance(patient.model.tokenizer, HfTokenizer)
    ids = letter_ids(patient.model.tokenizer).to(patient.model.device)
    picked = torch.zeros(len(exam.answers), dtype=torch.int64)
    for numbers, rows in patient.batches(exam.rows):
        logits = patient.logits(rows, clamp)
        ends = (rows.lengths - 1).to(logits.device)
        last = logits[torch.arange(len(ends), device=logits.device), ends]
        picked[numbers] = last.softmax(-1)[:, ids].amax(1).argmax(-1).cpu()  # in the model's type, as there
    return picked


# ---- the questions -----------------------------------------------------------------------------------------------


def asked(patient: Patient, folder: Path, sets: dict[str, list[Question]]) -> dict[str, Exam]:
    """Of each set the questions that the unchanged model answers rightly in every order, in the first order.

    Their numbers are kept in the data folder, one file for each model, since finding them takes long.
    """
    tokenizer = patient.model.tokenizer
    assert isinstance(tokenizer, HfTokenizer)
    key = fingerprint([patient.model.source.identity(), tokenizer.identity(), patient.model.device.type])
    file = folder / f"correct-{key[:16]}.json"
    known = read_json(file) if file.exists() else {}
    if not isinstance(known, dict) or not all(isinstance(of_set, dict) for of_set in known.values()):
        raise StoreError(f"{file}: no numbers of questions. Remove it, and they are looked for again.")
    exams = {}
    for name, questions in sets.items():
        content = fingerprint([[q.question, list(q.choices), q.answer] for q in questions])
        if known.get(name, {}).get("questions") != content:
            known[name] = {"questions": content, "right": always_right(patient, questions, name)}
            write_if_possible(file, known)
        chosen = [questions[i] for i in known[name]["right"]]
        exams[name] = make_exam(chosen, name, tokenizer)
    return exams


def always_right(patient: Patient, questions: list[Question], name: str) -> list[int]:
    """Numbers of the questions answered rightly in all 24 orders; each order asks only those right so far."""
    assert isinstance(patient.model.tokenizer, HfTokenizer)
    left = list(range(len(questions)))
    progress = Progress(f"questions {name}", len(ORDERS))
    for number, order in enumerate(ORDERS):
        exam = make_exam([questions[i] for i in left], name, patient.model.tokenizer, order)
        right = letters(patient, exam) == exam.answers
        left = [i for i, ok in zip(left, right.tolist(), strict=True) if ok]
        progress.update(number + 1, f"{len(left)} right in {number + 1} orders")
    progress.close(len(ORDERS), f"{len(left)} of {len(questions)} right in every order")
    return left


def make_exam(questions: list[Question], name: str, tokenizer: HfTokenizer, order: tuple[int, ...] = ORDERS[0]) -> Exam:
    """Questions of one set with their choices in `order`."""
    prompts = [prompt(one, subject_of_set(name), order) for one in questions]
    return Exam(as_rows(prompts, tokenizer), torch.tensor([order.index(one.answer) for one in questions]))


def write_if_possible(file: Path, known: dict[str, Any]) -> None:
    """Keep what was found, unless the folder cannot be written to."""
    try:
        write_json(file, known)
    except StoreError:
        raise
    except OSError as error:
        say(f"{file}: cannot be written ({error.strerror}), so the questions are looked for again next time")
