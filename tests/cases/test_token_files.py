"""Token files that hold what no model reads, or too little of what it reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.surgery.stats import CalibratedStats
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import Limits, windows, write_token_file
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

Refused = Callable[..., str]
PAD = 7


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("moe") / "model")


def text(count: int) -> np.ndarray:
    """Random tokens without the padding token."""
    return np.random.default_rng(0).integers(8, 256, count)


def test_negative_tokens(moe: Path, tmp_path: Path, user_error: Refused):
    """negative tokens in an .idx/.bin pair: calibrate, prune-dense, eval and make-task refuse them as distill does"""
    tokens = text(256)
    tokens[100] = -3
    write_token_file(str(tmp_path / "text"), [tokens], 100_000)
    where, dense = (f"data.path={tmp_path}/text", "data.sequence_length=16"), tiny_qwen3(tmp_path / "dense")
    commands = [
        ("calibrate", f"source={moe}", f"output={tmp_path}/out", *where),
        ("prune-dense", f"source={dense}", f"output={tmp_path}/out", "target.num_hidden_layers=2", *where),
        ("eval", f"models={{m: {dense}}}", f"output={tmp_path}/out", *(f"perplexity.{each}" for each in where)),
    ]
    for command in commands:
        said = user_error(*command)
        assert "token -3" in said
        assert "tokens from 0 to below the model's vocabulary of 256" in said


def test_text_that_is_mostly_padding(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """calibration text that is mostly padding: a warning names the token; with pad_token the statistics are those of the text alone"""
    plain = text(20 * 32)
    padded = np.concatenate([np.concatenate([part, np.full(100, PAD)]) for part in np.split(plain, 20)])
    found = {}
    for name, tokens, more in (("plain", plain, ()), ("padded", padded, ()), ("left out", padded, (f"data.pad_token={PAD}",))):
        prefix = write_tokens(tmp_path / name, tokens)
        output = tmp_path / f"{name} stats"
        main(["calibrate", f"source={moe}", f"output={output}", f"data.path={prefix}", "data.sequence_length=32", *more])
        assert (f"76% of the tokens are token {PAD}" in capsys.readouterr().err) == (name == "padded")
        found[name] = CalibratedStats.open(output).layers
    for layer, stats in found["plain"].items():
        assert all(np.array_equal(value, found["left out"][layer][name]) for name, value in stats.sums.items())
        assert any(not np.array_equal(value, found["padded"][layer][name]) for name, value in stats.sums.items())


def test_a_padding_token_that_the_text_does_not_hold(tmp_path: Path):
    """pad_token that stands nowhere in the text: refused, as it would have no effect"""
    prefix = write_tokens(tmp_path / "text", text(64))
    with pytest.raises(UserError, match=f"no token {PAD}"):
        windows(TokensConfig(path=prefix, sequence_length=16, pad_token=PAD), Limits(256))


def test_the_key_that_says_nothing_changes_no_record():
    """no pad_token: plans, manifests and hashes are those of versions that had no such key"""
    assert "pad_token" not in TokensConfig(path="x").model_dump(mode="json")
    assert TokensConfig(path="x", pad_token=3).model_dump(mode="json")["pad_token"] == 3


def test_windows_longer_than_the_model_was_made_for(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """windows longer than max_position_embeddings: a warning with both numbers, once"""
    prefix = write_tokens(tmp_path / "text", text(512 * 4))
    for length, said in ((256, 0), (257, 1)):
        where = (f"data.path={prefix}", f"data.sequence_length={length}")
        main(["calibrate", f"source={moe}", f"output={tmp_path}/{length}", *where])
        main(["calibrate", f"source={moe}", f"output={tmp_path}/{length}", *where, "--dry-run"])
        assert capsys.readouterr().err.count(f"windows of {length} tokens, and max_position_embeddings of the model is 256") == said
