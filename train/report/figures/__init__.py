"""`train plot`: figures of runs. `FIGURES` is the only list of them.

runs.py (result files) -> study.py (groups, colours) -> one function for each figure -> sheet.py (PNG, CSV)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, StoreError
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
class Written:
    """A figure on disk: the picture, the numbers behind it, and how many of these there are."""

    figure: str
    png: Path
    csv: Path
    numbers: int


def plot(paths: Sequence[Path], out: Path | None = None) -> list[Written]:
    """Every figure of these runs, as `<name>.png` and `<name>.csv` in `out`, or in `plots` inside of a single run.

    Raises:
        StoreError: no run there, no learner yet, or files that are damaged.
        ConfigError: several runs and no `out`, or a learner named twice.
    """
    if out is None and len(paths) > 1:
        raise ConfigError("several runs: say with --out which folder their figures go to.")
    folder = out if out is not None else paths[0] / "plots"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: a file, not a folder. Choose another --out.")
    records = read_records(paths)
    if not records:
        raise StoreError(f"{', '.join(map(str, paths))}: no learner has begun. If the run was stopped: train resume")
    study = make_study(records)
    sheets = {name: draw(study) for name, draw in FIGURES.items()}  # all before the first is written
    written = []
    for name, sheet in sheets.items():
        png, table = sheet.save(folder, name)
        written.append(Written(name, png, table, sum(row.value is not None for row in sheet.rows)))
    return written
