"""Figures: every one is there for every sort of run, and its rows are the numbers of the files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.image import imread

from tests.train.report.made import CORE, EVALS, evaluation, line_of, made_learner, made_run
from train.cli import cli
from train.report.figures import FIGURES, make_study, sheet
from train.report.figures.scales import number, shortened
from train.report.figures.shapes import Row
from train.report.figures.sheet import Sheet
from train.report.palette import HUES
from train.report.runs import read_records

pytestmark = pytest.mark.usefixtures("small_pictures")


def sheets_of(*paths: Path) -> dict[str, Sheet]:
    """Every figure, drawn and not written: what takes time is the writing."""
    study = make_study(read_records(paths))
    return {name: draw(study) for name, draw in FIGURES.items()}


def sheet_of(name: str, run: Path) -> Sheet:
    """One of them."""
    return FIGURES[name](make_study(read_records([run])))


def rows_of(figure: Sheet, panel: str, series: str = "", learner: str | None = None) -> list[Row]:
    return [
        row
        for row in figure.rows
        if row.panel == panel and row.series == series and (learner is None or row.learner == learner)
    ]


def texts(figure: Sheet) -> str:
    """Everything written in the panels and the key."""
    words = [text.get_text() for axes in figure.figure.axes for text in [*axes.texts, *axes.get_yticklabels()]]
    words += [text.get_text() for legend in figure.figure.legends for text in legend.get_texts()]
    return " ".join(word.replace("\n", " ") for word in words)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: a flat variant at two L0 and two seeds, a levelled one with all evaluations."""
    flat = [
        made_learner(
            f"topk-k{k}-seed{seed}", "topk", options={"d_sae": 32, "k": k}, seed=seed, ev=0.5 + k / 100 + seed / 10,
            loss=0.25 * (1 + seed),
        )
        for k in (4, 8) for seed in (0, 1)
    ]  # fmt: skip
    options = {"d_sae": 32, "k": 4, "level_weights": [0.5, 1, 2]}
    extra = {"loss_sparsity": 0.07, "sparsity_leaf": 0.01, "sparsity_mid": 0.02, "sparsity_top": 0.04, "l0_top": 1.5}
    extra |= {"loss_contrastive": 0.5, "omega_mean_2": 0.125, "omega_std_2": 0.25, "omega_distance_2": 0.375}
    tree = made_learner("tree", "tree", options=options, extra=extra | {"gate": 0.75}, evals=EVALS)
    return made_run(tmp_path_factory.mktemp("plots") / "study", *flat, tree)


@pytest.fixture(scope="module")
def drawn(run: Path) -> Iterator[dict[str, Sheet]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheet, "DPI", 20)
        yield sheets_of(run)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_plot_writes_a_picture_and_its_numbers_for_every_figure(run: Path, drawn: dict[str, Sheet]) -> None:
    ended = CliRunner().invoke(cli, ["plot", str(run)], terminal_width=200)
    assert ended.exit_code == 0, ended.output
    assert all(name in ended.stdout for name in FIGURES)
    assert {file.name for file in (run / "plots").iterdir()} == {
        f"{name}.{ending}" for name in FIGURES for ending in ("png", "csv")
    }
    for name in FIGURES:
        assert imread(run / "plots" / f"{name}.png").std() > 0.01, f"{name} is blank"
        with (run / "plots" / f"{name}.csv").open() as file:
            table = list(csv.DictReader(file))
        assert [row["value"] for row in table] == ["" if r.value is None else str(r.value) for r in drawn[name].rows]
        assert list(table[0]) == ["panel", "series", "learner", "x", "value", "low", "high", "n", "note"]


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_bars_are_means_over_seeds_beside_each_seed(drawn: dict[str, Sheet]) -> None:
    panel = "Explained variance"
    mean, one, other = rows_of(drawn["reconstruction_metrics"], panel, "topk-k4")
    assert (one.learner, one.value, other.value) == ("topk-k4-seed0", 0.54, 0.64)
    assert (mean.learner, mean.n) == ("", 2)
    assert mean.value == pytest.approx(0.59)
    assert mean.low is not None
    assert rows_of(drawn["reconstruction_metrics"], "Mean squared error", "tree")[0].value == 3.5
    l0 = rows_of(drawn["sparsity_metrics"], "L0", "topk-k8")[0]
    assert (l0.value, l0.note) == (4.25, "aimed at 8")


