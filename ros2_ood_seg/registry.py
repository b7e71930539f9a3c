"""Names of interchangeable stages, resolved to their code only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from ros2_ood_seg.errors import InputError


class Registry:
    """Maps a name to the factory of a stage, given as ``"module:attribute"``.

    The module is imported on first use, so an optional dependency (transformers, segment-anything) costs nothing to
    those who do not use it.

    Args:
        kind: What the names stand for, for messages: ``"scorer"``.
        targets: Name to ``"package.module:attribute"``.
    """

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        self.kind = kind
        self._targets = dict(targets)

    @property
    def names(self) -> tuple[str, ...]:
        """All registered names, in order of registration."""
        return tuple(self._targets)

    def check(self, name: str) -> None:
        """Asks for a name without importing anything.

        Raises:
            InputError: The name is not registered.
        """
        if name not in self._targets:
            raise InputError(f"unknown {self.kind} '{name}': use one of {', '.join(self._targets)}")

    def get(self, name: str) -> Callable[..., Any]:
        """The factory registered as ``name``.

        Raises:
            InputError: The name is not registered, or its module needs a package that is not installed.
        """
        self.check(name)
        module_name, attribute = self._targets[name].split(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == __name__.split(".")[0]:
                raise
            raise InputError(f"{self.kind} '{name}' needs the Python package '{error.name}': install it") from error
        return cast("Callable[..., Any]", getattr(module, attribute))
