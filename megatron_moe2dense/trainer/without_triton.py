"""Importing Megatron-Core where triton is not installed (a CPU's torch comes without it).

0.18 and 0.19 import triton in the module of an option that is off here (paged stashing of a MoE's activations). A stand-in is enough
for the import; it is there for that module alone, so that nothing else believes in triton.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

# 0.18, 0.19: every other import of triton in what the trainer loads is in a `try`.
_ASK = ("megatron.core.transformer.moe.paged_stash", "megatron.core.transformer.moe.ops.paged_stash")


class _Kernel:
    """Any name of triton: a decorator leaves its function alone, a launch says what is missing."""

    def __call__(self, *args: Any, **_options: Any) -> Any:
        return args[0] if args and callable(args[0]) else self

    def __getattr__(self, name: str) -> _Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kernel()

    def __getitem__(self, _grid: Any) -> Any:
        raise RuntimeError("a kernel of Megatron-Core that needs triton was launched, and triton is not installed")


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kernel()


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _MegatronModules(importlib.abc.MetaPathFinder):
    """Finds what the path finder finds; no stand-in outlives the module that asked for it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return spec_of(fullname, path, target) if fullname.startswith("megatron.") else None


class _Triton(importlib.abc.MetaPathFinder):
    """The last to be asked, so never where triton is installed."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: types.ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "triton" or _importer() not in _ASK:
            return None
        return importlib.machinery.ModuleSpec(fullname, _Loader(), is_package=True)


def _importer() -> str:
    """Name of the module whose import statement is running."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_globals.get("__name__", "")


def spec_of(
    fullname: str,
    path: Sequence[str] | None,
    target: types.ModuleType | None,
    after: Callable[[types.ModuleType], None] | None = None,
) -> importlib.machinery.ModuleSpec | None:
    """The spec of a Megatron module as the path finder gives it; `after` gets the module when it has run."""
    spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
    if spec is None or spec.loader is None:
        return spec
    run = spec.loader.exec_module

    def exec_module(module: types.ModuleType) -> None:
        _take_away()  # the module that imports this one may have asked for triton
        try:
            run(module)
        finally:
            _take_away()
        if after is not None:
            after(module)

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def _take_away() -> None:
    for name in [name for name, other in sys.modules.items() if isinstance(other, _StandIn)]:
        del sys.modules[name]


def install() -> None:
    """Put the finders into place, once."""
    if not any(isinstance(finder, _Triton) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MegatronModules())
        sys.meta_path.append(_Triton())
