"""The docs against the code: nothing undocumented, no default that is not so, every example runs."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import pytest

import harvest.cli
import train.cli
from common.config import Settings, build, read_toml
from common.errors import GranaryError
from common.files import read_json
from common.stopping import Stop
from common.store import Store
from harvest.config import HarvestConfig, ToyConfig
from harvest.run import Outcome as HarvestOutcome
from harvest.verify import Report
from tests.conftest import HOOK
from train.config import DataConfig, FitConfig, LearnerConfig
from train.data.plan import DataPlan
from train.evaluate import METRICS, SUITES
from train.record import Status, read_lines
from train.report.tables import Row
from train.saes import REGISTRY
from train.settings import fit_config
from train.trainer import Outcome as FitOutcome
from train.trainer import fit

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# pages that describe a tool's commands
FILES = {"harvest": ("harvest",), "train": ("train", "evaluate", "report", "exchange")}
PAGES = {tool: "\n".join((DOCS / f"{name}.md").read_text() for name in names) for tool, names in FILES.items()}
GROUPS: dict[str, click.Group] = {"harvest": harvest.cli.cli, "train": train.cli.cli}
COMMANDS = [(tool, name) for tool, group in GROUPS.items() for name in group.commands]
TOML_TEXTS = re.findall(r"```toml\n(.*?)```", PAGES["train"], re.S)  # docs/examples: tests/test_examples.py
PYTHON = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.S)


# ---- reading a page --------------------------------------------------------------------------------------------


def section(page: str, heading: str) -> str:
    """The text under `## heading`, subsections included."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert found, f"no section '## {heading}'"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row; a `|` inside a cell is written `\\|`."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def named(text: str) -> dict[str, list[str]]:
    """Table rows by each name in backquotes in their first cell."""
    return {name: row for row in rows(text) for name in re.findall(r"`([^`]+)`", row[0])}


def quoted(text: str) -> set[str]:
    """Everything in backquotes, code blocks left out."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)))


def shown(default: Any) -> str:
    """A default as the tables spell it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "–" if default in (None, (), {}) else str(default)


def shell_lines() -> Iterable[str]:
    """Every command line in a ```sh block of the docs and the README."""
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(harvest|train) ", line):
                    yield line


# ---- commands and options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tool", "name"), COMMANDS)
def test_command_options_are_those_of_its_table(tool: str, name: str) -> None:
    listed = {flag for flag in named(section(PAGES[tool], f"{tool} {name}")) if flag.startswith("--")}
    real = {
        flag
        for parameter in GROUPS[tool].commands[name].params
        if isinstance(parameter, click.Option)
        for flag in [*parameter.opts, *parameter.secondary_opts]
    }
    assert listed == real


@pytest.mark.parametrize(("tool", "name"), COMMANDS)
def test_command_arguments_are_in_its_table(tool: str, name: str) -> None:
    listed = {word for word in named(section(PAGES[tool], f"{tool} {name}")) if word.isupper()}
    real = {p.name.upper() for p in GROUPS[tool].commands[name].params if isinstance(p, click.Argument) and p.name}
    assert listed == real


@pytest.mark.parametrize("tool", sorted(PAGES))
def test_page_describes_no_command_that_is_not(tool: str) -> None:
    described = set(re.findall(rf"^## {tool} (\S+)$", PAGES[tool], re.M))
    assert described == set(GROUPS[tool].commands)


@pytest.mark.parametrize(
    ("cls", "tool", "command"),
    [
        (HarvestConfig, "harvest", "harvest run"),
        (ToyConfig, "harvest", "harvest toy"),
        (FitConfig, "train", "train fit"),
    ],
)
def test_option_defaults_are_those_of_the_configuration(cls: type[Settings], tool: str, command: str) -> None:
    table = named(section(PAGES[tool], command))
    for name, field in cls.model_fields.items():
        if name in ("learner", "name"):
            continue
        expected = "required" if field.is_required() else shown(field.get_default())
        assert table[f"--{name.replace('_', '-')}"][1].replace(",", "") == expected, name


