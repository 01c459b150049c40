"""Change a module right after it has been imported, in any process that starts with a ``sitecustomize`` of ours."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``change(module)`` once ``name`` has been imported; append it to the front of ``sys.meta_path``."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self.name, self.change = name, change

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, with a loader that goes on to `change`."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self.change(module)

        loader.exec_module = exec_module
        return spec


def after_import(name: str, change: Callable[[Any], None]) -> None:
    """Have ``change(module)`` called once ``name`` is imported in this process."""
    sys.meta_path.insert(0, AfterImport(name, change))
