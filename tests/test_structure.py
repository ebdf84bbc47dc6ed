"""Who may import whom: `harvest → common ← train`, and one owner for each foreign library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.warm import ROOT

PACKAGES = ("common", "harvest", "train")
OWNERS = {
    "click": {
        "common/console.py",
        "common/options.py",
        "harvest/cli.py",
        "train/cli.py",
        "train/commands/bench.py",
        "train/commands/evaluate.py",
        "train/commands/exchange.py",
        "train/commands/fit.py",
        "train/commands/rate.py",
        "train/commands/report.py",
        "train/commands/unlearn.py",
        "common/demo/train_demo.py",
    },
    "transformer_lens": {"common/models.py"},
    "transformers": {"common/models.py", "common/tokenizers.py", "common/demo/train_demo.py"},
    "tokenizers": {"common/demo/train_demo.py"},
    "datasets": {"common/corpus.py"},
    "pyarrow": {"common/corpus.py", "train/evaluate/unlearn/questions.py"},
    "huggingface_hub": {"common/corpus.py", "common/sources.py"},
    "zarr": {"common/store.py", "granary_zarr.py"},
    "numcodecs": {"common/arrays.py"},
    "fsspec": {"common/places.py"},
    "dask": {"common/moments.py", "harvest/check.py", "harvest/cluster.py"},
    "distributed": {"harvest/cluster.py"},
    "google_crc32c": {"common/files.py"},
    "rich": {"common/console.py"},
    "sklearn": {"train/evaluate/probes.py", "train/evaluate/topics.py", "train/saes/spectral.py"},
    "httpx": {"train/evaluate/judge.py"},
    "matplotlib": {"train/report/figures/sheet.py"},
    "PIL": {"train/report/figures/sheet.py"},
    "jinja2": {"train/report/page.py"},
    "triton": {"train/kernels.py", "train/row_adam.py"},
}


def sources() -> list[Path]:
    """Every Python file of the distribution, by its path from the root."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [file.relative_to(ROOT) for file in [*files, ROOT / "granary.py", ROOT / "granary_zarr.py"]]


def imported(file: Path) -> Iterator[str]:
    """The dotted names a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            yield node.module


IMPORTS = {file.as_posix(): {name.split(".")[0] for name in imported(file)} for file in sources()}


def test_structure_sees_the_imports() -> None:
    assert len(IMPORTS) > 30
    assert {"common", "harvest", "numpy", "torch"} <= IMPORTS["harvest/plan.py"]
    assert "harvest" in IMPORTS["granary.py"]  # inside a function


@pytest.mark.parametrize(
    ("package", "never"), [("harvest", {"train"}), ("train", {"harvest"}), ("common", {"train", "harvest"})]
)
def test_packages_import_in_one_direction(package: str, never: set[str]) -> None:
    wrong = {file: names & never for file, names in IMPORTS.items() if file.startswith(f"{package}/") and names & never}
    assert wrong == {}


@pytest.mark.parametrize("library", OWNERS)
def test_foreign_libraries_have_one_owner(library: str) -> None:
    users = {file for file, names in IMPORTS.items() if library in names}
    assert users <= OWNERS[library]
    assert users, f"nothing imports {library}: take it off the list"


def test_no_source_imports_the_tests() -> None:
    assert [file for file, names in IMPORTS.items() if "tests" in names or "pytest" in names] == []


def test_everything_in_common_is_used_by_both_tools_or_by_common() -> None:
    modules = {file.removesuffix(".py").replace("/", ".") for file in IMPORTS if file.count("/") == 1}
    uses: dict[str, set[str]] = {}
    for file in sources():
        for name in imported(file):
            uses.setdefault(name, set()).add(file.parts[0])
    orphans = {name for name in modules if name.startswith("common.") and not name.endswith("__init__")} - set(uses)
    assert orphans == set()
