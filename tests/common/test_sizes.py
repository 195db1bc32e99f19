"""Amounts of memory in configs."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.sizes import Bytes


class Budget(Config):
    memory: Bytes = key("8GiB", "a size", "bytes", gt=0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("1.5 GB", 1_500_000_000), ("500mb", 500_000_000), ("7 B", 7), ("2KiB", 2048), (123, 123), ("1TiB", 2**40)],
)
def test_sizes_are_read_with_decimal_and_binary_units(text: str | int, size: int):
    assert Budget.model_validate({"memory": text}).memory == size


def test_the_default_is_a_size_too():
    assert Budget().memory == 8 * 2**30


@pytest.mark.parametrize("text", ["8", "8 G", "GiB", "-1GiB", "8EiB", "8GiB and more", "", 1.5, None, 0, -3, "0B"])
def test_what_is_no_size_is_refused(text: object):
    with pytest.raises(ValidationError):
        Budget.model_validate({"memory": text})
