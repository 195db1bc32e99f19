"""Fixtures of several test packages."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moe2dense.cli import main

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a test that wants the network fails at once


@pytest.fixture(scope="session")
def example() -> Path:
    """The pico MoE of the repository."""
    return Path(__file__).resolve().parents[1] / "examples/pico_moe"


@pytest.fixture(scope="session")
def tokenizer_directory(example: Path) -> Path:
    """A Hugging Face tokenizer: byte-level BPE of 2,048 tokens, token 0 ends a document."""
    return example / "model"


@pytest.fixture
def user_error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end as a UserError (exit 2, found / expected / do, no traceback); returns the message."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        message = capsys.readouterr().err
        assert caught.value.code == 2
        assert all(part in message for part in ("found:", "expected:", "do:"))
        assert "Traceback" not in message
        return message

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start several processes first: they are the long ones, and the short ones fill the other worker's time at the end."""
    items.sort(key=lambda item: item.get_closest_marker("distributed") is None)


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: Python need not look through its million objects for cycles again and again, which
    took half of a short training run."""
    gc.collect()
    gc.freeze()
