from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import ValidationError

from megatron_moe2dense.common import config as configs
from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.errors import UserError


class Inner(Config):
    steps: int = key(10, "how long", "steps", gt=0)
    rate: float = key(1e-4, "peak", ge=0)


class Outer(Config):
    source: str = key(..., "where from")
    inner: Inner = key(Inner(), "a block")
    extra: Inner | None = key(None, "a block that may be absent")
    kind: Literal["a", "b"] = key("a", "which")
    names: list[str] = key([], "several")


def load(text: str, tmp_path: Any, *overrides: str) -> Outer:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return configs.load(Outer, path, overrides)


def test_all_problems_are_named_at_once_with_path_and_suggestion(tmp_path):
    with pytest.raises(UserError) as error:
        load("inner: {stepz: 3, rate: -1}\nextra: {step: 1}\nkind: c\n", tmp_path)
    message = str(error.value)
    assert "5 problems" in message
    assert "inner.stepz: unknown key (found 3); did you mean 'steps'?" in message
    assert "inner.rate:" in message
    assert "(found -1)" in message
    assert "extra.step: unknown key (found 1); did you mean 'steps'?" in message
    assert "kind:" in message
    assert "source: required, but missing" in message


def test_an_unknown_key_without_a_neighbour_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="known: source, inner, extra, kind, names"):
        load("source: x\nqqqqqq: 1\n", tmp_path)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E5", 1e5), ("2.5", 2.5), (".5", 0.5), ("3", 3.0), ("+1.5e-3", 1.5e-3)])
def test_yaml_numbers_with_exponents_are_numbers(tmp_path, text, value):
    assert load(f"source: x\ninner: {{rate: {text}}}\n", tmp_path).inner.rate == value
    assert load("source: x\n", tmp_path, f"inner.rate={text}").inner.rate == value


@pytest.mark.parametrize("text", ["1.2.3", "1e", "e5", "v1.0", "-", "."])
def test_what_only_looks_like_a_number_stays_text(text):
    assert configs.parse_yaml(text, "here") in (text, [None])


def test_integers_stay_integers_and_floats_are_no_integers(tmp_path):
    assert load("source: x\ninner: {steps: 12}\n", tmp_path).inner.steps == 12
    with pytest.raises(UserError, match=r"inner\.steps"):
        load("source: x\ninner: {steps: 1e3}\n", tmp_path)


@pytest.mark.parametrize("bad", ["inner: {steps: '3'}", "names: x", "inner: 3", "kind: yes"])
def test_types_are_strict(tmp_path, bad):
    with pytest.raises(UserError, match="1 problem in"):
        load(f"source: x\n{bad}\n", tmp_path)


def test_a_duplicate_key_is_refused_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"(?s)'steps' stands twice.*line 3"):
        load("source: x\ninner: {steps: 1,\n steps: 2}\n", tmp_path)


def test_an_unhashable_key_is_a_user_error(tmp_path):
    with pytest.raises(UserError):
        load("? [a]\n: 1\n", tmp_path)


@pytest.mark.parametrize("text", ["a: [", "source: x\n\tkind: a"])
def test_broken_yaml_names_the_line(tmp_path, text):
    with pytest.raises(UserError, match="line"):
        load(text, tmp_path)


def test_a_missing_file_and_a_list_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        configs.load(Outer, tmp_path / "absent.yaml", [])
    with pytest.raises(UserError, match="holds a list"):
        load("- a\n", tmp_path)


def test_a_binary_file_is_a_user_error(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="readable YAML"):
        configs.load(Outer, path, [])


def test_later_overrides_win_and_nested_blocks_appear(tmp_path):
    config = load("source: x\ninner: {rate: 1.0}\n", tmp_path, "inner.steps=3", "inner.steps=4", "extra.steps=5", "names=[p, q]", "kind=b")
    assert config.inner == Inner(steps=4, rate=1.0)
    assert config.extra == Inner(steps=5)
    assert config.names == ["p", "q"]
    assert config.kind == "b"


def test_an_override_value_may_hold_an_equals_sign(tmp_path):
    assert load("", tmp_path, "source=a=b").source == "a=b"


def test_overrides_do_not_touch_the_callers_data():
    data = {"inner": {"steps": 1}}
    configs.apply_overrides(data, ["inner.steps=2"])
    assert data == {"inner": {"steps": 1}}


@pytest.mark.parametrize("override", ["steps", "=3", ".steps=3", "inner.=3"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(UserError, match=r"key\.path=value"):
        configs.apply_overrides({}, [override])


def test_an_override_through_a_value_that_is_no_block_is_refused():
    with pytest.raises(UserError, match="source"):
        configs.apply_overrides({"source": "x"}, ["source.path=3"])


def test_a_resolved_config_loads_back_as_itself(tmp_path):
    config = load("source: x\ninner: {rate: 3e-5}\nextra: {steps: 2}\n", tmp_path)
    again = load(yaml.safe_dump(config.model_dump(mode="json")), tmp_path)
    assert again == config


def test_configs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Inner().steps = 3  # type: ignore[misc]


def test_described_keys_name_every_key_with_type_default_and_unit():
    rows = {row[0]: row[1:] for row in configs.describe_keys(Outer)}
    assert list(rows) == ["source", "inner", "inner.steps", "inner.rate", "extra", "extra.steps", "extra.rate", "kind", "names"]
    assert rows["source"] == ("str", "required", "where from")
    assert rows["inner.steps"] == ("int", "10", "how long [steps]")
    assert rows["extra"] == ("block", "null", "a block that may be absent")
    assert rows["kind"][:2] == ("a|b", "a")
    assert rows["names"][:2] == ("list[str]", "[]")


def test_a_described_default_can_be_pasted_into_yaml():
    class Defaults(Config):
        rate: float = key(1e-4, "")
        name: str | None = key(None, "")
        flag: bool = key(True, "")

    for name, _, default, _ in configs.describe_keys(Defaults):
        assert configs.parse_yaml(default, "default") == getattr(Defaults(), name)


def test_annotated_constraints_are_reported_with_the_found_value():
    class Small(Config):
        share: Annotated[float, "share"] = key(0.5, "", ge=0, le=1)

    with pytest.raises(UserError, match=r"share: .*less than or equal to 1 \(found 2\.5\)"):
        configs.build(Small, {"share": 2.5}, "here")


def test_a_key_that_is_a_python_keyword_has_one_spelling_everywhere(tmp_path):
    class Batch(Config):
        global_: int = key(8, "sequences", alias="global")

    class Run(Config):
        batch: Batch = key(Batch(), "sizes")

    assert configs.build(Run, {"batch": {"global": 3}}, "here").model_dump(mode="json") == {"batch": {"global": 3}}
    assert [row[0] for row in configs.describe_keys(Run)] == ["batch", "batch.global"]
    with pytest.raises(UserError, match=r"batch\.globl: unknown key \(found 3\); did you mean 'global'"):
        configs.build(Run, {"batch": {"globl": 3}}, "here")
