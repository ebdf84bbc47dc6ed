"""`train report`: runs as one page that needs nothing else, no network and no server.

gather.py (result files) -> sections.py (tables) and pack.py (what scripts draw) -> html/ (template, style, scripts)
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from common.errors import ConfigError, GranaryError
from common.files import write_file
from train.folders import ODD
from train.report.figures import FIGURES, make_figure, study_of
from train.report.figures.study import Study
from train.report.gather import LearnerView, read_runs
from train.report.kinds import stem_of
from train.report.pack import for_script, pack_curves, pack_latents
from train.report.palette import NEUTRAL, colours, styles
from train.report.sections import comparison, learner_row, run_facts, suite_tables

HTML = Path(__file__).parent / "html"
SCRIPTS = ("elements.js", "tables.js", "curves.js", "latents.js")
NAME = "report.html"


@dataclass(frozen=True)
class Picture:
    """A figure of `train plot`: its name, and the PNG as an address that holds it, or why there is none."""

    name: str
    address: str
    problem: str = ""


@dataclass(frozen=True)
class Look:
    """A learner's colour and line style, those of its group in the figures."""

    colour: str
    dash: str


def write_page(paths: Sequence[Path], out: Path | None = None) -> Path:
    """The page of these runs (run or learner folders), in `out`, or `report.html` in the one folder or here; its path.

    Raises:
        StoreError: nothing of a run there. Files that are damaged are named on the page.
        ConfigError: `out` is a folder.
    """
    target = out or (paths[0] / NAME if len(paths) == 1 else Path(NAME))
    if target.is_dir():
        raise ConfigError(f"--out {target}: a folder. Name a file in it, such as {target / NAME}.")
    write_file(target, make_page(paths).encode(errors="replace"))
    return target


def make_page(paths: Sequence[Path], now: float | None = None) -> str:
    """The page's text; `now` is the Unix time that heartbeats are held against."""
    runs, problems = read_runs(paths, now)
    learners = [learner for run in runs for learner in run.learners]
    blocks = [latents_block(learner, problems) for learner in learners]
    study, no_figures = study_or_why_not(paths)
    looks = looks_of(learners, study)
    scripts = [Markup((HTML / name).read_text()) for name in SCRIPTS]
    named = {run.path.resolve(): run for run in runs}  # of several learner folders, each run once
    return template().render(
        title=", ".join(path.name for path in named),
        runs=[(run, run_facts(run)) for run in named.values()],
        problems=problems,
        rows=[learner_row(learner) for learner in learners],
        colours={label: look.colour for label, look in looks.items()},
        comparison=comparison(paths),
        suites=suite_tables(learners, definitions()),
        pictures=draw_pictures(study) if study else [],
        no_figures=no_figures,
        curves=Markup(for_script(curves_of(learners, looks))),
        blocks=blocks,
        style=Markup((HTML / "page.css").read_text()),
        scripts=scripts,
        hashes=" ".join(f"'sha256-{sha256(script)}'" for script in scripts),
    )


@functools.cache
def template() -> jinja2.Template:
    """Everything that comes from files is escaped; a name that the template does not know is a bug."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HTML),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def definitions() -> dict[str, dict[str, str]]:
    """What each suite's metrics mean."""
    from train.evaluate import METRICS  # imports torch, which nothing else here needs

    return METRICS


def sha256(script: str) -> str:
    """As a Content-Security-Policy wants it: only our own scripts run, whatever a token's text is."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def study_or_why_not(paths: Sequence[Path]) -> tuple[Study | None, str]:
    """What figures are drawn of, or why there are none."""
    try:
        return study_of(paths), ""
    except GranaryError as error:
        return None, str(error)


def looks_of(learners: Sequence[LearnerView], study: Study | None) -> dict[str, Look]:
    """How each learner is drawn, by label: as in the figures; where there are none, by what learners are called."""
    if study is None:
        families: dict[str, list[str]] = {}
        for learner in learners:
            families.setdefault(stem_of(learner.label), []).append(learner.label)
        hues, lines = colours(families), styles(families)
        return {learner.label: Look(hues[learner.label], lines[learner.label].dash) for learner in learners}
    labels = study.labels()
    groups = {learner.label: labels.get(learner.folder.resolve()) for learner in learners}
    return {
        label: Look(study.colours[group], study.styles[group].dash) if group else Look(NEUTRAL, "solid")
        for label, group in groups.items()
    }


def curves_of(learners: Sequence[LearnerView], looks: Mapping[str, Look]) -> list[dict[str, Any]]:
    """What curves.js draws of each learner."""
    return [
        {
            "label": learner.label,
            "colour": looks[learner.label].colour,
            "dash": looks[learner.label].dash,
            "ended": learner.state in ("diverged", "failed"),
            "curves": pack_curves(learner.lines),
        }
        for learner in learners
    ]


def latents_block(learner: LearnerView, problems: list[str]) -> tuple[str, Markup] | None:
    """A learner's label and its latents as JSON; None without any. Files that do not fit are named in `problems`."""
    if not learner.latents:
        return None
    try:
        return learner.label, Markup(for_script(pack_latents(learner.latents)))
    except ODD as error:
        problems.append(f"{learner.folder / 'eval'}: its latents are not what suite latents writes ({error!r}).")
        return None


def draw_pictures(study: Study) -> list[Picture]:
    """The figures of `train plot`; one that cannot be drawn says why, and the others stand."""
    pictures = []
    for name in FIGURES:
        try:
            pictures.append(Picture(name, data_address(make_figure(name, study).png)))
        except GranaryError as error:
            pictures.append(Picture(name, "", str(error)))
    return pictures


def data_address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
