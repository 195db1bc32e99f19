from __future__ import annotations

import sys
from typing import Annotated

import pytest
import yaml

from megatron_moe2dense.common import config as configs
from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.registry import Method, Registry


class Shape(Method):
    pass


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A registry whose one method lives in a package that is imported when it is first asked for."""
    package = tmp_path / "shapes_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "circle.py").write_text("import tests.common.test_registry as here\nhere.CURRENT[0].register('circle')(here.Circle)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[Shape] = Registry("shape", "shapes_package")
    CURRENT[:] = [registry]
    yield registry
    for name in ("shapes_package", "shapes_package.circle"):
        sys.modules.pop(name, None)


CURRENT: list[Registry[Shape]] = []


class Circle(Shape):
    radius: float = key(1.0, "half the width", gt=0)


def _config(registry: Registry[Shape]) -> type[Config]:
    class Drawing(Config):
        shape: Annotated[Shape, *registry.field] = key({"method": "circle"}, "what to draw")

    return Drawing


def test_methods_are_found_by_name_with_their_options(shapes):
    assert list(shapes) == ["circle"]
    assert shapes.build({"method": "circle", "radius": 2.0}) == Circle(radius=2.0)


def test_a_method_block_dumps_to_what_it_was_built_from(shapes):
    drawing_class = _config(shapes)
    drawing = configs.build(drawing_class, {"shape": {"method": "circle", "radius": 2.0}}, "here")
    dumped = drawing.model_dump(mode="json")
    assert dumped == {"shape": {"method": "circle", "radius": 2.0}}
    assert configs.build(drawing_class, yaml.safe_load(yaml.safe_dump(dumped)), "here") == drawing


def test_an_unknown_method_is_answered_with_a_suggestion_and_the_known_ones(shapes):
    with pytest.raises(UserError, match=r"unknown shape method 'circel'; did you mean 'circle'\? known: circle"):
        configs.build(_config(shapes), {"shape": {"method": "circel"}}, "here")


def test_a_typo_in_a_method_option_is_named_with_its_path(shapes):
    with pytest.raises(UserError, match=r"shape\.radus: unknown key \(found 3\); did you mean 'radius'\?"):
        configs.build(_config(shapes), {"shape": {"method": "circle", "radus": 3}}, "here")


@pytest.mark.parametrize("block", ["circle", {"radius": 1.0}, {"method": 3}, None])
def test_a_block_without_a_method_name_is_refused(shapes, block):
    with pytest.raises(UserError, match=r"a block like \{method: NAME\} is needed; known methods: circle"):
        configs.build(_config(shapes), {"shape": block}, "here")


def test_the_same_name_twice_is_a_bug(shapes):
    assert list(shapes) == ["circle"]
    with pytest.raises(AssertionError, match="registered twice"):
        shapes.register("circle")(Circle)


def test_help_names_the_methods_and_their_options(shapes):
    class Optional(Config):
        shape: Annotated[Shape, *shapes.field] | None = key(None, "what to draw")

    class Nullable(Config):
        shape: Annotated[Shape | None, *shapes.optional_field] = key(None, "what to draw")

    for drawing, default in ((_config(shapes), ""), (Optional, "null"), (Nullable, "null")):
        assert list(configs.describe_keys(drawing)) == [
            ("shape", "block", default, "what to draw"),
            ("shape.method", "circle", "required", "which one; other keys of the block depend on it"),
            ("shape.radius", "float", "1.0", "half the width (method: circle)"),
        ]
