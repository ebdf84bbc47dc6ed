"""Command-line options made from a configuration's fields, so that the two cannot drift apart."""

from __future__ import annotations

import shlex
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from pydantic.fields import FieldInfo

from common.config import Settings, check_flag
from common.errors import ConfigError
from common.places import refuse_empty


class PathType(click.Path):
    """A path on the command line, of a file or folder that need not be there.

    Args:
        read: what makes a path of the text.
    """

    def __init__(self, read: Callable[[str], Path] = Path) -> None:
        super().__init__(path_type=Path)
        self.read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """
        Raises:
            ConfigError: an empty text, or one that `read` refuses.
        """
        try:
            return self.read(refuse_empty(value))
        except ValueError as error:
            raise ConfigError(f"{param.opts[0] if param else 'path'} {shlex.quote(str(value))}: {error}.") from None


def options_from(cls: type[Settings], leave_out: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: one option per field; only flags that were given reach the command, as keyword arguments."""

    def decorate(command: Callable[..., Any]) -> Any:
        for name, field in reversed(cls.model_fields.items()):
            if name not in leave_out:
                command = option_for(name, field)(command)
        return command

    return decorate


def option_for(name: str, field: FieldInfo) -> Callable[[Callable[..., Any]], Any]:
    """The click option of one field: choices for a Literal, a switch for a bool, text for the rest."""
    flag = "--" + name.replace("_", "-")
    help_text = field.description or ""
    default = None if field.is_required() else field.get_default()
    if field.is_required():
        help_text += "  [required]"
    elif default not in (None, (), False) and not isinstance(default, bool):
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        help_text += f"  [default: {shown}]"
    kind = plain_type(field.annotation)
    if kind is bool:
        names = f"{flag}/--no-{name.replace('_', '-')}" if default is not False else flag
        return click.option(
            names, name, default=None, is_flag=True, help=help_text, expose_value=False, callback=keep_given(field)
        )
    if typing.get_origin(kind) is typing.Literal:
        choices = click.Choice([str(choice) for choice in typing.get_args(kind)])
        return click.option(flag, name, type=choices, help=help_text, expose_value=False, callback=keep_given(field))
    multiple = typing.get_origin(kind) is tuple
    metavar = "N" if kind is int or typing.get_args(kind)[:1] == (int,) else "TEXT"
    return click.option(
        flag, name, multiple=multiple, metavar=metavar, help=help_text, expose_value=False, callback=keep_given(field)
    )


def plain_type(annotation: Any) -> Any:
    """The type without Optional and Annotated."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def keep_given(field: FieldInfo) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A callback that hands a value to the command only if the user gave it: the configuration owns the defaults.

    It raises ConfigError, with the flag's name, when the value does not fit the field.
    """

    def keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None and value != ():
            check_flag(parameter.opts[0], field, value)
            context.params[str(parameter.name)] = value

    return keep
