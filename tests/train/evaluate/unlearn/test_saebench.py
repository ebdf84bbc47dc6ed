"""SAEBench's protocol on a small Gemma-2, against its steps written out with transformers alone."""

from __future__ import annotations

import functools
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2ForCausalLM

from common.config import build
from common.errors import ConfigError, StoreError
from common.files import read_json
from common.models import load_model
from common.sources import find_model
from common.stopping import Stop
from common.tokenizers import HfTokenizer
from tests.train.evaluate.unlearn.gemma import BOS, D, make_data, make_gemma, make_tokenizer
from train.config import UnlearnConfig
from train.evaluate.subject import Models
from train.evaluate.unlearn import exam, saebench
from train.evaluate.unlearn.clamp import Clamp
from train.evaluate.unlearn.command import unlearn_runs
from train.evaluate.unlearn.exam import always_right, make_exam
from train.evaluate.unlearn.losses import Patient
from train.evaluate.unlearn.questions import FORGET_SET, SIDE_SETS, Question, corpora, prompt, subject_of_set
from train.evaluate.unlearn.saebench import SAEBENCH_METRICS, Setting, summarise
from train.saes import load_sae, make_sae, save_sae
from train.saes.base import SAE

HOOKED_LAYER = 1


def make_random_sae() -> SAE:
    """Random directions, each above a threshold: it fires on some tokens in some places."""
    sae = make_sae("standard", {"d_sae": 48, "l1": 0.1}, D, 5, "test").requires_grad_(False)
    sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=-1))
    sae.W_enc.copy_(sae.W_dec.t())
    sae.b_enc.fill_(-5.0)
    return sae


@pytest.fixture(scope="module")
def folder(letters_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `gemma-2-tiny-it`, SAEBench's files in `data`, and a run whose SAE takes 16 dimensions."""
    folder = tmp_path_factory.mktemp("saebench")
    make_gemma(folder / "gemma-2-tiny-it")
    make_data(folder / "data")
    shutil.copytree(letters_folder / "run", folder / "run")
    save_sae(make_random_sae(), folder / "run" / "letters" / "sae", {})
    return folder


def unlearn(folder: Path, **more: Any) -> dict[str, Any]:
    values = {"data": folder / "data", "model": str(folder / "gemma-2-tiny-it"), "device": "cpu"}
    return unlearn_runs([folder / "run"], build(UnlearnConfig, values | more, "test"), Stop())[0]


class Plain:
    """The model and SAEBench's steps 2 to 5, one prompt or row at a time, in float32."""

    def __init__(self, folder: Path) -> None:
        self.model = Gemma2ForCausalLM.from_pretrained(folder / "gemma-2-tiny-it")
        self.tokenizer = make_tokenizer()
        self.sae = load_sae(folder / "run" / "letters")
        letters = [f"{space}{letter}" for space in ("", " ") for letter in "ABCD"]
        self.letter_ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in letters]

    @torch.no_grad()
    def stream(self, ids: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = self.model.model.layers[HOOKED_LAYER].register_forward_hook(lambda m, i, out: seen.append(first(out)))
        self.model(ids)
        hook.remove()
        return seen[0]

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, latents: tuple[int, ...] = (), value: float = 0.0) -> torch.Tensor:
        """Logits with latents set to −value where they fire, but for the first position."""

        def change(module: Any, inputs: Any, output: Any) -> Any:
            x = first(output)
            codes = self.sae.encode(x[0])[None]
            codes[:, 0, :] = 0
            error = x - self.sae.decode(codes)
            for i in latents:
                codes[..., i] = torch.where(codes[..., i] > 0, -value, codes[..., i])
            changed = error + self.sae.decode(codes)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        hook = self.model.model.layers[HOOKED_LAYER].register_forward_hook(change)
        logits: torch.Tensor = self.model(ids).logits
        hook.remove()
        return logits

    @functools.lru_cache  # noqa: B019  (thresholds and numbers often choose the same latents)
    def letter(self, text: str, latents: tuple[int, ...] = (), value: float = 0.0) -> int:
        """The letter that the model prefers after a prompt."""
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        each = self.logits(ids, latents, value)[0, -1].softmax(-1)[self.letter_ids]
        return int(torch.maximum(each[:4], each[4:]).argmax())

    def densities(self, rows: torch.Tensor) -> torch.Tensor:
        """Share of the tokens but BOS, EOS and padding on which each latent fires."""
        fired, counted = torch.zeros(self.sae.d_sae), 0
        for row in rows:
            x = self.stream(row[None])
            keep = (row != 0) & (row != 1) & (row != BOS)
            with torch.no_grad():
                fired += (self.sae.encode(x[0])[keep] > 0).sum(0)
            counted += int(keep.sum())
        return torch.round(fired / counted, decimals=6)


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """The protocol's result, the questions being those that the model answers rightly in the first order.

    No random model is right in every order; float32, so that no rounding decides between letters.
    """
    plain = Plain(folder)
    real_load = Models.load

    def right_in_first(patient: Any, questions: list[Question], name: str) -> list[int]:
        prompts = [prompt(one, subject_of_set(name)) for one in questions]
        return [
            i for i, (one, text) in enumerate(zip(questions, prompts, strict=True)) if plain.letter(text) == one.answer
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exam, "always_right", right_in_first)
        patch.setattr(Models, "load", lambda self, name, dtype: real_load(self, name))
        return unlearn(folder)


