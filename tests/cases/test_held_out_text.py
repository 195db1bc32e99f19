"""Held-out text is text that nothing was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense import cli
from megatron_moe2dense.common.config import build
from megatron_moe2dense.operations.doctor.readiness import Resources, judge
from megatron_moe2dense.tokens.indexed import TokenFile
from megatron_moe2dense.trainer.config import DistillConfig
from tests.helpers.tiny_models import tiny, tiny_qwen3, write_tokens


def split(tmp_path: Path, tokenizer: Path, name: str, texts: list[str]) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """The documents for training and for validation, a fifth of them."""
    source, output = tmp_path / f"{name}.jsonl", tmp_path / name
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cli.main(["data", f"source={source}", f"tokenizer={tokenizer}", f"output={output}", "validation_fraction=0.2"])
    sides = []
    for prefix in (f"{output}", f"{output}_validation"):
        file, start, found = TokenFile.open(prefix), 0, set()
        for end in file.document_ends.tolist():
            found.add(tuple(file.tokens[start:end].tolist()))
            start = end
        sides.append(found)
    return sides[0], sides[1]


def test_a_corpus_with_duplicates_is_split(tmp_path: Path, tokenizer_directory: Path):
    """`data` with validation_fraction on text with documents twice in it: both copies go to the same side."""
    texts = [f"document number {number}" for number in range(200)]
    train, validation = split(tmp_path, tokenizer_directory, "twice", texts + texts[::-1])
    assert 20 <= len(validation) <= 60
    assert len(train) + len(validation) == 200
    assert not train & validation


def test_a_corpus_grows(tmp_path: Path, tokenizer_directory: Path):
    """`data` with validation_fraction again after the corpus grew or was reordered: no document changes sides."""
    texts = [f"document number {number}" for number in range(200)]
    train, validation = split(tmp_path, tokenizer_directory, "before", texts)
    more, held_out = split(tmp_path, tokenizer_directory, "after", ["one more", *texts[::-1], "and another"])
    assert train <= more
    assert validation <= held_out


def validated(root: Path, validation: Path) -> DistillConfig:
    settings: dict[str, Any] = {
        "student": str(root / "student"),
        "teacher": None,
        "output": str(root / "run"),
        "data": {"path": str(root / "tokens"), "sequence_length": 16, "validation": str(validation), "validation_sequences": 2},
        "batch": {"micro": 2, "global": 4},
        "train": {"steps": 1},
        "dtype": "float32",
    }
    return build(DistillConfig, settings, "the test")


def test_validation_is_a_copy_of_the_training_text(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """`distill` or `doctor` with data.validation of the same content as data.path: a warning that it is not held out."""
    from megatron_moe2dense.trainer import distill

    tiny_qwen3(tmp_path / "student")
    for name, seed in (("tokens", 0), ("copied", 0), ("other", 1)):
        write_tokens(tmp_path / name, 65, seed=seed)
    said = f"held-out text {tmp_path}/copied is that of data.path={tmp_path}/tokens"
    findings = judge(validated(tmp_path, tmp_path / "copied"), Resources([], 1))
    assert [item.level for item in findings if item.found.startswith(said)] == ["warning"]
    assert not any("held-out text" in item.found for item in judge(validated(tmp_path, tmp_path / "other"), Resources([], 1)))
    with caplog.at_level("WARNING", "megatron_moe2dense"):
        distill.run(validated(tmp_path, tmp_path / "copied"))
    assert said in caplog.text


def test_auto_judges_on_its_calibration_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`auto` or `sweep` with data of the same content as refit_data: a warning that plans are judged on what they were fitted to."""
    tiny("qwen3_moe", tmp_path / "moe")
    for name in ("tokens", "copied"):
        write_tokens(tmp_path / name, 65)
    data = [f"data.path={tmp_path}/tokens", "data.sequence_length=16"]
    cli.main(["calibrate", f"source={tmp_path}/moe", f"output={tmp_path}/statistics", *data])
    given = [f"source={tmp_path}/moe", f"statistics={tmp_path}/statistics", f"output={tmp_path}/out"]
    refit = [f"refit_data.path={tmp_path}/copied", "refit_data.sequence_length=16"]
    for command in (["auto", "budget.parameters=1"], ["sweep", "grid.keep=[99]", "grid.refit=[ridge]"]):
        with pytest.raises(SystemExit):  # nothing fits, which is found after it
            cli.main([*command, *given, *data, *refit])
        assert f"held-out text {tmp_path}/tokens is that of refit_data.path={tmp_path}/copied" in capsys.readouterr().err, command