def test_curves_are_the_lines_of_the_files(drawn: dict[str, Sheet]) -> None:
    lines = [line_of(made_learner("x", loss=loss), 20) for loss in (0.25, 0.5)]
    row = next(row for row in rows_of(drawn["training_curves"], "Total loss", "topk-k4") if row.x == 20)
    assert row.value == pytest.approx(np.mean([line["loss"] for line in lines]))
    assert (row.low, row.high, row.n) == (lines[0]["loss"], lines[1]["loss"], 2)
    part = rows_of(drawn["training_analysis"], "Parts of the loss in the last tenth", "tree")
    assert {str(row.x): row.value for row in part}["sparsity"] == 0.07


def test_levels_of_a_penalty_have_lines_with_their_price(drawn: dict[str, Sheet]) -> None:
    levels = {row.series: row.value for row in drawn["training_curves"].rows if row.panel == "Sparsity loss"}
    assert levels == {"tree": 0.07, "tree leaf (0.5×)": 0.01, "tree mid (1×)": 0.02, "tree top (2×)": 0.04}


def test_what_variants_log_of_themselves_has_panels(drawn: dict[str, Sheet]) -> None:
    panels = {row.panel: row for row in drawn["training_analysis"].rows if row.series.startswith("tree")}
    assert panels["Convolution ω by dilation: distance from identity"].value == 0.375
    assert panels["Convolution ω by dilation: standard deviation"].series == "tree 2"
    assert panels["gate"].value == 0.75
    assert panels["Dead latents, dense ones (dotted)"].value == 0.125


def test_model_figures_come_from_suite_core(drawn: dict[str, Sheet]) -> None:
    entropies = rows_of(drawn["model_preservation"], "Cross-entropy loss", "tree")
    assert {row.x: row.value for row in entropies} == {"clean": 3.0, "spliced": 3.5, "ablated": 8.0}
    assert rows_of(drawn["final_metrics"], "KL divergence, clean to spliced", "tree")[0].value == 0.2
    missing = rows_of(drawn["model_preservation"], "KL divergence score", "topk-k4")[0]
    assert missing.value is None
    assert "no eval/core.json: train eval" in missing.note


def test_fronts_are_places_of_l0_and_value(drawn: dict[str, Sheet]) -> None:
    (front,) = rows_of(drawn["l0_fronts"], "Explained variance, held-out documents", "topk-k8")
    assert (front.x, front.value) == (4.25, pytest.approx(0.63))
    (score,) = rows_of(drawn["l0_fronts"], "Cross-entropy loss score, SAE in the model", "tree")
    assert (score.x, score.value) == (4.5, 0.9)
    (rho,) = rows_of(drawn["temporal_consistency"], "Temporal consistency ρ(8) against L0", "tree")
    assert (rho.value, rho.low, rho.high) == (0.3, 0.25, 0.375)
    lags = rows_of(drawn["temporal_consistency"], "Correlation by lag (dotted: null)", "tree")
    assert [(row.x, row.value) for row in lags] == [(1, 0.5), (2, 0.25), (64, 0.125)]
    (level,) = rows_of(drawn["temporal_consistency"], "ρ(8) by level, density-matched", "tree")
    assert (level.x, level.value) == ("slow", 0.5)


def test_unlearning_rows_are_settings_controls_and_front(drawn: dict[str, Sheet]) -> None:
    rows = rows_of(drawn["unlearning_pareto"], "Rise of the loss, forget against retain", "tree")
    assert [(row.note, row.x, row.value) for row in rows[-3:]] == [
        ("controls", 0.25, 0.25), ("pareto", 0.004, 0.125), ("pareto", 0.5, 0.75)
    ]  # fmt: skip
    assert "--data FOLDER" in texts(drawn["unlearning_pareto"])
    top = drawn["unlearning_pareto"].figure.axes[0].get_ylim()[1]
    assert top > 1.4 * max(row.value for row in rows)  # the outermost marks are whole


def test_densities_are_shares_of_all_latents(drawn: dict[str, Sheet]) -> None:
    dead, *bins = rows_of(drawn["latent_density"], "Latents by density", "tree")
    assert (dead.value, dead.note) == (0.25, "never active")
    found = {round(float(np.log10(float(row.x or 0))), 3): row.value for row in bins if row.value}
    assert found == {-3.0: 0.25, -2.0: 0.25, -0.75: 0.25}


def test_faithfulness_is_above_the_models_own_cross_entropy(drawn: dict[str, Sheet]) -> None:
    panel = "Cross-entropy above the model's own"
    assert [(row.x, row.value) for row in rows_of(drawn["faithfulness"], panel, "tree")] == [(0, 5), (1, 2), (2, 1)]
    assert [row.value for row in rows_of(drawn["faithfulness"], panel, "tree random")] == [6, 3, 2]


