"""Strict settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from common.config import Count, Settings, build, parse_count, read_toml
from common.errors import ConfigError


class Example(Settings):
    """For the tests below."""

    tokens: Count = Field(10, gt=0)
    learning_rate: float = 0.1
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    model: str


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4096", 4096),
        ("64k", 64_000),
        ("64K", 64_000),
        ("2.5M", 2_500_000),
        ("1.005M", 1_005_000),
        ("1B", 10**9),
        ("1g", 10**9),
        ("0.5T", 5 * 10**11),
        ("1_000", 1000),
        ("1,000", 1000),
        (" 7 ", 7),
        ("1e3", 1000),
        (12, 12),
    ],
)
def test_parse_count_reads_suffixes(text: Any, number: int) -> None:
    assert parse_count(text) == number
    assert type(parse_count(text)) is int


@pytest.mark.parametrize("text", ["", "k", "ten", "1.5", "10q", "nan", "inf", "1e400", "9e9999999", "2e999999999"])
def test_build_refuses_a_count_that_is_no_whole_number(text: str) -> None:
    with pytest.raises(ConfigError, match=f"tokens = '{text}': a whole number is needed, such as 4096, 64k or 10M"):
        build(Example, {"model": "x", "tokens": text}, "test")


@pytest.mark.parametrize("value", [10**400, "5000000T"], ids=["number", "text"])
def test_build_refuses_a_count_that_arithmetic_cannot_take(value: Any) -> None:
    with pytest.raises(ConfigError, match="less than or equal to 1000000000000000000"):
        build(Example, {"model": "x", "tokens": value}, "test")


def test_build_names_the_nearest_setting() -> None:
    with pytest.raises(
        ConfigError, match=r"run\.toml: unknown setting 'learning-rat'\. Did you mean 'learning_rate'\?"
    ):
        build(Example, {"model": "x", "learning-rat": 1}, "run.toml")
    with pytest.raises(ConfigError, match=r"unknown setting 'zzz'\. Known: learning_rate, model, tokens, weights\."):
        build(Example, {"zzz": 1}, "test")


def test_build_says_what_is_needed_and_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="test: --model is needed"):
        build(Example, {}, "test")
    with pytest.raises(ConfigError, match="tokens = -3: Input should be greater than 0"):
        build(Example, {"model": "x", "tokens": "-3"}, "test")
    with pytest.raises(ConfigError, match=r"test: weights = \[1, 1\]: more values are needed"):
        build(Example, {"model": "x", "weights": [1, 1]}, "test")


def test_settings_are_frozen() -> None:
    config = build(Example, {"model": "x"}, "test")
    with pytest.raises(ValidationError, match="frozen"):
        config.tokens = 3  # type: ignore[misc]


def test_read_toml_reads_and_names_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "x"\n[data]\nseed = 1\n')
    assert read_toml(path) == {"model": "x", "data": {"seed": 1}}
    path.write_text("model = \n")
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML: .*line 1"):
        read_toml(path)
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        read_toml(tmp_path / "none.toml")


def test_build_refuses_true_for_a_count() -> None:
    with pytest.raises(ConfigError, match="tokens = True: a number is needed, not true or false"):
        build(Example, {"model": "x", "tokens": True}, "test")


def test_read_toml_names_a_folder_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r": cannot be read \(Is a directory\)\."):
        read_toml(tmp_path)
    (tmp_path / "run.toml").write_bytes(b'model = "caf\xe9"\n')
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML: "):
        read_toml(tmp_path / "run.toml")
