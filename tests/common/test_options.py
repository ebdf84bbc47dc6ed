"""Options made from settings."""

from __future__ import annotations

from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from common.config import Count, Settings
from common.options import options_from


class Example(Settings):
    """One field of each kind."""

    model: str = Field(description="Its name.")
    layer: tuple[int, ...] = Field((), description="Several.")
    tokens: Count = Field(10, description="How many.")
    limit: Count | None = Field(None, description="At most.")
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
