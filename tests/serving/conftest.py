"""A tiny dense model with the tokenizer of the example, and what llama.cpp's own server says of a file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.forks import forks
from tests.helpers.tiny_models import tiny

PICO = Path("examples/pico_moe/model")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def with_tokenizer(folder: Path) -> Path:
    for name in TOKENIZER:
        shutil.copy(PICO / name, folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _quick_interpreter(programs: Path) -> Iterator[None]:
    """Scripts of `runners` run in processes that have imported what they need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(programs / "python"))
        yield


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    forks().commands(folder)
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 2 layers in bfloat16."""
    folder = tmp_path_factory.mktemp("serving") / "dense"
    return with_tokenizer(
        tiny("qwen3", folder, "bfloat16", vocab_size=2048, num_hidden_layers=2, head_dim=32, hidden_size=128, intermediate_size=256)
    )
