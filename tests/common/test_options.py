"""Options made from settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from common.config import Count, Settings
from common.errors import ConfigError
from common.options import PathType, options_from
from common.places import local_path, mirrors


class Example(Settings):
    """One field of each kind."""

    model: str = Field(description="Its name.")
    layer: tuple[int, ...] = Field((), description="Several.")
    tokens: Count = Field(10, description="How many.")
    limit: Count | None = Field(None, gt=0, description="At most.")
    share: float = Field(0.5, description="A part.")
    kind: Literal["a", "b"] = Field("a", description="Which.")
    bos: bool = Field(True, description="On by default.")
    fewer: bool = Field(False, description="Off by default.")
    hidden: int = Field(0, description="Left out.")


def given(*arguments: str) -> dict[str, Any]:
    """What reaches the command."""
    seen: dict[str, Any] = {}

    @click.command()
    @options_from(Example, leave_out=("hidden",))
    def command(**flags: Any) -> None:
        seen.update(flags)

    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    seen["exit"], seen["output"] = result.exit_code, result.output
    return seen


def test_options_hand_over_only_what_was_given() -> None:
    assert given() == {"exit": 0, "output": ""}
    assert given("--tokens", "64k", "--layer", "1", "--layer", "2") == {
        "tokens": "64k",
        "layer": ("1", "2"),
        "exit": 0,
        "output": "",
    }


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--no-bos", {"bos": False}),
        ("--bos", {"bos": True}),
        ("--fewer", {"fewer": True}),
        ("--limit=3", {"limit": "3"}),
    ],
)
def test_options_switches_follow_the_default(flag: str, value: dict[str, Any]) -> None:
    assert given(flag) == value | {"exit": 0, "output": ""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kind", "c"), "'c' is not one of 'a', 'b'"),
        (("--no-fewer",), "No such option"),
        (("--hidden", "1"), "No such option"),
    ],
)
def test_options_refuse_what_is_not_there(arguments: tuple[str, ...], message: str) -> None:
    result = given(*arguments)
    assert result["exit"] == 2
    assert message in result["output"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "abc"), "--tokens abc: a whole number is needed, such as 4096, 64k or 10M."),
        (("--tokens", ""), "--tokens '': a whole number is needed, such as 4096, 64k or 10M."),
        (("--limit", "1.5"), "--limit 1.5: a whole number is needed, such as 4096, 64k or 10M."),
        (("--limit", "0"), "--limit 0: Input should be greater than 0."),
        (("--layer", "1", "--layer", "two"), "--layer two: a whole number is needed."),
        (("--share", "half"), "--share half: a number is needed."),
    ],
)
def test_options_name_the_flag_of_a_value_that_does_not_fit(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        given(*arguments)


def test_options_help_holds_every_sentence_and_default() -> None:
    text = " ".join(given("--help")["output"].split())
    for sentence in (
        "Its name. [required]",
        "How many. [default: 10]",
        "--kind [a|b]",
        "--bos / --no-bos",
        "--layer N",
    ):
        assert sentence in text
    assert "Left out." not in text


def paths(*arguments: str) -> list[Path]:
    """What a command with two kinds of paths is given."""
    seen: list[Path] = []

    @click.command()
    @click.argument("store", type=PathType(local_path))
    @click.option("--out", type=PathType())
    def command(store: Path, out: Path) -> None:
        seen.extend([store, out])

    result = CliRunner().invoke(command, list(arguments), catch_exceptions=True)
    if result.exception:
        raise result.exception
    return seen


def test_path_is_a_folder_or_the_mirror_of_a_url() -> None:
    assert paths("x.zarr", "--out", "a/b") == [Path("x.zarr"), Path("a/b")]
    assert paths("s3://b/x.zarr", "--out", ".") == [mirrors() / "s3" / "b" / "x.zarr", Path()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "--out", "a"), "store '': empty, where a path is needed; a dot is this folder."),
        (("x", "--out", ""), "--out '': empty, where a path is needed; a dot is this folder."),
        (("s3://", "--out", "a"), "store s3://: a URL that names no store; say which, such as s3://bucket/x.zarr."),
    ],
)
def test_path_that_a_script_left_empty_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        paths(*arguments)
