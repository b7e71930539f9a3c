"""Imports torchvision without torch's compiler, which would take 160 MB of a process that never compiles anything."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


class _Later(ModuleType):
    """Stands for a module of the compiler while torchvision is imported; whatever is asked of it but one name imports the real one."""

    def __getattr__(self, name: str) -> Any:
        if name == "is_compile_supported" and self.__name__ == "torch._dynamo.utils":
            return lambda device: self._real().is_compile_supported(device)
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> Any:
        for name in _COMPILER:
            if isinstance(sys.modules.get(name), _Later):
                del sys.modules[name]
        return importlib.import_module(self.__name__)


def import_torchvision() -> None:
    """Imports torchvision's operators, unless they or the compiler are there already.

    torchvision's RoIAlign asks the compiler, as soon as it is imported, for a function that it only calls where its own operators are
    missing or have to be deterministic on a GPU.
    """
    if "torchvision" in sys.modules or "torch._dynamo" in sys.modules:
        return
    for name in _COMPILER:
        sys.modules[name] = _Later(name)
    try:
        importlib.import_module("torchvision.ops")
    finally:
        for name in _COMPILER:
            if isinstance(sys.modules.get(name), _Later):
                del sys.modules[name]
