"""`eval` under torchrun: every process takes a share, and the numbers are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.evals import evaluate
from megatron_moe2dense.evals.config import EvalConfig
from tests.helpers.forks import forks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def task(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "task"
    main(["make-task", f"data={example}/tokens/heldout", f"tokenizer={example}/model", f"output={folder}", "questions=13"])
    return folder


def command(example: Path, output: Path, *more: str) -> list[str]:
    data = f"perplexity={{data: {{path: {example}/tokens/heldout, sequence_length: 64, sequences: 7}}, batch_tokens: 128}}"
    models = f"models={{moe: {example}/model}}"
    return ["eval", models, f"output={output}", data, f"kl.teacher={example}/model", *more]


def test_three_processes_measure_what_one_does(example: Path, task: Path, tmp_path: Path):
    """7 windows in batches of 2, 13 questions: uneven shares; rows of one process and of three agree."""
    asked = f"harness={{tasks: [{task}/continuation.yaml]}}"
    main(command(example, tmp_path / "alone.jsonl", asked))
    forks().run(command(example, tmp_path / "shared.jsonl", asked), processes=3)
    [alone], [shared] = (records.read(tmp_path / f"{name}.jsonl") for name in ("alone", "shared"))
    for name in ("nll", "kl", "top1_agreement"):
        assert shared["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-6, abs=1e-12)
    assert shared["metrics"]["harness"] == alone["metrics"]["harness"]
    assert shared["tokens"] == alone["tokens"] == 7 * 63
    assert (alone["settings"]["processes"], shared["settings"]["processes"]) == (1, 3)


def test_more_processes_than_questions_or_batches_are_refused(example: Path, task: Path, tmp_path: Path):
    for more, words in (([f"harness={{tasks: [{task}/continuation.yaml], limit: 2}}"], "2 questions for 3 processes"), ([], "7 windows")):
        job = forks().start(command(example, tmp_path / "r.jsonl", *more, *([] if more else ["perplexity.batch_tokens=512"])), processes=3)
        assert 2 in job.wait()
        assert words in job.said()
    assert not (tmp_path / "r.jsonl").exists()


def test_a_device_map_is_for_one_process(example: Path, tmp_path: Path):
    data = {"path": f"{example}/tokens/heldout", "sequence_length": 64, "sequences": 4}
    settings = {"models": [f"{example}/model"], "output": f"{tmp_path}/r.jsonl", "perplexity": {"data": data}, "device_map": "auto"}
    with pytest.raises(UserError, match="device_map in 2 processes"):
        evaluate.measure_all(build(EvalConfig, settings, "the test"), Ranks(0, 2))
