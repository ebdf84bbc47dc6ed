"""The page of runs: what it says, that nothing in it can break out, and that missing and damaged files are borne."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from common.errors import ConfigError, StoreError
from common.files import read_json, write_file, write_json
from tests.train.report.made import CORE, evaluation, made_learner, made_run
from tests.warm import ROOT
from train.cli import cli
from train.report.figures import FIGURES, Drawn, study_of
from train.report.figures.study import Study
from train.report.gather import Reader, read_evaluations, read_runs
from train.report.page import make_page, write_page
from train.report.palette import HUES, NEUTRAL
from train.report.sections import alarms_of, flat, shown, suite_table

EVIL = "</script><script>alert(1)</script><!--"


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take seconds, and are tested on their own: pictures of four bytes, and one that cannot be drawn."""

    def make_figure(name: str, study: Study) -> Drawn:
        if name == "faithfulness":
            raise StoreError(f"{study.records[0].name}: odd")
        return Drawn(b"\x89PNG", "", 3)

    monkeypatch.setattr("train.report.page.make_figure", make_figure)


def test_a_report_needs_no_torch() -> None:
    code = "import granary, sys, train.report.figures, train.report.page; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


def test_figures_are_in_the_page_or_why_not(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", made_learner("a"))
    text = make_page([run])
    assert text.count('src="data:image/png;base64,iVBORw=="') == len(FIGURES) - 1
    assert "training curves" in words_of(text)
    assert "No figure faithfulness: a: odd" in words_of(text)
    (run / "data.json").write_text("{}")
    assert "No figures: " in words_of(make_page([run]))


def test_a_learner_is_drawn_as_its_group_is_in_the_figures(tmp_path: Path) -> None:
    names = ["gated", "topk-k4-seed0", "topk-k4-seed1", "topk-k8-seed0"]
    options = [{"d_sae": 32, "k": int(name[6]) if "-" in name else 4} for name in names]
    learners = [
        made_learner(name, name.split("-")[0], options=one, seed=int(name[-1]) if "-" in name else 0)
        for name, one in zip(names, options, strict=True)
    ]
    run = made_run(tmp_path / "r", *learners, made_learner("alpha", "tree"))
    (run / "alpha" / "config.json").unlink()  # not copied, so that no figure has it
    study = study_of([run])
    data = {one["label"]: (one["colour"], one["dash"]) for one in data_of(make_page([run]), 'id="learners-data"')}
    assert data["gated"] == (HUES[0], "solid")
    assert data["topk-k4-seed0"] == data["topk-k4-seed1"] == (study.colours["topk-k4"], study.styles["topk-k4"].dash)
    assert data["topk-k8-seed0"][0] == study.colours["topk-k8"] != study.colours["topk-k4"]
    assert data["alpha"] == (NEUTRAL, "solid")
    (run / "data.json").write_text("{}")  # no figures
    lost = {one["label"]: one["colour"] for one in data_of(make_page([run]), 'id="learners-data"')}
    assert (lost["alpha"], lost["gated"]) == HUES[:2]


def made_latent(index: int, **more: Any) -> dict[str, Any]:
    context = {"document": 3, "activation": 2.5, "peak": 1, "tokens": ["a", " b", "\n"], "values": [0, 2.5, 0.5]}
    return {
        "index": index, "group": None, "density": 0.25, "mean": 1.5, "max": 2.5,
        "histogram": {"edges": [0.5, 1.0, 2.5], "counts": [3, 4]}, "neighbours": [[index + 1, 0.5]],
        "promoted": [[" x", 0.5]], "suppressed": [["y", -0.5]], "contexts": [context], **more,
    }  # fmt: skip


def made_latents(*latents: dict[str, Any], **more: Any) -> dict[str, Any]:
    return evaluation({"tokens": 100, "alive": len(latents)}, latents=list(latents)) | more


def data_of(text: str, opening: str) -> Any:
    """The JSON in the script that begins so."""
    found = re.search(rf'<script type="application/json" {opening}[^>]*>(.*?)</script>', text, re.S)
    assert found, opening
    return json.loads(found[1])


def words_of(text: str) -> str:
    """What a person reads: the page without its scripts, its style and its tags."""
    bare = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", bare)).split())


def test_page_says_how_every_learner_ended(tmp_path: Path) -> None:
    diverged = made_learner("wild", "standard", state="diverged", reason="loss not finite by step 4", ev=None)
    made_run(tmp_path / "r", made_learner("topk", "topk"), diverged, state="finished")
    result = read_json(tmp_path / "r" / "topk" / "result.json")
    write_json(tmp_path / "r" / "topk" / "result.json", result | {"alarms": {"dead": "step 76: 23% are dead"}})
    said = words_of(make_page([tmp_path / "r"]))
    assert "wild diverged loss not finite by step 4" in said
    assert "topk finished step 76: 23% are dead 40 0.25 0.8 4.25 0 2 s" in said
    assert "store cache/made.zarr" in said
    assert "training tokens 10,240" in said
    assert "runs/wild" not in said


def test_page_has_every_suite_and_the_reasons_of_what_is_null(tmp_path: Path) -> None:
    core = evaluation({"l0": 4.5, "ce_loss_score": None, "by_level": {"low": 0.5}}, intervals={"l0": [4.25, 4.75]})
    evals = {"core": core, "heldout": evaluation({"l0": 5.5}), "core-50000": evaluation({"l0": 6.5}), "other": {"a": 1}}
    made_run(tmp_path / "r", made_learner("a", evals=evals), made_learner("b", evals={"core": evaluation({"l0": 7.5})}))
    text = make_page([tmp_path / "r"])
    said = words_of(text)
    assert re.findall(r"Suite (\S+)", said) == ["heldout", "core", "core-50000"]
    assert "l0 4.5 4.25 to 4.75 7.5" in said
    assert "by_ level.low 0.5 – 2" in said
    assert "ce_ loss_ score – 1 – 2" in said
    assert "made so this file does not have it" in said  # the two notes
    assert "mean number of latents that are not 0" in said  # the definition
    assert 'title="made so">–<sup>1</sup>' in text


def test_many_learners_are_rows_and_few_are_columns(tmp_path: Path) -> None:
    made_run(tmp_path / "r", *(made_learner(f"l{n}", evals={"core": CORE}) for n in range(8)))
    runs, _ = read_runs([tmp_path / "r"])
    assert not suite_table("core", runs[0].learners, {}).upright
    assert suite_table("core", runs[0].learners[:3], {}).upright
    assert "l7 0.95 0.2 0.9 3 3.5 8 4.5" in words_of(make_page([tmp_path / "r"]))


def test_kinds_are_compared_at_equal_l0_and_who_is_left_out_is_said(tmp_path: Path) -> None:
    lost = made_learner("lost", state="failed", reason="out of memory", ev=None)
    made_run(tmp_path / "r", made_learner("batchtopk"), made_learner("topk", "topk", ev=0.7), lost)
    said = words_of(make_page([tmp_path / "r"]))
    assert "differences from batchtopk" in said
    assert "topk 4 4.25 1 0.7000 -0.1000 –" in said
    assert "left out: failed: out of memory" in said


def test_learners_that_miss_the_l0_are_told_though_one_row_is_left(tmp_path: Path) -> None:
    far = made_learner("topk", "topk", options={"d_sae": 32, "k": 30})
    made_run(tmp_path / "r", made_learner("batchtopk"), far)
    said = words_of(make_page([tmp_path / "r"]))
    assert "topk: left out at L0 30: seed 0 (measured L0 4.25 to 4.25)" in said
    assert "Equal L0" in said


def test_without_the_baseline_the_first_kind_is_one(tmp_path: Path) -> None:
    made_run(tmp_path / "r", made_learner("topk", "topk"), made_learner("gated", "gated", ev=0.9))
    assert "differences from gated" in words_of(make_page([tmp_path / "r"]))


def test_latents_are_packed_without_a_loss(tmp_path: Path) -> None:
    found = made_latents(made_latent(4, group="mid"), made_latent(7, promoted=None, suppressed=None))
    found["reasons"] = {"promoted": "no model", "text": "no tokenizer", "alive": "x"}
    made_run(tmp_path / "r", made_learner("a", evals={"latents": found}), made_learner("b"))
    data = data_of(make_page([tmp_path / "r"]), 'class="latents-data" data-learner="a"')
    assert data["texts"] == ["a", " b", "\n"]
    assert data["latents"][0] == [
        4, "mid", 0.25, 1.5, 2.5, [0.5, 2.5, [3, 4]], [[5, 0.5]], [[" x", 0.5]], [["y", -0.5]],
        [["3", 2.5, 1, [0, 1, 2], [1, 2.5, 2, 0.5]]],
    ]  # fmt: skip
    assert data["latents"][1][7:9] == [None, None]
    assert data["reasons"] == {"promoted": "no model", "text": "no tokenizer"}


def test_curves_keep_every_logged_figure_and_their_last_line(tmp_path: Path) -> None:
    made_run(tmp_path / "r", made_learner("a", extra={"omega": None, "note": "text"}))
    lines = [json.dumps({"step": n + 1, "loss": n / 3}) + "\n" for n in range(1000)]
    write_file(tmp_path / "r" / "a" / "metrics.jsonl", "".join(lines).encode() + b'{"step": 1001, "lo')
    (one,) = data_of(make_page([tmp_path / "r"]), 'id="learners-data"')
    assert (one["label"], one["ended"], set(one["curves"])) == ("a", False, {"step", "loss"})
    assert len(one["curves"]["step"]) == 334
    assert one["curves"]["step"][-2:] == [997, 1000]
    assert one["curves"]["loss"][-1] == 333.0  # 999 / 3


@pytest.mark.parametrize("part", ["token", "promoted", "group", "reason", "metric", "variant"])
def test_nothing_from_files_can_break_out_of_its_place(tmp_path: Path, part: str) -> None:
    latent = made_latent(1, group=EVIL if part == "group" else None)
    if part == "token":
        latent["contexts"][0]["tokens"][1] = EVIL
    if part == "promoted":
        latent["promoted"][0][0] = EVIL
    evals = {"latents": made_latents(latent), "core": evaluation({EVIL if part == "metric" else "l0": None})}
    if part == "reason":
        evals["core"]["reasons"] = {"l0": EVIL + '" onmouseover="alert(1)'}
    learner = made_learner(
        "a", EVIL if part == "variant" else "topk", evals=evals, reason=f"<b>{EVIL}</b>", state="failed"
    )
    made_run(tmp_path / "r", learner)
    safe = made_run(
        tmp_path / "s" / "r", made_learner("a", evals={"latents": made_latents(made_latent(1))}, state="failed")
    )
    text = make_page([tmp_path / "r"])
    assert text.count("<script") == text.count("</script") == make_page([safe]).count("<script")
    assert "<b></script" not in text
    assert "alert(1)</script>" not in text
    assert ' onmouseover="' not in text
    assert EVIL in json.dumps(data_of(text, 'class="latents-data"')) + html.unescape(text)  # it is all there, as text


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    made_run(tmp_path / "r", made_learner("a", evals={"latents": made_latents(made_latent(1))}))
    text = make_page([tmp_path / "r"])
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", text)
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert "default-src 'none'" in text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", made_learner("a", evals={"core": CORE}), made_learner("b", evals={"core": CORE}))
    (run / "a" / "result.json").write_text("{ torn")
    (run / "b" / "metrics.jsonl").write_bytes(b'\xff\xfe{"step": 1}\n')
    (run / "data.json").write_text("[1, 2]")
    (run / "run.toml").write_text("= no toml")
    (run / "b" / "eval" / "latents.json").write_text('{"metrics": {}, "latents": [{"index": "x"}]}')
    said = words_of(make_page([run]))
    for problem in (
        "a/result.json: not valid JSON", "b/metrics.jsonl: cannot be read", "data.json: an object was expected here",
        "run.toml: not valid TOML", "b/eval: its latents are not what suite latents writes",
    ):  # fmt: skip
        assert problem in said
    assert "b finished" in said
    assert "kl_ div_ score 0.95 0.95" in said  # it may break after each _


@pytest.mark.parametrize("file", ["run.toml", "data.json", "status.json", "a/config.json", "a/result.json"])
def test_a_missing_file_is_borne(tmp_path: Path, file: str) -> None:
    run = made_run(
        tmp_path / "r", made_learner("a", evals={"latents": made_latents(made_latent(1))}), made_learner("b")
    )
    (run / file).unlink()
    text = make_page([run])
    assert "Files that could not be read" not in text
    assert data_of(text, 'class="latents-data"')["latents"][0][0] == 1


@pytest.mark.parametrize(
    "value",
    [
        "[]",
        "{}",
        '{"state": 1, "learners": [], "heartbeat": "x", "step": {}}',
        '{"state": "running", "heartbeat": -1e300}',
        "null",
        "3",
    ],
)
def test_foreign_values_in_any_file_are_borne(tmp_path: Path, value: str) -> None:
    run = made_run(tmp_path / "r", made_learner("a", evals={"core": CORE, "latents": made_latents()}))
    for name in (
        "status.json",
        "data.json",
        "a/config.json",
        "a/result.json",
        "a/eval/core.json",
        "a/eval/latents.json",
    ):
        before = (run / name).read_text()
        (run / name).write_text(value)
        assert "<h2>Learners</h2>" in make_page([run]), name
        (run / name).write_text(before)


def test_a_run_that_has_only_just_begun_has_a_page(tmp_path: Path) -> None:
    made_run(tmp_path / "r", made_learner("a", state="waiting", steps=0), state="running")
    (tmp_path / "r" / "a" / "config.json").unlink()
    said = words_of(make_page([tmp_path / "r"]))
    assert "a waiting – – – – – –" in said
    assert "Nothing has been evaluated yet: train eval" in said
    assert "No latents yet: train eval" in said


def test_a_killed_run_is_told_and_its_learners_with_it(tmp_path: Path) -> None:
    made_run(tmp_path / "r", made_learner("a", state="running"), made_learner("b"), state="running")
    heartbeat = read_json(tmp_path / "r" / "status.json")["heartbeat"]
    (alive,), _ = read_runs([tmp_path / "r"], now=heartbeat + 60)
    (dead,), _ = read_runs([tmp_path / "r"], now=heartbeat + 600)
    assert [alive.state, *(one.state for one in alive.learners)] == ["running", "running", "finished"]
    assert [dead.state, *(one.state for one in dead.learners)] == ["killed", "killed", "finished"]
    assert "not heard of since" in dead.learners[0].reason


def test_learners_of_several_runs_have_their_runs_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        made_run(tmp_path / name, made_learner("a"))
    said = words_of(make_page([tmp_path / "one", tmp_path / "two"]))
    assert "one/a finished" in said
    assert "two/a finished" in said
    assert said.startswith("one, two · Granary")


def test_labels_are_unique_and_nothing_is_named_twice(tmp_path: Path) -> None:
    paths = [made_run(tmp_path / name / "demo", made_learner("a")) for name in ("one", "two")]
    runs, _ = read_runs(paths)
    assert [run.learners[0].label for run in runs] == [f"{path}/a" for path in paths]
    other = made_run(tmp_path / "three", made_learner("a"), made_learner("b"))
    runs, _ = read_runs([other / "a", other / "b"])
    assert [run.learners[0].label for run in runs] == ["a", "b"]
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([other, other / "b"])


def test_a_learner_folder_has_a_page_of_its_own(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", made_learner("a"), made_learner("b"))
    assert write_page([run / "a"]) == run / "a" / "report.html"
    text = (run / "a" / "report.html").read_text()
    assert [one["label"] for one in data_of(text, 'id="learners-data"')] == ["a"]


def test_a_run_of_several_learner_folders_is_told_once(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", made_learner("a"), made_learner("b"))
    said = words_of(make_page([run / "a", run / "b"]))
    assert said.startswith("r · Granary r Learners")
    assert said.count("store cache/made.zarr") == 1


def test_page_goes_into_the_run_or_here_or_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (made_run(tmp_path / name, made_learner("a")) for name in ("one", "two"))
    monkeypatch.chdir(tmp_path)
    assert write_page([one]) == one / "report.html"
    assert write_page([one, two]) == Path("report.html")
    assert write_page([one], tmp_path / "new" / "p.html").exists()
    with pytest.raises(ConfigError, match=r"a folder\. Name a file in it"):
        write_page([one], tmp_path)


def test_the_command_prints_the_path(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", made_learner("a"))
    ended = CliRunner().invoke(cli, ["report", str(run)])
    assert (ended.exit_code, ended.stdout) == (0, f"{run}/report.html\n")
    assert isinstance(CliRunner().invoke(cli, ["report", str(tmp_path)]).exception, StoreError)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run here"):
        make_page([tmp_path])


def test_the_whole_latents_file_goes_before_limited_ones(tmp_path: Path) -> None:
    for name, index in (("latents-100", 1), ("latents-9000", 2), ("latents-odd", 3)):
        write_json(tmp_path / f"{name}.json", made_latents(made_latent(index)))
    reader = Reader(0.0)
    assert read_evaluations(tmp_path, reader)[1]["latents"][0]["index"] == 3
    (tmp_path / "latents-odd.json").unlink()
    assert read_evaluations(tmp_path, reader)[1]["latents"][0]["index"] == 2
    assert reader.problems == []


def test_values_are_read_easily() -> None:
    assert [shown(v) for v in (1.079e25, 0.123456, 12345, None, "a", [1, 2.5], list(range(9)), True)] == [
        "1.08e+25", "0.1235", "12,345", "–", "a", "1, 2.5", "9 values", "True",
    ]  # fmt: skip
    assert flat({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": 1, "d": None}
    assert alarms_of({"alarms": {"dead": "x"}}) == alarms_of({"alarms": ["x"]}) == ["x"]
    assert alarms_of({"alarms": 3}) == alarms_of({}) == []