def test_a_learner_has_its_colour_in_every_figure(drawn: dict[str, Sheet]) -> None:
    bar = drawn["reconstruction_metrics"].figure.axes[0].patches[-1]
    curve = drawn["training_curves"].figure.axes[2].lines[-1]
    assert curve.get_color() == HUES[1]  # tree; topk has shades of the first
    assert np.allclose(bar.get_facecolor()[:3], [int(HUES[1][i : i + 2], 16) / 255 for i in (1, 3, 5)])


# ---- runs that went otherwise ---------------------------------------------------------------------------------------


def test_an_unfinished_run_shows_what_there_is(tmp_path: Path) -> None:
    begun = made_learner("begun", "topk", state="running", steps=20)
    waiting = made_learner("waiting", state="waiting", steps=0)
    found = sheets_of(made_run(tmp_path, begun, waiting, state="running"))
    steps = found["training_steps_comparison"].rows
    assert {row.learner: (row.value, row.note) for row in steps} == {
        "begun": (20, "of 40; running"), "waiting": (0, "of 40; waiting")
    }  # fmt: skip
    assert len(rows_of(found["training_curves"], "Total loss", "topk")) == 0  # its kind is named after the learner
    assert [row.x for row in rows_of(found["training_curves"], "Total loss", "begun")] == [10, 20]
    assert "not finished yet" in texts(found["reconstruction_metrics"])


def test_a_learner_that_diverged_at_step_0_shows_its_reason(tmp_path: Path) -> None:
    wild = made_learner("wild", state="diverged", reason="loss not finite in the rehearsal", steps=0)
    found = sheets_of(made_run(tmp_path, wild, state="diverged"))
    assert "diverged: loss not finite in the rehearsal" in texts(found["final_loss_comparison"])
    assert "0 diverged: loss not finite" in texts(found["training_steps_comparison"])
    for name in FIGURES.keys() - {"training_steps_comparison", "run_comparison", "training_analysis"}:
        assert all(row.value is None for row in found[name].rows), name
        assert any(row.note for row in found[name].rows), name
    assert "nothing was logged" in texts(found["training_analysis"])


def test_panels_without_data_say_what_makes_it(tmp_path: Path) -> None:
    found = sheets_of(made_run(tmp_path / "bare", made_learner("a")))
    command = f"train eval {tmp_path / 'bare'} --suite"
    for name, words in {
        "model_preservation": f"no eval/core.json: {command} core",
        "temporal_consistency": f"no eval/temporal.json: {command} temporal",
        "latent_density": f"{command} core",
        "faithfulness": f"{command} hierarchy",
        "unlearning_pareto": "--forget TEXT --retain TEXT",
        "training_curves": "variants that keep k latents do not pay",
        "training_metrics": "variant contrastive does",
        "training_analysis": "variant multiscale does",
    }.items():
        assert "".join(words.split()) in "".join(texts(found[name]).split()), name


def test_reasons_of_an_evaluation_stand_in_the_panel(tmp_path: Path) -> None:
    core = evaluation({"kl_div_score": None, "ce_loss_score": None})
    core["reasons"] = dict.fromkeys(core["reasons"], "model not at hand: gone")
    found = sheets_of(made_run(tmp_path, made_learner("a", evals={"core": core})))
    assert "model not at hand: gone" in texts(found["model_preservation"])


def test_two_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    runs = [
        made_run(tmp_path / name, made_learner("topk", "topk"), batch_size=size) for name, size in (("a", 1), ("b", 2))
    ]
    found = sheets_of(*runs)
    assert {row.series for row in found["training_curves"].rows if row.panel == "Total loss"} == {"a/topk", "b/topk"}
    assert "a/topk" in texts(found["training_curves"])
    assert {row.learner for row in found["training_steps_comparison"].rows} == {"topk"}


def test_many_learners_fit(tmp_path: Path) -> None:
    names = [f"variant{chr(97 + number)}" for number in range(16)]
    found = sheets_of(made_run(tmp_path, *(made_learner(name, name) for name in names)))
    for name in ("training_curves", "reconstruction_metrics", "training_analysis", "l0_fronts"):
        assert all(label in texts(found[name]) for label in names), name
    assert found["reconstruction_metrics"].figure.get_size_inches()[1] > 4


