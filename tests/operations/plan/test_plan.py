"""The command: what it suggests divides and fits, what it refuses it says why, and its sums can be done by hand."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_moe2dense import cli
from megatron_moe2dense.common.config import build, load
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.operations import dry_run
from megatron_moe2dense.operations.plan import memory, run, timing
from megatron_moe2dense.operations.plan.activations import in_flight
from megatron_moe2dense.operations.plan.communication import Traffic
from megatron_moe2dense.operations.plan.config import PlanConfig
from megatron_moe2dense.operations.plan.hardware import DATA_SHEETS, Machine
from megatron_moe2dense.trainer.cache import write
from megatron_moe2dense.trainer.cache.config import CacheTeacherConfig
from megatron_moe2dense.trainer.config import DistillConfig, TeacherConfig
from megatron_moe2dense.trainer.data.config import StreamConfig
from megatron_moe2dense.trainer.flops import forward_flops
from megatron_moe2dense.trainer.layout import answers, refuse
from tests.families.published import GPT_OSS_20B, QWEN3_30B_A3B, dense_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("configs")
    contents = {"teacher": QWEN3_30B_A3B, "student": dense_config(QWEN3_30B_A3B, 8 * 768), "gpt_oss": GPT_OSS_20B}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: str(folder / f"{name}.json") for name in contents}


def config(configs: dict[str, str], **changed: Any) -> PlanConfig:
    return build(PlanConfig, {"student": configs["student"], "teacher": configs["teacher"], **changed}, "the test")


def test_suggestions_divide_fit_and_get_slower(configs: dict[str, str]):
    wanted = config(configs, hardware={"nodes": 8})
    started = time.process_time()
    verdicts, left_out = run.decide(wanted)
    assert time.process_time() - started < 5
    assert len(verdicts) > 50
    for verdict in verdicts:
        refuse(answers(verdict.job.questions()))
        assert verdict.bytes <= Machine(wanted.hardware).usable
    seconds = [verdict.step.seconds for verdict in verdicts]
    assert seconds == sorted(seconds)
    assert "change batch.global or batch.micro" in left_out
    assert any(verdict.job.parallel.tensor == 8 for verdict in verdicts), "ranks may share the 4 KV heads"


def test_more_memory_admits_more_layouts(configs: dict[str, str]):
    found = {gpu: len(run.decide(config(configs, hardware={"gpu": gpu}))[0]) for gpu in ("H100", "H200")}
    assert found["H200"] > found["H100"] > 0


def test_a_layout_that_does_not_fit_is_refused_by_part(configs: dict[str, str]):
    with pytest.raises(UserError) as refused:
        run.decide(config(configs, parallel={"tensor": 1}))
    assert all(part in refused.value.found for part in ("parameters", "optimizer", "teacher 61.0", "activations", "total"))
    assert "80.00 without the reserve of 8%" in refused.value.expected


def test_a_machine_without_any_layout_is_refused_with_the_reasons(configs: dict[str, str]):
    with pytest.raises(UserError, match=r"none of .* layouts on 1 x A100 .*more than the memory"):
        run.decide(config(configs, hardware={"gpu": "A100", "gpus": 1}))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"parallel": {"tensor": 3}, "hardware": {"gpus": 3}}, "num_key_value_heads = 4"),
        ({"parallel": {"expert": 3}, "hardware": {"gpus": 3}}, "num_experts = 128"),
        ({"parallel": {"pipeline": 5}, "hardware": {"gpus": 5}}, "5 pipeline stages"),
        ({"parallel": {"pipeline": 3}}, "8 processes"),
        ({"parallel": {"expert": 8}, "batch": {"micro": 3}}, "batch.micro=3"),
        ({"parallel": {"expert": 8, "pipeline": 1, "context": 8}, "data": {"sequence_length": 2050}}, "data.sequence_length=2050"),
        ({"student": "teacher", "teacher": None, "parallel": {"tensor": 2, "expert": 4}}, "a MoE student with parallel.tensor 2"),
        ({"student": "gpt_oss", "teacher": None, "parallel": {"tensor": 2, "sequence": True}}, "experts that have biases"),
        ({"student": "gpt_oss"}, "teacher vocabulary 151936, student vocabulary 201088"),
        ({"teacher_routing": {"active": 129}}, "teacher.routing.active: 129"),
        ({"student": "gpt_oss", "teacher": None, "parallel": {"context": 16}, "hardware": {"nodes": 2}}, "8 KV heads"),
    ],
)
def test_what_the_trainer_refuses_the_plan_refuses(configs: dict[str, str], changed: dict[str, Any], problem: str):
    named = {key: configs.get(value, value) if isinstance(value, str) else value for key, value in changed.items()}
    with pytest.raises(UserError) as refused:
        run.decide(config(configs, **named))
    assert problem in refused.value.found


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"teacher": None, "loss": {"method": "forward_kl"}}, "loss forward_kl needs a teacher"),
        ({"teacher": None, "teacher_routing": {"active": 9}}, "teacher.routing has no effect without a teacher"),
        ({"dtype": "float32"}, "bfloat16 rates alone"),
        ({"fp8": {}, "hardware": {"gpu": "A100"}}, "A100 has no tensor cores for it"),
        ({"fp8": {"recipe": "mxfp8"}}, "mxfp8: H100 has no tensor cores for it"),
        ({"optimizer": {}}, "optimizer: unknown key"),
        ({"data": {"sequence_len": 4}}, "data.sequence_len: unknown key"),
        ({"hardware": {"gpu": "H1000"}}, "hardware.gpu"),
    ],
)
def test_mistakes_in_the_config_are_told(configs: dict[str, str], changed: dict[str, Any], problem: str):
    with pytest.raises(UserError) as refused:
        config(configs, **changed)
    assert problem in str(refused.value)


def test_a_distill_yaml_is_judged_and_its_report_written(configs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    yaml_of_run = str(ROOT / "yaml_configs/qwen3_30b_a3b/distill.yaml")
    report = tmp_path / "report.json"
    arguments = [f"student={configs['student']}", f"teacher={configs['teacher']}"]
    cli.main(["plan", yaml_of_run, *arguments, "--dry-run"])
    facts = json.loads(capsys.readouterr().out)
    assert not report.exists()
    cli.main(["plan", yaml_of_run, *arguments, f"report={report}"])
    shown = capsys.readouterr().out
    assert json.loads(report.read_text())["best"] == facts["best"]
    assert [layout["expert"] for layout in facts["layouts"]] == [yaml.safe_load(Path(yaml_of_run).read_text())["parallel"]["expert"]]
    assert "on paper, not measured" in shown
    assert f"{facts['best']['stages']['0']['memory']['total'] / 1e9:.2f}" in shown


def test_one_gpu_of_80_gb_trains_the_ffns_beside_a_teacher_in_fp8(configs: dict[str, str], capsys: pytest.CaptureFixture[str]):
    yaml_of_run = ROOT / "yaml_configs/qwen3_30b_a3b/distill.yaml"
    arguments = [f"student={configs['student']}", f"teacher={configs['teacher']}", "hardware.gpus=1", "batch={micro: 1, global: 64}"]
    arguments += ["parallel={recompute: full}", "train.parts=ffn"]
    with pytest.raises(UserError, match=r"teacher 61\.06"):
        run.decide(load(PlanConfig, yaml_of_run, arguments))
    cli.main(["plan", str(yaml_of_run), *arguments, "teacher.dtype=fp8", "--dry-run"])
    held = json.loads(capsys.readouterr().out)["best"]["stages"]["0"]["memory"]
    assert held["total"] < 0.92 * 80e9
    layers = 48 * (2048 * 128 * (32 + 4 + 4 + 32) + 128 * 3 * 2048 * 768)  # a byte each, and four for 128
    others = 2 * 151936 * 2048 + 48 * (2 * 2048 + 128 * 2048 + 2 * 128) + 2048
    assert held["teacher"] == layers + layers // 32 + 2 * others


def test_a_dry_run_of_distill_tells_the_memory_that_the_plan_tells(configs: dict[str, str], capsys: pytest.CaptureFixture[str]):
    arguments = []
    for name in ("student", "teacher"):
        folder = Path(configs[name]).with_suffix("")
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(Path(configs[name]).read_text())
        arguments.append(f"{name}={folder}")
    yaml_of_run = ROOT / "yaml_configs/qwen3_30b_a3b/distill.yaml"
    cli.main(["plan", str(yaml_of_run), *arguments, "--dry-run"])
    planned = json.loads(capsys.readouterr().out)["best"]["stages"]["0"]["memory"]
    assert dry_run.facts(load(DistillConfig, yaml_of_run, arguments))["memory_per_process"]["stage 0"] == planned


def test_the_flops_of_a_teacher_cache_are_those_of_its_forward_pass(configs: dict[str, str], tmp_path: Path):
    (tmp_path / "config.json").write_text(Path(configs["teacher"]).read_text())
    facts = write.facts(CacheTeacherConfig(teacher=TeacherConfig(path=str(tmp_path)), output="-", data=StreamConfig(path="-"), samples=3))
    assert facts["flops"] == int(forward_flops(run.job_of(config(configs)).spec("teacher"), 2048) * 3 * 2048)


def test_one_gpu_takes_the_time_of_its_floating_point_operations(configs: dict[str, str]):
    job = run.job_of(config(configs, teacher=None, hardware={"gpus": 1}, batch={"global": 4}))
    machine = Machine(config(configs).hardware)
    expected = 3 * forward_flops(job.student, 2048) * 4 * 2048 / (0.36 * 989e12)
    found = timing.step_time(job, machine)
    assert found.seconds == found.student == pytest.approx(expected)
    assert timing.mfu(job, machine, found.seconds) == pytest.approx(0.36)


def test_fp8_halves_the_time_of_the_students_layers_and_keeps_copies_of_their_weights(configs: dict[str, str]):
    settings: dict[str, Any] = {"teacher": None, "hardware": {"gpus": 1}, "batch": {"global": 4}}
    machine = Machine(config(configs).hardware)
    plain, fast = (run.job_of(config(configs, **settings, fp8=fp8)) for fp8 in (None, {"recipe": "delayed"}))
    dims = plain.student.dims
    rest = 2 * dims.vocab_size * dims.hidden_size + dims.layers * 2 * dims.heads * dims.head_dim * 2049  # the head, attention's scores
    expected = 3 * (forward_flops(plain.student, 2048) + rest) / 2 * 4 * 2048 / (0.36 * 989e12)
    assert timing.step_time(fast, machine).seconds == pytest.approx(expected)
    assert memory.parameter_bytes(fast, 0) == 2 * memory.parameter_bytes(plain, 0)


def test_stages_wait_for_each_other_as_the_schedule_says(configs: dict[str, str]):
    start = run.job_of(config(configs, teacher=None, hardware={"gpus": 4}, batch={"global": 8}, parallel={"pipeline": 4}))
    found = {}
    for chunks in (1, 3):
        job = dataclasses.replace(start, parallel=start.parallel.model_copy(update={"virtual_pipeline": chunks}))
        found[chunks] = timing.step_time(job, Machine(config(configs).hardware))
    assert found[1].bubble == pytest.approx((found[1].student + found[1].messages) / 8 * 3)
    assert found[3].bubble == pytest.approx((found[3].student + found[3].messages) / 8 * 3 / 3)
    assert in_flight(start, 0) == [4]
    assert in_flight(start, 3) == [1]


def test_messages_take_the_slowest_link_on_their_way(configs: dict[str, str]):
    job = run.job_of(config(configs, hardware={"nodes": 2}, parallel={"tensor": 2, "sequence": True, "expert": 2}))
    machine = Machine(config(configs, hardware={"nodes": 2, "efficiency": 1.0}).hardware)
    gpu = DATA_SHEETS["H100"]

    def seconds(group: str, operation: str, ranks: int) -> float:
        return machine.seconds(job, Traffic("TP", group, operation, "student", 1e9, ranks))

    assert seconds("tp", "all-gather", 2) == pytest.approx(1e9 / 2 / gpu.nvlink)
    assert seconds("tp", "all-reduce", 2) == pytest.approx(1e9 / gpu.nvlink)
    # 8 ranks two GPUs apart, four on each node: four network cards at once
    assert seconds("dp_cp", "reduce-scatter", 8) == pytest.approx(1e9 * 7 / 8 / (4 * gpu.network))
    # 16 neighbours, half of the rows leave the node, each GPU through its own card
    assert seconds("ep", "all-to-all", 16) == pytest.approx(1e9 / 2 / gpu.network)
    assert seconds("ep", "all-to-all", 8) == pytest.approx(1e9 * 7 / 8 / gpu.nvlink)