@pytest.mark.parametrize(("tool", "name"), COMMANDS)
def test_command_has_a_help_text(tool: str, name: str) -> None:
    command = GROUPS[tool].commands[name]
    assert command.help
    assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_shell_examples_parse_and_make_a_configuration() -> None:
    lines = list(shell_lines())
    assert len(lines) > 15
    for line in lines:
        tool, name, *arguments = shlex.split(line, comments=True)
        command = GROUPS[tool].commands[name]
        values = dict(command.make_context(name, arguments).params)  # raises on an unknown option or a wrong choice
        if command is GROUPS["harvest"].commands["run"]:
            build(HarvestConfig, {k: v for k, v in values.items() if k in HarvestConfig.model_fields}, line)
        if command is GROUPS["train"].commands["fit"]:
            flags = {k: v for k, v in values.items() if k in FitConfig.model_fields}
            shared = {k: values[k] for k in ("d_sae", "k", "lr") if values[k] is not None}
            file = ROOT / values["file"] if values["file"] else None
            if file is None or file.exists():
                fit_config(file, flags, values["variants"], shared, values["settings"])


@pytest.mark.parametrize("tool", sorted(PAGES))
def test_exit_codes_of_every_error_are_listed(tool: str) -> None:
    listed = {row[0] for row in rows(section(PAGES[tool], "Exit codes"))[1:]}
    other: dict[str, set[str]] = {"train": set(), "harvest": {"5"}}  # 5: every learner diverged
    errors: list[type[GranaryError]] = [GranaryError, *GranaryError.__subclasses__()]
    assert listed == {"0", *(str(error.exit_code) for error in errors)} - other[tool]


# ---- variants and metrics ----------------------------------------------------------------------------------------


def test_variant_sections_are_those_of_the_registry() -> None:
    assert set(re.findall(r"^## (\S+)$", (DOCS / "variants.md").read_text(), re.M)) == set(REGISTRY)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_variant_settings_are_listed_with_their_defaults(name: str) -> None:
    page = (DOCS / "variants.md").read_text()
    own = named(section(page, name).split("\n### ")[0])
    shared = named(page.split("Settings that several variants share:")[1].split("\n## ")[0])
    fields = REGISTRY[name].Config.model_fields
    assert set(own) <= set(fields) <= set(own) | set(shared)
    for key, field in fields.items():
        listed = (own.get(key) or shared[key])[1]
        assert listed == ("8 × d_model" if key == "d_sae" else shown(field.get_default())), key
    assert "Source:" in section(page, name)
    assert "We differ:" in section(page, name)


def test_learner_settings_are_listed_with_their_defaults() -> None:
    text = section(PAGES["train"], "train fit").split("Settings of a learner")[1].split("\n### ")[0]
    table = named(text)
    assert set(table) == set(LearnerConfig.model_fields)
    for key, field in LearnerConfig.model_fields.items():
        default = "–" if key in ("name", "options") else shown(field.get_default())
        assert table[key][1] == ("required" if key == "variant" else default), key


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_suite_metrics_are_those_of_its_table(suite: str) -> None:
    text = PAGES["train"].split(f"### Suite {suite}\n")[1].split("\n## ")[0].split("\n### ")[0]
    assert set(named(text)) == set(METRICS[suite])


# ---- what lies on disk -------------------------------------------------------------------------------------------


def test_store_page_lists_every_header_key(store: Store) -> None:
    text = section((DOCS / "store.md").read_text(), "Attributes")
    header, identity = (set(named(part)) for part in text.split("`identity`:"))
    assert header == set(store.header)
    assert {key for info in store.hooks.values() for key in info} <= quoted(text)
    assert identity - {"{name, revision}", "{weights}"} == set(store.identity)


def test_store_settings_are_options_of_harvest_run(store: Store) -> None:
    assert set(store.header["settings"]) <= set(HarvestConfig.model_fields)


def test_store_page_lists_every_journal_field(shared_store: Path) -> None:
    lines = read_lines(shared_store / "journal.jsonl")
    assert set(named(section((DOCS / "store.md").read_text(), "Journal"))) == {key for line in lines for key in line}


def test_store_page_layout_names_every_array(store: Store) -> None:
    layout = (DOCS / "store.md").read_text().split("```")[1]
    for array in store.array_names():
        kind, _, rest = array.partition("/")
        assert kind in layout
        for word in rest.removeprefix(HOOK).split("/"):
            assert word in layout, array


