"""Suite interp on a small store, with and without a judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import build
from common.errors import ConfigError, Interrupted
from common.store import Store
from tests.train.evaluate.chat import Asked, Reply, chat
from tests.train.evaluate.test_subject import subject_on
from train.config import EvalConfig
from train.evaluate import METRICS, write_evaluation
from train.evaluate.interp import CACHE, NULLS, interp, median, pause
from train.evaluate.judge import KEY_VARIABLE
from train.evaluate.proxies import PROXIES, entropy_bits, top_places
from train.evaluate.sample import read_sample
from train.evaluate.subject import Subject

KEY = "sk-very-secret-0123"


def subject(store: Store, folder: Path, groups: dict[str, slice] | None = None, **options: Any) -> Subject:
    found = replace(subject_on(store, 0.6, max_tokens=4000, **options), folder=folder)
    if groups is not None:
        found.sae.groups = lambda: groups  # type: ignore[method-assign]
    return found


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_proxies_are_medians_over_latents_and_groups(store: Store, tmp_path: Path) -> None:
    this = subject(store, tmp_path, {"low": slice(0, 8), "high": slice(8, 32)})
    found = interp(this)
    assert list(found.metrics) == list(METRICS["interp"])
    assert found.reasons == dict.fromkeys(("judged", "judge_score"), "no judge was named (--judge, --judge-model)")
    rows = {row["index"]: row for row in found.more["latents"]}
    sample = read_sample(this)
    counts = {latent: len(sample.column_of(latent)[0]) for latent in range(32)}
    assert set(rows) == {latent for latent, count in counts.items() if count >= 15}
    for latent, row in rows.items():
        places = top_places(sample, latent)
        assert row["contexts"] == len(places)
        assert row["token_entropy"] == pytest.approx(entropy_bits(sample.token[places]))
        assert row["group"] == ("low" if latent < 8 else "high")
    for name in PROXIES:
        assert found.metrics[name] == pytest.approx(np.median([row[name] for row in rows.values()]))
        low = [row[name] for row in rows.values() if row["group"] == "low"]
        assert found.more["groups"]["low"][name] == pytest.approx(np.median(low))
    assert found.metrics["contexts"] <= found.metrics["documents"]
    assert 0 < found.metrics["purity_random"] <= 1
    assert found.metrics["attribute_auc"] >= found.metrics["attribute_auc_random"] - 0.1
    assert interp(this) == found


def test_without_a_model_what_needs_only_ids_is_there(store: Store, tmp_path: Path) -> None:
    found = interp(subject(store, tmp_path, model="/nowhere/model", judge="http://127.0.0.1:1/v1", judge_model="owl"))
    for name in ("attribute_auc", "attribute_auc_random", "context_cosine", "judge_score"):
        assert found.metrics[name] is None
        assert "no such folder" in found.reasons[name]  # and nothing was asked of the judge
    assert found.metrics["purity"] > 0
    assert {name for name, value in found.metrics.items() if value is None} == set(found.reasons)


def test_an_sae_that_never_fires_has_reasons(store: Store, tmp_path: Path) -> None:
    this = subject(store, tmp_path)
    this.sae.W_enc.data.zero_()
    found = interp(this)
    wanted = {"contexts", *PROXIES, *[f"{name}_random" for name in NULLS]}
    assert wanted == {name for name, reason in found.reasons.items() if reason.startswith("no latent is active on 15")}
    assert found.metrics["latents"] == 0
    assert all(found.metrics[name] is None for name in wanted)


def test_judge_scores_latents_and_goes_on_after_a_stop(store: Store, tmp_path: Path, key: None) -> None:
    def answer(asked: Asked, _: int) -> Reply:
        return Reply("letters") if "nothing but a description" in asked.prompt else Reply("none")

    with chat(answer) as server:
        options = {"judge": server.address, "judge_model": "owl", "judge_latents": 3}
        first = interp(subject(store, tmp_path, judge_latents=2, judge=server.address, judge_model="owl"))
        assert len(server.asked) == 4
        found = interp(subject(store, tmp_path, {"low": slice(0, 8), "high": slice(8, 32)}, **options))
        assert {asked.key for asked in server.asked} == {f"Bearer {KEY}"}
        before = len(server.asked)
        assert interp(subject(store, tmp_path, {"low": slice(0, 8), "high": slice(8, 32)}, **options)) == found
        assert len(server.asked) == before  # kept
    assert first.metrics["judged"] == 2
    assert found.metrics["judged"] == 3
    scored = [row["judge"] for row in found.more["latents"] if "judge" in row]
    assert found.metrics["judge_score"] == pytest.approx(np.mean([judged["score"] for judged in scored]))
    assert {judged["explanation"] for judged in scored} == {"letters"}
    assert sum(group["judged"] or 0 for group in found.more["groups"].values()) == 3
    low, high = found.more["intervals"]["judge_score"]
    assert low <= found.metrics["judge_score"] <= high
    assert found.more["judge"] == {"address": server.address, "model": "owl"}
    write_evaluation(tmp_path, "interp", found)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert tmp_path / "eval" / CACHE in files
    assert not any(KEY in file.read_text() for file in files)


def test_unreadable_answers_are_a_problem_and_no_score(store: Store, tmp_path: Path, key: None) -> None:
    with chat(lambda *_: Reply("hard to say")) as server:
        found = interp(subject(store, tmp_path, judge=server.address, judge_model="owl", judge_latents=1))
    assert (found.metrics["judged"], found.metrics["judge_score"]) == (0, None)
    assert found.reasons == {"judge_score": "the judge gave no answer that can be read"}
    (row,) = [row for row in found.more["latents"] if "judge" in row]
    assert "named no passages" in row["judge"]["problem"]


def test_judge_and_its_model_go_together() -> None:
    for options in ({"judge": "http://127.0.0.1/v1"}, {"judge_model": "owl"}):
        with pytest.raises(ConfigError, match="--judge and --judge-model go together"):
            build(EvalConfig, options, "train eval")


def test_waiting_for_a_judge_ends_when_asked_to_stop(store: Store, tmp_path: Path) -> None:
    this = subject(store, tmp_path)
    pause(this, 0.01)
    this.stop.signal_name = "SIGTERM"
    with pytest.raises(Interrupted):
        pause(this, 1000)


def test_median_is_of_those_that_there_are() -> None:
    assert median([1.0, None, 4.0, 2.0]) == 2.0
    assert median([None]) is None


def test_latents_with_too_few_passages_are_not_asked_about(store: Store, tmp_path: Path, key: None) -> None:
    this = subject(store, tmp_path, judge="http://127.0.0.1:1/v1", judge_model="owl")
    this = replace(this, config=this.config.model_copy(update={"max_tokens": 200}))
    found = interp(this)  # nobody is at that address: asking would fail
    assert found.metrics["latents"] > 0
    assert found.reasons["judge_score"] == "no latent has enough passages that do not overlap"
    assert found.metrics["judged"] is None
