"""Methods by name: a registry maps `{method: NAME, ...}` of a YAML file to one strict config class."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from pydantic import BeforeValidator, PlainSerializer, ValidationError

from megatron_moe2dense.common.config import BlockError, Config, MethodNames
from megatron_moe2dense.common.errors import did_you_mean


class Method(Config):
    """Base of every registered method; its fields are the method's options in YAML."""

    @classmethod
    def method_name(cls) -> str:
        """The id the class was registered under."""
        return cls.__dict__["_registered_as"]


M = TypeVar("M", bound=Method)
R = TypeVar("R", bound=Method)


class Registry(Generic[M]):
    """Classes of one kind (`score`, `group`, `scale`, ...), filled by importing a module once.

    Args:
        kind: the name of the config block, used in messages.
        module: the module that registers the methods, or the package whose modules do.
    """

    def __init__(self, kind: str, module: str):
        self.kind, self._module = kind, module
        self._classes: dict[str, type[M]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[R]], type[R]]:
        """Class decorator: makes the class known under `name`."""

        def add(cls: type[R]) -> type[R]:
            assert name not in self._classes, f"{self.kind} method {name!r} is registered twice"
            self._classes[name] = cls  # type: ignore[assignment]
            cls._registered_as = name  # type: ignore[attr-defined]
            return cls

        return add

    def _load(self) -> None:
        if not self._loaded:
            found = importlib.import_module(self._module)
            for inner in pkgutil.iter_modules(getattr(found, "__path__", ())):
                importlib.import_module(f"{self._module}.{inner.name}")
            self._loaded = True

    def classes(self) -> dict[str, type[M]]:
        """All methods by name."""
        return {name: self[name] for name in self}

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._classes))

    def __getitem__(self, name: str) -> type[M]:
        """The class registered as `name`; ValueError with a suggestion when there is none."""
        self._load()
        if name not in self._classes:
            raise ValueError(f"unknown {self.kind} method {name!r}; {did_you_mean(name, self)} known: {', '.join(self)}")
        return self._classes[name]

    def build(self, block: Any) -> M:
        """`{method: NAME, option: value}` (or an instance) to an instance; ValueError where it does not fit."""
        if isinstance(block, Method):
            return block  # type: ignore[return-value]
        if not isinstance(block, dict) or not isinstance(block.get("method"), str):
            raise ValueError(f"a block like {{method: NAME}} is needed; known methods: {', '.join(self)}")
        options = {key: value for key, value in block.items() if key != "method"}
        cls = self[block["method"]]
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise BlockError(cls, error) from None

    @staticmethod
    def dump(method: M) -> dict[str, Any]:
        """The block an instance was built from, all options written out."""
        return {"method": method.method_name(), **method.model_dump(mode="json")}

    @property
    def field(self) -> tuple[BeforeValidator, PlainSerializer, MethodNames]:
        """What makes a config field take this registry's blocks: `score: Annotated[Scorer, *scorers.field]`."""
        return BeforeValidator(self.build), PlainSerializer(self.dump), MethodNames(self.classes)

    @property
    def optional_field(self) -> tuple[BeforeValidator, PlainSerializer, MethodNames]:
        """As `field`, for a block that may be null: `group: Annotated[Grouper | None, *groupers.optional_field]`."""
        return (
            BeforeValidator(lambda block: None if block is None else self.build(block)),
            PlainSerializer(lambda method: None if method is None else self.dump(method)),
            MethodNames(self.classes),
        )
