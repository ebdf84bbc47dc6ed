"""Strict settings: frozen, unknown keys refused with the nearest known name, numbers with suffixes."""

from __future__ import annotations

import shlex
import tomllib
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from common.errors import ConfigError, nearest

LARGEST = 10**18  # beyond it arithmetic with floats and tensors overflows somewhere
SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def parse_count(value: Any) -> Any:
    """A whole number from 4096, "4096", "64k", "2.5M", "1B"; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower().replace("_", "").replace(",", "")
    factor = SUFFIXES.get(text[-1:], 1)
    try:
        number = Decimal(text[:-1] if factor > 1 else text)  # exact: 1.005M is no whole float
    except InvalidOperation:
        return value
    if not (number.is_finite() and -LARGEST <= number <= LARGEST):  # 1e999999 is a number of a million digits
        return value
    number *= factor
    return int(number) if number == int(number) else value


def refuse_bool(value: Any) -> Any:
    """`value`, unless it is true or false, which the type check would take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def refuse_text(value: Any) -> Any:
    """`value`, unless it is text that `parse_count` could not read."""
    if isinstance(value, str):
        most = f" of at most {LARGEST:.0e}".replace("+", "") if value.strip().isdigit() else ""
        raise ValueError(f"a whole number{most} is needed, such as 4096, 64k or 10M")
    return value


# validators are read from right to left
Count = Annotated[
    int, BeforeValidator(refuse_text), BeforeValidator(parse_count), BeforeValidator(refuse_bool), Field(le=LARGEST)
]
Seed = Annotated[int, BeforeValidator(refuse_bool), Field(ge=-LARGEST, le=LARGEST)]
NEEDED = {
    "string_too_short": "a name is needed, not an empty one",
    "int_parsing": "a whole number is needed",
    "int_type": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_parsing": "a number is needed",
    "float_type": "a number is needed",
}


class Settings(BaseModel):
    """Base of every configuration: keyword-only, frozen, strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Settings)


def build(cls: type[S], values: dict[str, Any], where: str) -> S:
    """`cls(**values)`, with mistakes told in one line.

    Raises:
        ConfigError: an unknown key (with the nearest known one) or a value that does not fit.
    """
    known = set(cls.model_fields)
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown setting '{key}'.{nearest(key, known)}")
    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing" and len(first["loc"]) > 1:
            name = str(first["loc"][0])
            raise ConfigError(f"{where}: {name} = {values.get(name)!r}: more values are needed") from None
        if first["type"] == "missing":
            raise ConfigError(f"{where}: --{name.replace('_', '-')} is needed.") from None
        value = f"{name} = {first['input']!r}: " if name else ""
        raise ConfigError(f"{where}: {value}{reason(error)}") from None


def as_parsed(field: FieldInfo, value: Any) -> Any:
    """`value` as the field takes it, in JSON types: "2k", "2000" and 2000 are one value, and so are ".5" and 0.5.

    One that does not fit is given back as it is: it is refused where the configuration is built.
    """
    kind: Any = Annotated[field.annotation, field]
    adapter = TypeAdapter(kind)
    try:
        return adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError:
        return value


def check_flag(flag: str, field: FieldInfo, value: Any) -> None:
    """Raise unless `value`, as it came from the command line, fits the field.

    Raises:
        ConfigError: naming the flag, the value and what is needed.
    """
    kind: Any = Annotated[field.annotation, field]
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{flag} {shlex.quote(str(error.errors()[0]['input']))}: {reason(error)}.") from None


def reason(error: ValidationError) -> str:
    """Why the first value that does not fit does not, in words for people."""
    first = error.errors()[0]
    return NEEDED.get(first["type"], first["msg"].removeprefix("Value error, "))


def read_toml(path: Path) -> dict[str, Any]:
    """The parsed file.

    Raises:
        ConfigError: missing, not to be read, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:  # also of bytes that are no text, and of a number of 5,000 digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
