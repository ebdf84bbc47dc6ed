"""The public face, on machines where users have a `common` and a `train` of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import granary
from tests.warm import ROOT


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A user's folder with modules of our packages' names, each of which fails when imported."""
    for package in ("common", "harvest"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('the user\\'s own')\n")
    (tmp_path / "train.py").write_text("raise RuntimeError('the user\\'s own')\n")
    return tmp_path


def run_python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `program` in `folder`, with that folder first on the import path and ours after it."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


def test_granary_reaches_its_own_packages_past_the_users(crowded: Path) -> None:
    program = (
        "import granary, sys; path = list(sys.path)\n"
        "import common.store, harvest.config, train.config\n"
        "print(common.__file__, harvest.__file__, train.__file__, granary.open_store.__module__)\n"
        "assert sys.path == path"
    )
    done = run_python(program, crowded)
    assert done.returncode == 0, done.stderr
    files = [str(ROOT / package / "__init__.py") for package in ("common", "harvest", "train")]
    assert done.stdout.split() == [*files, "common.store"]


@pytest.mark.parametrize("name", ["harvest", "train"])
def test_console_scripts_reach_their_own_packages_past_the_users(crowded: Path, name: str) -> None:
    script = next(iter(entry_points(group="console_scripts", name=name)))
    assert script.value == f"granary:{name}_main"
    # what the installed script does, with the user's folder first on the path
    program = f"import sys; from granary import {name}_main; sys.argv = ['{name}', '--help']; {name}_main()"
    done = run_python(program, crowded)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def test_granary_says_when_another_common_was_there_first(crowded: Path) -> None:
    (crowded / "common" / "__init__.py").write_text("MINE = True\n")
    done = run_python("import common; assert common.MINE; import granary", crowded)
    assert done.returncode == 1
    message = "ImportError: granary: another package 'common' was already imported, from"
    assert f"{message} {crowded / 'common' / '__init__.py'}. Import granary before it." in done.stderr


@pytest.mark.parametrize("name", granary.__all__)
def test_granary_public_names_resolve(name: str) -> None:
    assert callable(getattr(granary, name))


def test_folder_called_granary_is_not_taken_for_the_module(tmp_path: Path) -> None:
    (tmp_path / "granary").mkdir()
    done = run_python("import granary; print(granary.__file__)", tmp_path)
    assert done.stdout.strip() == str(ROOT / "granary.py")
    # so it is where ROOT is on the path; without this an editable install has an import hook, which is asked too late
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}


def test_granary_imports_nothing_slow_by_itself() -> None:
    program = "import granary, sys; print(*({'torch', 'transformers', 'zarr'} & set(sys.modules)))"
    assert run_python(program, ROOT).stdout.strip() == ""


def test_granary_has_no_other_name() -> None:
    with pytest.raises(AttributeError, match="module 'granary' has no attribute 'open_stor'"):
        _ = granary.open_stor