@pytest.mark.parametrize(
    ("cls", "tool", "heading"),
    [
        (HarvestOutcome, "harvest", "harvest run"),
        (Report, "harvest", "harvest verify"),
        (FitOutcome, "train", "train fit"),
        (DataPlan, "train", "train fit"),
        (Row, "train", "train compare"),
    ],
)
def test_json_record_fields_are_named(cls: type, tool: str, heading: str) -> None:
    text = section(PAGES[tool], heading)
    assert {field.name for field in dataclasses.fields(cls)} <= quoted(text)


@pytest.fixture(scope="module")
def run_folder(shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run with a learner of every variant."""
    out = tmp_path_factory.mktemp("docs") / "demo"
    flags = {"cache": shared_store, "steps": "6", "batch_size": "256", "log_every": "2", "out": out, "device": "cpu"}
    fit(fit_config(None, flags, tuple(REGISTRY), {"d_sae": "32", "k": "4"}, ()), Stop())
    return out


def table_after(text: str, opening: str) -> set[str]:
    """Names in the table that follows a line."""
    return set(named(text.split(opening)[1].split("\n\n")[1]))


def test_status_keys_are_those_of_their_table(run_folder: Path, tmp_path: Path) -> None:
    keys = table_after(PAGES["train"], "`status.json`, there")
    assert (
        keys == set(read_json(run_folder / "status.json")) == {*Status(tmp_path / "status.json", 1).values, "heartbeat"}
    )


def test_result_keys_are_those_of_their_table(run_folder: Path) -> None:
    keys = table_after(PAGES["train"], "`result.json`, when")
    for name in REGISTRY:
        assert set(read_json(run_folder / name / "result.json")) == keys


def test_metrics_keys_are_those_of_their_table_and_of_the_variant(run_folder: Path) -> None:
    common = table_after(PAGES["train"], "`metrics.jsonl`, one")
    page = (DOCS / "variants.md").read_text()
    seen = set()
    for name in REGISTRY:
        written = {key for line in read_lines(run_folder / name / "metrics.jsonl") for key in line}
        kinds = {re.sub(r"_\d+$", "_<n>", key) for key in written if not key.startswith("loss_")}
        assert kinds - common <= quoted(section(page, name)), name
        seen |= kinds | {"loss_<part>"}
    assert common <= seen


def test_data_and_sae_keys_are_named(run_folder: Path) -> None:
    named_here = quoted(section(PAGES["train"], "train fit"))
    data = read_json(run_folder / "data.json")
    assert {*data, *data["identity"], *data["plan"]} <= named_here
    assert set(read_json(run_folder / next(iter(REGISTRY)) / "sae" / "config.json")) <= named_here


def test_data_options_are_those_of_data_config() -> None:
    assert set(DataConfig.model_fields) <= {flag[2:].replace("-", "_") for flag in named(PAGES["train"])}


# ---- examples that run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TOML_TEXTS, ids=range(len(TOML_TEXTS)))
def test_toml_example_trains_to_its_end(text: str, shared_store: Path, tmp_path: Path) -> None:
    file = tmp_path / "example.toml"
    file.write_text(text)
    flags = {"cache": shared_store, "out": tmp_path / "run", "steps": "3", "batch_size": "256", "device": "cpu"}
    outcome = fit(fit_config(file, flags, (), {"d_sae": "64"}, ()), Stop())
    assert outcome.state == "finished"
    listed = read_toml(file)
    combinations = (math.prod(len(v) for v in grid.values() if isinstance(v, list)) for grid in listed.get("grid", []))
    assert len(outcome.learners) == len(listed.get("learner", [])) + sum(combinations)


def test_python_examples_run_in_order(
    shared_store: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "cache" / "demo.zarr").symlink_to(shared_store)
    (tmp_path / "runs" / "demo").symlink_to(run_folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    assert len(PYTHON) > 5
    for number, block in enumerate(PYTHON):
        exec(compile(block, f"docs/python.md example {number + 1}", "exec"), names)


def test_python_page_names_everything_public() -> None:
    import granary

    public = set(granary.__all__) - {"harvest_main", "train_main"}
    opening = (DOCS / "python.md").read_text().split("\n## ")[0]
    assert public <= quoted(opening)