def test_a_loss_that_blew_up_does_not_hide_the_others(tmp_path: Path) -> None:
    wild = made_learner("wild", "standard", loss=1e24, state="diverged", reason="too wild", steps=20)
    found = sheets_of(made_run(tmp_path, wild, *(made_learner(name, name) for name in ("topk", "tree"))))
    total = found["training_curves"].figure.axes[2]
    assert total.get_ylim()[1] < 1e4
    assert "cut off" in total.get_ylabel()
    bars = found["final_loss_comparison"].figure.axes[0]
    assert bars.get_xlim()[1] < 1
    assert "1,000,000,000,000,000,000,000,000 diverged" not in texts(found["final_loss_comparison"])
    assert "1e+24 diverged at step 20 (cut off)" in texts(found["final_loss_comparison"])
    assert max(row.value or 0 for row in found["final_loss_comparison"].rows) == 1e24


def test_what_is_next_to_nothing_does_not_stretch_an_axis(tmp_path: Path) -> None:
    names = {"identity": 1e-16, "topk": 0.25, "tree": 1.0}
    run = made_run(tmp_path, *(made_learner(name, name, loss=loss) for name, loss in names.items()))
    bars = sheet_of("final_loss_comparison", run).figure.axes[0]
    assert (bars.get_xscale(), bars.get_xlim()[0]) == ("linear", 0)
    loss = sheet_of("training_curves", run).figure.axes[0]
    assert loss.get_yscale() == "log"
    assert loss.get_ylim()[0] > 0.1
    assert "cut off" in loss.get_ylabel()


def test_an_axis_of_bars_ends_where_they_do(drawn: dict[str, Sheet]) -> None:
    for axes in drawn["reconstruction_metrics"].figure.axes:
        most = max(patch.get_width() for patch in axes.patches)
        assert most <= axes.spines["bottom"].get_bounds()[1] < axes.get_xlim()[1]
        assert max(axes.get_xticks()) <= axes.spines["bottom"].get_bounds()[1]


def test_keys_have_those_that_are_drawn(drawn: dict[str, Sheet]) -> None:
    for name, labels in {
        "faithfulness": ["tree"],
        "unlearning_pareto": ["tree"],
        "temporal_consistency": ["tree"],
        "training_metrics": ["topk-k4", "topk-k8", "tree"],
        "l0_fronts": ["topk", "tree"],
    }.items():
        (key,) = drawn[name].figure.legends
        assert [text.get_text() for text in key.get_texts()] == labels, name


def test_one_evaluated_seed_of_several_has_the_interval_of_its_documents(tmp_path: Path) -> None:
    evals = {"temporal": EVALS["temporal"]}
    seeds = [made_learner(f"topk-seed{n}", "topk", seed=n, evals=evals if n == 1 else {}) for n in (0, 1)]
    found = sheet_of("temporal_consistency", made_run(tmp_path, *seeds))
    (row,) = rows_of(found, "Temporal consistency ρ(8) against L0", "topk")
    assert (row.value, row.low, row.high, row.n) == (0.3, 0.25, 0.375, 1)


def test_many_learners_without_figures_leave_room_for_those_with(tmp_path: Path) -> None:
    bare = [made_learner(f"v{chr(97 + number)}", "topk", options={"d_sae": number + 1}) for number in range(9)]
    run = made_run(tmp_path, *bare, made_learner("whole", "tree", evals={"core": CORE}))
    found = sheet_of("model_preservation", run)
    assert [text.get_text() for text in found.figure.axes[0].get_yticklabels()] == ["whole"]
    assert any("9 more have none" in text.get_text() for text in found.figure.texts)
    assert rows_of(found, "KL divergence score", "va")[0].note.startswith("no eval/core.json")


def test_questions_are_no_losses(tmp_path: Path) -> None:
    settings = [{"accuracy_retain": 0.9, "accuracy_forget": 0.5}]
    found = evaluation({}, settings=settings, controls=[], pareto=settings)
    run = made_run(tmp_path, made_learner("a", evals={"unlearn-saebench": found}))
    drawn = sheet_of("unlearning_pareto", run)
    losses, questions = drawn.figure.axes
    assert not losses.lines
    assert questions.get_xlabel() == "retain: share no longer right, symmetric log"
    assert [(row.x, row.value) for row in drawn.rows if row.note == "pareto"] == [(pytest.approx(0.1), 0.5)]


# ---- words ---------------------------------------------------------------------------------------------------------


def test_numbers_and_names_are_short() -> None:
    assert number(0.83591, 0.0031) == "0.8359 ± 0.0031"
    assert number(198.9479, 1e-6) == "198.9"
    assert number(10019.4, 1800.0) == "10,019 ± 1,800"
    assert number(500.0) == "500"
    assert number(8.125e23) == "8.12e+23"
    assert shortened("contrastive-k16-seed2", 12) == "contrast…ed2"
    assert shortened("short", 12) == "short"
