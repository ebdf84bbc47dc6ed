"""The protocol on a model and an SAE of which everything is known, and against a plain forward of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from common.config import build
from common.errors import ConfigError, DataError, Interrupted
from common.files import read_json
from common.stopping import Stop
from tests.train.evaluate.unlearn.bigrams import LETTERS, A, Q, X, make_letters_sae
from train.config import UnlearnConfig
from train.evaluate.unlearn import losses, nll
from train.evaluate.unlearn.command import unlearn_runs

SMALL: dict[str, Any] = {"threshold": ("0.01",), "latents": ("1", "5"), "multiplier": ("0", "20"), "absolute": ("25",)}


def config(folder: Path, **more: Any) -> UnlearnConfig:
    texts = {name: str(folder / name) for name in ("forget", "retain")}
    return build(UnlearnConfig, texts | SMALL | {"device": "cpu"} | more, "test")


def unlearn(run: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return unlearn_runs([run], config(folder, **more), Stop())[0]


@pytest.fixture(scope="module")
def found(letters_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the protocol finds, with a third text."""
    import shutil

    run = Path(shutil.copytree(letters_folder / "run", tmp_path_factory.mktemp("nll") / "run"))
    return unlearn(run, letters_folder, also_retain=str(letters_folder / "third"))


def setting(found: dict[str, Any], kind: str = "settings", **wanted: Any) -> dict[str, Any]:
    rows = [row for row in found[kind] if all(row[key] == value for key, value in wanted.items())]
    assert len(rows) == 1
    return dict(rows[0])


def test_clamping_takes_the_forget_text_alone(found: dict[str, Any]) -> None:
    row = setting(found, n=5, unit="absolute")
    assert row["n_used"] == 3  # q, v and w: every third letter of the text, and none of the other
    assert row["delta_forget"] > 5
    assert row["delta_retain"] == 0
    assert row["delta_also_retain"] > 5


def test_ablating_a_part_of_an_embedding_does_nothing_to_a_model_that_norms_it(found: dict[str, Any]) -> None:
    row = setting(found, n=5, multiplier=0)
    assert row["delta_forget"] == pytest.approx(0, abs=1e-4)


def test_metrics_are_those_of_the_best_setting(found: dict[str, Any]) -> None:
    metrics = found["metrics"]
    assert list(metrics) == list(nll.METRICS)
    best = max(found["settings"], key=lambda row: row["relative_forget"])
    assert metrics["score"] == best["relative_forget"]
    assert metrics["area"] == pytest.approx(best["relative_forget"])  # nothing is lost of the rest, whatever is allowed
    assert metrics["delta_forget"] == best["delta_forget"]
    assert metrics["delta_retain"] == 0
    assert metrics["score_low"] <= metrics["score"] <= metrics["score_high"]
    assert metrics["score_also"] == 0  # the third text holds the same words
    assert metrics["best"] == "τ 0.01, 3 latents, −20 mean" if best["unit"] == "mean" else "τ 0.01, 3 latents, −25 raw"
    assert found["reasons"] == {}
    assert found["suite"] == "unlearn"


def test_controls_are_other_latents_of_like_density(found: dict[str, Any]) -> None:
    assert [row["kind"] for row in found["controls"]] == ["random"] * 6
    row = setting(found, "controls", n=5, unit="absolute")
    assert row["n_used"] == 3
    assert row["delta_retain"] > 1  # whatever they are, they are letters of the retain text
    assert found["metrics"]["score_random"] < 0.01 * found["metrics"]["score"]


def test_front_holds_one_setting_where_one_beats_all(found: dict[str, Any]) -> None:
    assert found["pareto"] == [max(found["settings"], key=lambda row: row["delta_forget"])]


def test_chosen_latents_are_told_with_their_tokens(found: dict[str, Any]) -> None:
    told = {one["index"]: one for one in found["latents"]}
    assert sorted(told) == [0, 1, 2]
    assert told[Q]["tokens"] == [["q", 1.0]]
    assert told[Q]["density_retain"] == 0
    assert told[Q]["density_forget"] == pytest.approx(1 / 6, abs=0.02)
    assert told[Q]["mean"] == pytest.approx(0.05, abs=1e-5)


def plain_losses(folder: Path, text: str, values: dict[int, float]) -> list[float]:
    """Losses of a text's letters, in rows of 31 after BOS, by transformers alone; `values`: what latents are set to."""
    model = GPTNeoXForCausalLM.from_pretrained(folder / "model")
    sae = make_letters_sae(folder / "model")
    found = []
    for start in range(0, len(text), 31):
        ids = torch.tensor([[256, *text[start : start + 31].encode()]])
        with torch.no_grad():
            stream = model.gpt_neox.embed_in(ids)  # blocks add nothing
            codes = sae.encode(stream[0])
            for i, value in values.items():
                for t in range(1, ids.shape[1]):
                    if codes[t, i] > 0:
                        stream[0, t] += (value - codes[t, i]) * sae.W_dec[i]
            logits = model.get_output_embeddings()(model.gpt_neox.final_layer_norm(stream))
        each = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        found += each[1:].tolist()  # what follows BOS does not count
    return found


