"""One tiny MoE, its calibration tokens and its statistics, shared by the tests of the surgery."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moe2dense.cli import main
from tests.helpers.tiny_models import tiny_qwen3_moe, write_tokens

SEQUENCE = 32


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("moe") / "model", dtype="bfloat16")


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "text", SEQUENCE * 20, 256, seed=1)


@pytest.fixture(scope="session")
def statistics(moe: Path, tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("statistics") / "stats"
    main(["calibrate", *calibration(moe, tokens, output)])
    return output


def calibration(source: Path, tokens: str, output: Path) -> list[str]:
    """The arguments of a small calibration."""
    return [f"source={source}", f"output={output}", f"data.path={tokens}", f"data.sequence_length={SEQUENCE}"]
