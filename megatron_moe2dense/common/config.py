"""Strict configs: a YAML file plus `key.path=value` overrides become one frozen pydantic object, or one UserError
that lists every problem with its path, what was found and what was probably meant."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from megatron_moe2dense.common.errors import UserError, did_you_mean


class Config(BaseModel):
    """Base of all config blocks: frozen, strict types, unknown keys are errors; holds YAML types only."""

    # By alias: a key whose name is a Python keyword (`global`) has one spelling in YAML, in what is printed and in messages.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, serialize_by_alias=True)
    # Blocks in whose place one value may stand: which of their keys it is.
    plain: ClassVar[Mapping[str, str]] = {}


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class MethodNames:
    """Marks a field (in its Annotated metadata) as a `{method: NAME, ...}` block. classes: the methods by name."""

    classes: Callable[[], Mapping[str, type[Config]]]


class BlockError(ValueError):
    """A block that a registry built did not validate. cls: the class it should have become. error: pydantic's list."""

    def __init__(self, cls: type[Config], error: ValidationError):
        self.cls, self.error = cls, error
        super().__init__(str(error))


def key(default: Any, description: str, unit: str = "", **constraints: Any) -> Any:
    """A documented config field. `default=...` makes it required; `unit` is shown by `--help`."""
    return Field(default, description=description, json_schema_extra={"unit": unit}, **constraints)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (`1e-4` is a number) and no duplicate keys, on top of PyYAML's safe loader."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(name, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is no key", key_node.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
# PyYAML follows YAML 1.1, where 1e-4 is a string (https://github.com/yaml/pyyaml/issues/173).
# Appended after the integer resolver, so 12 stays an integer.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """YAML text to Python objects; UserError with line and column where it is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {error}", "a YAML document", "mend the line named above") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError when it is missing, unreadable or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}", "a readable YAML file", "check the path of the config") from None
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}", "a mapping of keys", "write `key: value` lines")
    return data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str], plain: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A copy of `data` with `a.b=value` strings set (values are YAML; the later one wins). plain: see `Config`."""
    result = _copy(data)
    for item in overrides:
        path, equals, text = item.partition("=")
        *parents, last = path.split(".")
        if not equals or not all((*parents, last)):
            raise UserError(f"argument {item!r}", "key.path=value", "write e.g. train.steps=100")
        block, alone = result, (plain or {}).get(path.partition(".")[0])
        if parents and alone is not None and result.get(parents[0]) is not None and not isinstance(result[parents[0]], dict):
            result[parents[0]] = {alone: result[parents[0]]}
        for parent in parents:
            if block.get(parent) is None:
                block[parent] = {}
            block = block[parent]
            if not isinstance(block, dict):
                raise UserError(f"argument {item!r}, but {parent} is {_short(block)}", "a block at that path", f"set {parent} itself")
        block[last] = parse_yaml(text, f"argument {item!r}")
    return result


def _copy(data: Any) -> Any:
    return {name: _copy(value) for name, value in data.items()} if isinstance(data, dict) else data


def build(cls: type[C], data: dict[str, Any], where: str) -> C:
    """Validate `data` as a `cls`; one UserError lists all problems."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = list(_problems(cls, error))
        raise UserError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)} in {where}\n" + "\n".join(f"  - {line}" for line in problems),
            "the keys of the command, each with a value of its type",
            "mend each line above; `--help` of the command lists every key with type, default and unit",
        ) from None


def load(cls: type[C], path: Path | None, overrides: Sequence[str]) -> C:
    """YAML file (may be None) and overrides to a validated `cls`."""
    data = apply_overrides(read_yaml(path) if path else {}, overrides, cls.plain)
    return build(cls, data, str(path) if path else "the command line")


def _problems(cls: type[Config], error: ValidationError, prefix: str = "") -> Iterator[str]:
    for item in error.errors():
        inner = item.get("ctx", {}).get("error")
        path = prefix + ".".join(str(part) for part in item["loc"])
        if isinstance(inner, BlockError):
            yield from _problems(inner.cls, inner.error, path + ".")
        elif item["type"] == "extra_forbidden":
            known = _known_keys(cls, item["loc"][:-1])
            hint = did_you_mean(str(item["loc"][-1]), known) or (f"known: {', '.join(known)}" if known else "")
            yield f"{path}: unknown key (found {_short(item['input'])}); {hint}".rstrip("; ")
        elif item["type"] == "missing":
            yield f"{path}: required, but missing"
        else:
            yield f"{path or 'config'}: {item['msg'].removeprefix('Value error, ')} (found {_short(item['input'])})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _known_keys(cls: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    for part in loc:
        field = next((field for name, field in cls.model_fields.items() if part == (field.alias or name)), None)
        block = field and block_type(field.annotation)
        if block:
            cls = block
    return [field.alias or name for name, field in cls.model_fields.items()]


def block_type(annotation: Any) -> type[Config] | None:
    """The Config class inside an annotation such as `Block | None`, or None."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    for option in (getattr(option, "__origin__", option) if hasattr(option, "__metadata__") else option for option in options):
        if isinstance(option, type) and issubclass(option, Config):
            return option
    return None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def describe_keys(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Rows (key path, type, default, description with unit) for `--help`, nested blocks flattened."""
    for name, field in cls.model_fields.items():
        path, block, methods = prefix + (field.alias or name), block_type(field.annotation), _methods(field)
        if methods is not None:
            yield path, "block", _default(field, block), _described(field)
            yield f"{path}.method", "|".join(methods), "required", "which one; other keys of the block depend on it"
            for method, method_class in methods.items():
                rows = describe_keys(method_class, f"{path}.")
                yield from ((*row[:3], f"{row[3]} (method: {method})") for row in rows)
        elif block:
            yield path, "block", _default(field, block), _described(field)
            yield from describe_keys(block, f"{path}.")
        else:
            yield path, _type_name(field.annotation), _default(field, block), _described(field)


def _methods(field: FieldInfo) -> Mapping[str, type[Config]] | None:
    options = [field.annotation, *typing.get_args(field.annotation)]
    marks = [*field.metadata, *(mark for option in options for mark in getattr(option, "__metadata__", ()))]
    return next((mark.classes() for mark in marks if isinstance(mark, MethodNames)), None)


def _default(field: FieldInfo, block: type[Config] | None) -> str:
    if field.is_required():
        return "required"
    if block:
        return "" if field.get_default(call_default_factory=True) is not None else "null"
    return yaml.safe_dump(field.get_default(call_default_factory=True), default_flow_style=True).split("\n")[0]


def _described(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    unit = extra.get("unit") if isinstance(extra, dict) else ""
    return (field.description or "") + (f" [{unit}]" if unit else "")


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(value) for value in arguments)
    if hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    if _is_union(annotation):
        return "|".join(_type_name(option) for option in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(option) for option in arguments)}]"
    is_block = isinstance(annotation, type) and issubclass(annotation, Config)
    return "block" if is_block else str(annotation.__name__)