def test_every_setting_agrees_with_the_steps_written_out(found: dict[str, Any], folder: Path) -> None:
    plain = Plain(folder)
    tokenizer = HfTokenizer(plain.tokenizer)
    forget, retain = (plain.densities(rows.tokens) for rows in corpora(folder / "data", tokenizer))
    file = next((folder / "data").glob("correct-*.json"))
    right = {name: read_json(file)[name]["right"] for name in (FORGET_SET, *SIDE_SETS)}
    questions = {name: saebench.read_questions(folder / "data", name) for name in right}
    settings = list(itertools.product((0.001, 0.01), (10, 20), (25.0, 50.0, 100.0, 200.0)))
    assert len(found["settings"]) == len(settings) == 16
    lost: list[float] = []
    for row, (threshold, n, value) in zip(found["settings"], settings, strict=True):
        ordered = sorted((i for i in range(48) if retain[i] < threshold and forget[i] > 0), key=lambda i: -forget[i])
        latents = tuple(ordered[:n])
        shares = {}
        for key, names in (("accuracy_forget", [FORGET_SET]), ("accuracy_retain", SIDE_SETS)):
            asked = [(name, questions[name][i]) for name in names for i in right[name]]
            kept = [plain.letter(prompt(q, subject_of_set(name)), latents, value) == q.answer for name, q in asked]
            shares[key] = sum(kept) / len(kept)
        assert (row["threshold"], row["n"], row["multiplier"]) == (threshold, n, value)
        assert row["n_used"] == len(latents)
        assert {key: row[key] for key in shares} == pytest.approx(shares)
        lost += [1 - share for share in shares.values()]
    assert len({round(share, 3) for share in lost}) > 2  # or little was compared


def test_result_has_its_own_file_and_metrics(found: dict[str, Any], folder: Path) -> None:
    assert list(found["metrics"]) == list(SAEBENCH_METRICS)
    assert read_json(folder / "run" / "letters" / "eval" / "unlearn-saebench.json") == found
    assert found["suite"] == "unlearn-saebench"
    admitted = [row["accuracy_forget"] for row in found["settings"] if row["accuracy_retain"] >= 0.99]
    assert found["metrics"]["score"] == pytest.approx(1 - min([*admitted, 1.0]))
    assert {"index", "density_forget", "density_retain", "mean", "tokens"} == set(found["latents"][0])