def test_losses_are_those_of_a_plain_forward(found: dict[str, Any], letters_folder: Path) -> None:
    for name in ("forget", "retain"):
        half = [file.read_text() for file in corpus_order(letters_folder / name)][1::2]
        clean = [loss for text in half for loss in plain_losses(letters_folder, text, {})]
        clamped = [loss for text in half for loss in plain_losses(letters_folder, text, {Q: -25.0})]
        assert found["metrics"][f"tokens_{name}"] == len(clean)
        assert found["metrics"][f"documents_{name}"] == 6
        assert found["metrics"][f"nll_{name}"] == pytest.approx(sum(clean) / len(clean), rel=1e-5)
        row = setting(found, n=1, unit="absolute")
        rise = (sum(clamped) - sum(clean)) / len(clean)
        assert row[f"delta_{name}"] == pytest.approx(rise, rel=1e-5, abs=1e-9)
        assert row[f"relative_{name}"] == pytest.approx(sum(clamped) / sum(clean) - 1, rel=1e-5, abs=1e-9)


def corpus_order(folder: Path) -> list[Path]:
    """The folder's files in the order in which the corpus gives them."""
    from common.corpus import CorpusOptions, LocalCorpus

    return LocalCorpus(CorpusOptions(name=str(folder)), folder)._files()


def test_same_command_reads_what_is_kept(
    letters_run: Path, letters_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    real = nll.clamped_losses
    monkeypatch.setattr(nll, "clamped_losses", lambda *args: runs.append(1) or real(*args))
    stop = Stop()

    def stop_at_seventh(patient: losses.Patient) -> None:
        if len(runs) == 7:
            stop.signal_name = "SIGTERM"

    check = losses.Patient.batches
    monkeypatch.setattr(losses.Patient, "batches", lambda self, *args: (stop_at_seventh(self), check(self, *args))[1])
    with pytest.raises(Interrupted, match="Run the same command again"):
        unlearn_runs([letters_run], config(letters_folder), stop)
    assert len((letters_run / "letters" / "eval" / "unlearn.jsonl").read_text().splitlines()) == 1 + 6
    assert not (letters_run / "letters" / "eval" / "unlearn.json").exists()
    monkeypatch.undo()
    again: list[int] = []
    monkeypatch.setattr(nll, "clamped_losses", lambda *args: again.append(1) or real(*args))
    resumed = unlearn(letters_run, letters_folder)
    assert len(again) == 2 * 12 - 6  # six clamps of the chosen and six controls, on two texts
    (letters_run / "letters" / "eval" / "unlearn.jsonl").unlink()
    assert unlearn(letters_run, letters_folder) == resumed
    assert read_json(letters_run / "letters" / "eval" / "unlearn.json") == resumed


def test_threshold_that_leaves_no_latent_gives_no_score(letters_run: Path, letters_folder: Path) -> None:
    found = unlearn(letters_run, letters_folder, threshold=("0",))
    assert all(row["n_used"] == 0 and row["delta_forget"] == 0 for row in found["settings"])
    assert found["latents"] == []
    for name in ("score", "score_low", "area", "score_random", "best", "delta_forget"):
        assert found["metrics"][name] is None
        assert "no latent fires on the forget text" in found["reasons"][name]
    assert found["metrics"]["nll_forget"] > 0
    assert found["reasons"]["nll_also_retain"] == "no --also-retain was given"


def test_texts_that_are_to_be_forgotten_are_left_out_of_the_rest(letters_run: Path, letters_folder: Path) -> None:
    both = letters_folder / "both"
    if not both.exists():
        both.mkdir()
        for name in ("forget", "retain"):
            for file in (letters_folder / name).iterdir():
                (both / f"{name}-{file.name}").write_text(file.read_text())
    found = unlearn(letters_run, letters_folder, retain=str(both))
    assert found["metrics"]["documents_retain"] == 6
    assert setting(found, n=5, unit="absolute")["delta_retain"] == 0


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ({"forget": None}, ConfigError, r"--forget is needed \(or --data"),
        ({"retain": None}, ConfigError, "--retain is needed"),
        ({"forget": "/nowhere/at/all.txt"}, ConfigError, "--forget /nowhere/at/all.txt: no such file or folder"),
        ({"also_retain": "nowhere.jsonl"}, ConfigError, "--also-retain nowhere.jsonl: no such file or folder"),
    ],
)
def test_text_that_cannot_be_had_is_named_by_its_flag(
    texts: dict[str, Any], error: type[Exception], message: str, letters_run: Path, letters_folder: Path
) -> None:
    with pytest.raises(error, match=message):
        unlearn(letters_run, letters_folder, **texts)


def test_no_latent_beside_the_chosen_is_no_control() -> None:
    settings = [
        nll.Setting(0.01, 1, "absolute", 25.0, nll.Clamp(latents, (25.0,) * len(latents)), kind)
        for latents, kind in (((3,), "chosen"), ((), "random"))
    ]
    losses = {name: torch.tensor([[1.0, rise, 1.0]] * 2).double() for name, rise in (("forget", 2.0), ("retain", 1.0))}
    found = nll.assemble(settings, losses, {"forget": 10, "retain": 10})
    assert found.metrics["score"] == 1
    for name in ("score_random", "area_random"):
        assert found.metrics[name] is None
        assert found.reasons[name] == "no other latent than the chosen ones fires on these texts"


def test_text_of_one_document_is_too_little(letters_run: Path, letters_folder: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text("qvw" * 50)
    with pytest.raises(DataError, match=r"--forget .*one.txt: 1 documents with text .*; two are needed"):
        unlearn(letters_run, letters_folder, forget=str(one))


def test_model_that_is_gone_is_one_error(letters_run: Path, letters_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--model /nowhere: no such folder"):
        unlearn(letters_run, letters_folder, model="/nowhere")


def test_another_model_is_refused(letters_run: Path, letters_folder: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="other weights"):
        unlearn(letters_run, letters_folder, model=str(tiny_model))


def test_letters_are_where_the_tests_say() -> None:
    assert (LETTERS[Q], LETTERS[A], LETTERS[X]) == ("q", "a", "x")
