"""Fields of recipes as command-line flags, which the trainings share."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.training.outlier_exposure import PasteSettings

_ANY_NUMBER = ("steps", "paste_object_scales", "paste_known_classes")


def descriptions(recipe: type[Any]) -> dict[str, str]:
    """What the fields of a dataclass are, from the ``Args`` of its docstring, for ``help`` of argparse."""
    found: dict[str, str] = {}
    _, _, args = inspect.cleandoc(recipe.__doc__ or "").partition("Args:\n")
    name = ""
    for line in args.splitlines():
        if line and not line.startswith("    "):
            break
        if line.startswith("     "):
            found[name] += f" {line.strip()}"
        elif line.strip():
            name, _, text = line.strip().partition(": ")
            found[name] = text
    # Roles of Sphinx, as in :data:`module.NAME`.
    found = {name: re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text) for name, text in found.items()}
    # Python -OO leaves no docstrings.
    plain = {field.name: field.name.replace("_", " ") for field in fields(recipe)}
    return plain | {name: text.replace("%", "%%").replace("``", "").rstrip(".") for name, text in found.items()}


def distinct_name(folder: Path, taken: Collection[str], flag: str) -> str:
    """What a report calls a folder: its name, or its whole path where another folder has that name.

    Raises:
        InputError: The folder is named twice.
    """
    for name in (folder.resolve().name, str(folder)):
        if name not in taken:
            return name
    raise InputError(f"{flag} names '{folder}' twice")


def add_setting(parser: argparse.ArgumentParser, name: str, default: Any, text: str) -> None:
    """Adds ``--name`` with the type of ``default``; None where it is not given.

    Args:
        parser: Of the command.
        name: Of the field, with underscores.
        default: A bool, number, text or tuple of numbers.
        text: Help, with ``%s`` for the default.
    """
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text % default)
    elif isinstance(default, tuple):
        number = "*" if name in _ANY_NUMBER else 2
        kind = type(default[0]) if default else float
        parser.add_argument(flag, type=kind, nargs=number, help=text % (" ".join(map(str, default)) or "none"))
    else:
        choices = ("raw", "calibrated") if name == "input_mode" else None
        parser.add_argument(flag, type=type(default), choices=choices, help=text % default)


def add_paste_settings(parser: argparse.ArgumentParser, defaults: PasteSettings, text: str, but: Collection[str] = ()) -> None:
    """Adds ``--paste-…`` for the fields of :class:`PasteSettings`, ``but`` those that have a flag of another name.

    Args:
        parser: Of the command.
        defaults: Shown in the help.
        text: How the help shows them, with ``%s``.
        but: Fields without a flag.
    """
    known = descriptions(PasteSettings)
    for field in fields(PasteSettings):
        if field.name not in but:
            add_setting(parser, f"paste_{field.name}", getattr(defaults, field.name), f"{known[field.name]} ({text})")


def changed_paste(args: argparse.Namespace, paste: PasteSettings) -> PasteSettings:
    """The settings with what the command line changes.

    Raises:
        InputError: A value that the settings do not allow.
    """
    given = {field.name: getattr(args, f"paste_{field.name}", None) for field in fields(PasteSettings)}
    changes: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in given.items() if value is not None}
    return replace(paste, **changes)