def test_no_question_right_in_every_order_gives_no_score(folder: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", n_questions=2)
    found = unlearn(folder, data=data)  # in bfloat16, as is its way
    assert found["metrics"]["score"] is None
    assert found["reasons"]["score"] == (
        "the unchanged model answers no question of wmdp-bio and MMLU rightly in every order"
    )
    assert found["settings"] == []
    assert found["metrics"]["questions_forget"] == 0
    assert found["reasons"]["delta_ce"] == "there is no best setting"


def test_kept_numbers_of_another_form_are_one_error(folder: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", n_questions=1)
    unlearn(folder, data=data)
    (kept,) = data.glob("correct-*.json")
    kept.write_text("[1, 2]")
    with pytest.raises(StoreError, match=r"correct-.*\.json: no numbers of questions. Remove it"):
        unlearn(folder, data=data)
    kept.write_text('{"wmdp-bio": {"questions": 1}}')  # of other questions: found anew
    assert unlearn(folder, data=data)["metrics"]["questions_forget"] == 0


def test_always_right_keeps_what_is_right_in_all_orders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that knows the answer of questions 0 and 2, says A to question 1, and fails question 3 in one order."""
    questions = [Question(f"q{i}", ("w", "x", "y", "z"), 1) for i in range(4)]
    asked: list[int] = []

    def reader(patient: Any, one: exam.Exam) -> torch.Tensor:
        asked.append(len(one.answers))
        texts = [patient.model.tokenizer.decode(row.tolist()) for row in one.rows.tokens]
        picked = []
        for text, answer in zip(texts, one.answers.tolist(), strict=True):
            odd = "q3" in text and "A. z\nB. y\nC. x" in text
            picked.append(0 if "q1" in text else (answer + 1) % 4 if odd else answer)
        return torch.tensor(picked)

    class Patient:
        class model:  # noqa: N801
            tokenizer = HfTokenizer(make_tokenizer())

    monkeypatch.setattr(exam, "letters", reader)
    assert always_right(Patient, questions, "human_aging") == [0, 2]  # type: ignore[arg-type]
    assert len(asked) == 24
    assert asked[0] == 4  # the first order has the answer at B: question 1 falls out, and is not asked again
    assert asked[1:23].count(3) == 22
    assert asked[23] == 3  # z, y, x, w comes last


def test_orders_permute_choices_and_answer_together() -> None:
    tokenizer = HfTokenizer(make_tokenizer())
    questions = [Question("?", ("w", "x", "y", "z"), 1)]
    one = make_exam(questions, "human_aging", tokenizer, (3, 1, 0, 2))
    assert one.answers.tolist() == [1]
    assert make_exam(questions, "human_aging", tokenizer, (3, 0, 2, 1)).answers.tolist() == [3]
    assert "A. z\nB. x\nC. w\nD. y" in tokenizer.decode(one.rows.tokens[0].tolist())


def row(forget: float, retain: float) -> dict[str, Any]:
    return {"accuracy_forget": forget, "accuracy_retain": retain}


def scored(*rows: dict[str, Any]) -> tuple[dict[str, Any], Setting | None]:
    settings = [Setting(0.01, 10, Clamp((i,), (25.0,)), 25.0) for i in range(len(rows))]
    exams = {name: exam.Exam(None, torch.zeros(3)) for name in (FORGET_SET, *SIDE_SETS)}  # type: ignore[arg-type]
    return summarise(settings, list(rows), exams, {})


def test_score_is_of_settings_that_spare_the_rest() -> None:
    metrics, best = scored(row(0.2, 0.98), row(0.7, 0.99), row(0.6, 1.0), row(0.6, 0.99))
    assert metrics["score"] == pytest.approx(0.4)
    assert best is not None
    assert best.clamp.latents == (2,)
    assert (metrics["questions_forget"], metrics["questions_retain"]) == (3, 12)


def test_score_is_zero_where_no_setting_spares_the_rest() -> None:
    metrics, best = scored(row(0.0, 0.5), row(1.0, 1.0))
    assert metrics["score"] == 0
    assert best is None


def test_rise_on_ordinary_text_is_that_of_a_plain_forward(folder: Path) -> None:
    plain = Plain(folder)
    model = load_model(find_model(str(folder / "gemma-2-tiny-it")), "cpu")
    patient = Patient(model, plain.sae, f"blocks.{HOOKED_LAYER}.hook_resid_post", lambda: None)
    latents = tuple(range(20))
    metrics: dict[str, Any] = {}
    best = Setting(0.01, 20, Clamp(latents, (50.0,) * 20), 50.0)
    saebench.fill_delta_ce(metrics, {}, patient, best, folder / "data")
    text = "a quiver on the mat, " * 10  # of four documents two are looked at, in rows of 128 with BOS
    ids = plain.tokenizer(text, add_special_tokens=False)["input_ids"]
    rises = []
    for piece in (ids[:127], ids[127:]):
        row = torch.tensor([[BOS, *piece]])
        each = [
            torch.nn.functional.cross_entropy(plain.logits(row, *clamp)[0, 1:-1], row[0, 2:], reduction="none")
            for clamp in ((), (latents, 50.0))
        ]
        rises.append(each[1] - each[0])
    assert metrics["delta_ce"] == pytest.approx(float(torch.cat(rises).mean()), rel=1e-4)
    assert abs(metrics["delta_ce"]) > 0.01


@pytest.mark.parametrize("name", ["gemma-2-2b", "pythia-70m", "/models/llama-it/"])
def test_models_that_saebench_does_not_know_are_refused(name: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"is for gemma-2-2b-it and gemma-2-9b-it, not .*--forget and --retain"):
        unlearn(folder, model=name)


def test_model_of_another_width_is_refused(folder: Path, tmp_path: Path) -> None:
    wide = make_sae("standard", {"d_sae": 8, "l1": 0.1}, 8, 0, "test")
    shutil.copytree(folder / "run", tmp_path / "run")
    save_sae(wide, tmp_path / "run" / "letters" / "sae", {})
    values = {"data": folder / "data", "model": str(folder / "gemma-2-tiny-it"), "device": "cpu"}
    with pytest.raises(ConfigError, match=r"16 dimensions at blocks\.1\.hook_resid_post, the SAE takes 8"):
        unlearn_runs([tmp_path / "run"], build(UnlearnConfig, values, "test"), Stop())


def test_settings_of_its_own_are_refused_beside_data() -> None:
    with pytest.raises(ConfigError, match="leave out --absolute"):
        build(UnlearnConfig, {"data": "x", "absolute": ("3",)}, "test")
