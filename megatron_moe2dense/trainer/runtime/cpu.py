"""Megatron-Core without CUDA: every `megatron.*` module sees a proxy of `torch` whose CUDA parts mean the CPU.

The real torch module stays as it is (wrapping its factories globally breaks `torch.device("meta")` contexts). Tensor
methods cannot be scoped by module; the four that Megatron needs are patched and only act for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_moe2dense.trainer import without_triton

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "linspace", "as_tensor", "eye")
_FACTORIES += ("randperm", "empty_like", "zeros_like", "ones_like", "full_like")


class _Proxy(types.ModuleType):
    """A module's contents with some names replaced; anything added later is found through the original."""

    def __init__(self, target: types.ModuleType, replaced: dict[str, Any]):
        super().__init__(target.__name__)
        self.__dict__.update(target.__dict__)
        self.__dict__["_target"] = target
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


class _Stream:
    """Stands for a CUDA stream or event: on the CPU everything happens in order."""

    def __init__(self, *_args: Any, **_options: Any):
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: Any) -> float:
        return 0.0

    def _nothing(self, *_args: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_error: Any) -> None:
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _names_cuda(device: Any) -> bool:
    return device.type == "cuda" if isinstance(device, torch.device) else isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def build(*args: Any, **options: Any) -> Any:
        if _names_cuda(options.get("device")):
            options["device"] = _CPU
        options.pop("pin_memory", None)
        return factory(*args, **options)

    return build


def _nothing(*_args: Any, **_options: Any) -> None:
    return None


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **options: Any):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **options)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _proxy_of_torch() -> _Proxy:
    nvtx = _Proxy(torch.cuda.nvtx, {"range_push": _nothing, "range_pop": _nothing, "range": lambda *_a, **_k: contextlib.nullcontext()})
    cuda = _Proxy(
        torch.cuda,
        {
            "current_device": lambda: _CPU,
            "synchronize": _nothing,
            "Stream": _Stream,
            "Event": _Stream,
            "current_stream": lambda *_a: _Stream(),
            "default_stream": lambda *_a: _Stream(),
            "set_stream": _nothing,
            "stream": lambda *_a: contextlib.nullcontext(),
            "nvtx": nvtx,
            "get_rng_state": lambda *_a: torch.get_rng_state(),
            "set_rng_state": lambda state, *_a: torch.set_rng_state(state),
            "manual_seed": _seed,
        },
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _Proxy(torch, {**factories, "cuda": cuda, "autocast": _Autocast})


class _Finder(importlib.abc.MetaPathFinder):
    """Hands the proxy to every megatron module right after it has run."""

    def __init__(self, proxy: _Proxy):
        self._proxy = proxy

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron."):
            return None
        return without_triton.spec_of(fullname, path, target, after=lambda module: _give(module, self._proxy))


def _give(module: types.ModuleType, proxy: _Proxy) -> None:
    if module.__name__ == "megatron.core.jit":  # torch.compile: on a CPU it wants a C++ compiler and Python's headers, for small functions
        module.disable_jit_fuser()  # type: ignore[attr-defined]
    if getattr(module, "torch", None) is torch:
        module.torch = proxy  # type: ignore[attr-defined]


def _patch_tensor_methods() -> None:
    plain_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        # Megatron's optimizers compare the string 'torch.cuda.FloatTensor'.
        result = plain_type(self, *args, **options)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not options and asked_by.startswith("megatron.") and ".cuda." not in result:
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *_a, **_k: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_a, **_k: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]


def install() -> None:
    """Install the proxy in all megatron modules, loaded or to come. A second call, or a machine with CUDA, changes nothing."""
    if torch.cuda.is_available() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    proxy = _proxy_of_torch()
    sys.meta_path.insert(0, _Finder(proxy))
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron."):
            _give(module, proxy)
    _patch_tensor_methods()
