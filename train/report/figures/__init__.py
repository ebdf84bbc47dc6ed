"""`train plot`: figures of runs. `FIGURES` is the only list of them.

runs.py (result files) -> study.py (groups, colours) -> one function for each figure -> sheet.py (PNG, CSV)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, GranaryError, StoreError, nearest
from common.files import write_file
from train.folders import ODD
from train.report.figures.analysis import training_analysis
from train.report.figures.ends import final_loss_comparison, run_comparison, training_steps_comparison
from train.report.figures.fronts import l0_fronts, temporal_consistency
from train.report.figures.latents import faithfulness, latent_density, unlearning_pareto
from train.report.figures.metrics import final_metrics, model_preservation, reconstruction_metrics, sparsity_metrics
from train.report.figures.sheet import Sheet
from train.report.figures.study import Study, make_study
from train.report.figures.training import training_curves, training_metrics
from train.report.runs import read_records

FIGURES: dict[str, Callable[[Study], Sheet]] = {
    "training_curves": training_curves,
    "training_steps_comparison": training_steps_comparison,
    "final_loss_comparison": final_loss_comparison,
    "reconstruction_metrics": reconstruction_metrics,
    "sparsity_metrics": sparsity_metrics,
    "model_preservation": model_preservation,
    "training_metrics": training_metrics,
    "final_metrics": final_metrics,
    "training_analysis": training_analysis,
    "run_comparison": run_comparison,
    "l0_fronts": l0_fronts,
    "temporal_consistency": temporal_consistency,
    "unlearning_pareto": unlearning_pareto,
    "latent_density": latent_density,
    "faithfulness": faithfulness,
}


@dataclass(frozen=True)
class Drawn:
    """A figure as its files are to hold it: the picture, and the numbers behind it."""

    png: bytes
    csv: str
    numbers: int


@dataclass(frozen=True)
class Written:
    """A figure on disk: the picture, the numbers behind it, and how many of these there are."""

    figure: str
    png: Path
    csv: Path
    numbers: int


def plot(paths: Sequence[Path], out: Path | None = None, names: Sequence[str] = ()) -> list[Written]:
    """Figures of these runs, all or those of `names`, as `<name>.png` and `<name>.csv`.

    They go to `out`, or to `plots` inside of a single run.

    Raises:
        StoreError: no run there, no learner yet, or files that are damaged; nothing is written then.
        ConfigError: several runs and no `out`, a learner named twice, or no such figure.
    """
    if out is None and len(paths) > 1:
        raise ConfigError("several runs: say with --out which folder their figures go to.")
    folder = out if out is not None else paths[0] / "plots"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: a file, not a folder. Choose another --out.")
    unknown = next((name for name in names if name not in FIGURES), None)
    if unknown is not None:
        raise ConfigError(f"--figure {unknown}: no such figure.{nearest(unknown, FIGURES)}")
    study = study_of(paths)
    figures = {name: make_figure(name, study) for name in names or FIGURES}  # all before the first is written
    return [write(folder, name, figure) for name, figure in figures.items()]


def study_of(paths: Sequence[Path]) -> Study:
    """What the figures of these runs are drawn of.

    Raises:
        StoreError: no run there, no learner yet, or files that are damaged.
        ConfigError: a learner named twice.
    """
    records = read_records(paths)
    if not records:
        raise StoreError(f"{', '.join(map(str, paths))}: no learner has begun. If the run was stopped: train resume")
    return make_study(records)


def make_figure(name: str, study: Study) -> Drawn:
    """One figure.

    Raises:
        StoreError: result files hold something that it cannot be drawn of; names the learner.
    """
    try:
        sheet = FIGURES[name](study)
        return Drawn(sheet.png(), sheet.csv(), sum(row.value is not None for row in sheet.rows))
    except ODD as error:
        if isinstance(error, GranaryError):
            raise
        if len(study.records) > 1:  # draw each alone, to find whose file it is
            for record in study.records:
                make_figure(name, make_study([record]))
        folders = ", ".join(str(record.run / record.name) for record in study.records)
        raise StoreError(
            f"{folders}: a result file holds what {name} cannot be drawn of ({type(error).__name__}: {error}). "
            "Evaluate it anew."
        ) from error


def write(folder: Path, name: str, figure: Drawn) -> Written:
    """Both files of a figure."""
    png, table = folder / f"{name}.png", folder / f"{name}.csv"
    write_file(png, figure.png)
    write_file(table, figure.csv.encode())
    return Written(name, png, table, figure.numbers)
