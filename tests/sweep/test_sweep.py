"""The sweep against `convert` and `eval` on the same configurations; equal plans, slices, several processes, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.surgery.dense_stream import DenseStream
from megatron_moe2dense.sweep import bench
from megatron_moe2dense.sweep.config import GridConfig
from megatron_moe2dense.sweep.grid import in_slice, points
from tests.helpers.forks import forks
from tests.helpers.tiny_models import tiny, write_tokens

pytestmark = pytest.mark.slow

# Deepseek: first layer dense, shared experts, latent attention. GPT-OSS: biases, sinks, sliding windows. Qwen2: gated shared expert.
FAMILIES = ("qwen3_moe", "deepseek_v2", "gpt_oss", "qwen2_moe", "olmoe")
METRICS = ("nll", "perplexity", "kl", "top1_agreement")
LENGTH = 24


class KilledError(BaseException):
    """Stands for a kill in the middle of a run."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Family to a directory with a tiny model, its statistics and held-out tokens; made when first asked for."""
    root, known = tmp_path_factory.mktemp("sweep"), {}

    def make(family: str) -> Path:
        if family not in known:
            folder = known[family] = root / family
            tiny(family, folder / "moe", dtype="bfloat16", num_hidden_layers=2)
            write_tokens(folder / "text", LENGTH * 6, seed=1)
            write_tokens(folder / "held_out", LENGTH * 5, seed=2)
            data = [f"data.path={folder}/text", f"data.sequence_length={LENGTH}"]
            main(["calibrate", f"source={folder}/moe", f"output={folder}/statistics", *data])
        return known[family]

    return make


def arguments(folder: Path, output: Path, *more: str, grid: str = "{keep: [2, 4], score: [sf, do_acp], group: [anchor, weight_cluster]}"):
    data = [f"data.path={folder}/held_out", f"data.sequence_length={LENGTH}", "batch_tokens=48"]
    return ["sweep", f"source={folder}/moe", f"statistics={folder}/statistics", f"output={output}", *data, f"grid={grid}", *more]


def rows_of(output: Path) -> list[dict[str, Any]]:
    return sorted(records.read(output / "records.jsonl"), key=lambda row: row["point"])


def values(row: dict[str, Any]) -> list[float]:
    return [row["metrics"][name] for name in METRICS]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_those_of_convert_and_eval(family: str, made, tmp_path: Path, capsys):
    folder = made(family)
    main(arguments(folder, tmp_path / "sweep"))
    rows = rows_of(tmp_path / "sweep")
    assert len(rows) == 2 * 2 * 2 * 2
    assert f"best: {min(rows, key=lambda row: row['metrics']['kl'])['model']}, KL" in capsys.readouterr().out
    chosen = [rows[0], rows[9], rows[15]]  # K = G, then two with merged experts and different scales
    assert [row["config"]["keep"] for row in chosen] == [2, 4, 4]
    outputs = []
    for row in chosen:
        blocks = {name: row["config"][name] for name in ("keep", "score", "scale", "group")}
        blocks.pop("group") if row["config"]["keep"] == 2 else None
        outputs.append(tmp_path / f"dense_{row['point']}")
        settings = [f"{name}={json.dumps(block)}" for name, block in blocks.items()]
        main(["convert", f"source={folder}/moe", f"statistics={folder}/statistics", f"output={outputs[-1]}", *settings])
    data = f"perplexity.data={{path: {folder}/held_out, sequence_length: {LENGTH}}}"
    models = f"models=[{folder}/moe, {', '.join(map(str, outputs))}]"
    main(["eval", models, f"output={tmp_path}/records.jsonl", data, f"kl.teacher={folder}/moe"])
    teacher, *evaluated = records.read(tmp_path / "records.jsonl")
    for ours, theirs in zip(chosen, evaluated, strict=True):
        assert values(ours) == pytest.approx(values(theirs), rel=1e-5, abs=1e-6)
        assert (ours["plan_hash"], ours["parameters"], ours["tokens"]) == (theirs["plan_hash"], theirs["parameters"], theirs["tokens"])
        assert ours["teacher"]["nll"] == pytest.approx(teacher["metrics"]["nll"], rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_refitted_points_are_those_of_convert_and_eval(family: str, made, tmp_path: Path):
    folder = made(family)
    grid = "{keep: [2, 4], score: [sf], group: [anchor], refit: [null, {method: ridge, mode: parallel}, {method: ridge, ridge: 1e-3}]}"
    text = [f"refit_data.path={folder}/text", f"refit_data.sequence_length={LENGTH}"]
    main(arguments(folder, tmp_path / "sweep", *text, grid=grid))
    rows = rows_of(tmp_path / "sweep")
    assert len(rows) == 2 * 2 * 3
    assert not (tmp_path / "sweep/.refits").exists()
    summary = json.loads((tmp_path / "sweep/summary.json").read_text())
    assert list(summary["axes"]["refit"]) == ["none", "ridge(mode=parallel)", "ridge(ridge=0.001)"]
    assert all("same_plan_as" in row for row in rows if row["config"]["refit"] and row["config"]["scale"]["method"] == "proportional")
    outputs, chosen = [], [row for row in rows if row["config"]["refit"] and row["config"]["scale"]["method"] == "uniform"]
    for row in chosen:
        outputs.append(tmp_path / f"dense_{row['point']}")
        settings = [f"keep={row['config']['keep']}", *(["group.method=anchor"] if row["config"]["keep"] == 4 else [])]
        settings += ["score.method=sf", f"refit={json.dumps(row['config']['refit'])}"]
        settings += [f"data.path={folder}/text", f"data.sequence_length={LENGTH}"]
        main(["convert", f"source={folder}/moe", f"statistics={folder}/statistics", f"output={outputs[-1]}", *settings])
    data = f"perplexity.data={{path: {folder}/held_out, sequence_length: {LENGTH}}}"
    models = f"models=[{', '.join(map(str, outputs))}]"
    main(["eval", models, f"output={tmp_path}/records.jsonl", data, f"kl.teacher={folder}/moe"])
    for ours, theirs in zip(chosen, records.read(tmp_path / "records.jsonl"), strict=True):
        assert values(ours) == pytest.approx(values(theirs), rel=1e-5, abs=1e-6)
        assert ours["plan_hash"] == theirs["plan_hash"]


def test_equal_plans_are_evaluated_once_and_recorded_each(made, tmp_path: Path, monkeypatch, capsys):
    folder, passes = made("qwen3_moe"), []
    plain = DenseStream.dense_states
    monkeypatch.setattr(DenseStream, "dense_states", lambda *a: passes.append(len(a[2])) or plain(*a))
    main(arguments(folder, tmp_path / "one"))
    rows = rows_of(tmp_path / "one")
    first = {row["plan_hash"]: row for row in reversed(rows) if "same_plan_as" not in row}
    assert passes == [len(first)]
    assert len(first) < len(rows) == 16  # at K = G both groupings are the same model
    for row in rows:
        assert row["metrics"] == first[row["plan_hash"]]["metrics"]
        assert row.get("same_plan_as", row["model"]) == first[row["plan_hash"]]["model"]
    # The memory budget decides how many go through a pass; the numbers do not depend on it.
    state = 5 * LENGTH * 64 * 4
    main(arguments(folder, tmp_path / "many", f"memory_budget={state * 5}"))
    assert passes[1:] == [3] * (len(first) // 3) + ([len(first) % 3] if len(first) % 3 else [])
    assert [values(row) for row in rows_of(tmp_path / "many")] == [values(row) for row in rows]
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    assert summary["recorded"] == summary["configurations"] == 16
    assert sum(summary["variance_explained"]["kl"].values()) == pytest.approx(1.0)
    assert summary["best"]["kl"]["kl"] == min(row["metrics"]["kl"] for row in rows)
    capsys.readouterr()


def test_a_killed_sweep_loses_the_pass_in_flight_only(made, tmp_path: Path, monkeypatch):
    folder, output = made("qwen3_moe"), tmp_path / "killed"
    few = f"memory_budget={5 * LENGTH * 64 * 4 * 5}"
    plain, passes = bench.against_teacher, []

    def measure(*given: Any) -> Any:
        passes.append(len(given[3]))
        if len(passes) == 2:
            raise KilledError
        return plain(*given)

    monkeypatch.setattr(bench, "against_teacher", measure)
    with pytest.raises(KilledError):
        main(arguments(folder, output, few))
    done = {row["plan_hash"] for row in rows_of(output)}
    assert len(done) == passes[0] == 3
    # As a kill in the middle of a pass' rows leaves it: a plan without the rows of its other points, and half a line.
    path = output / "records.jsonl"
    kept = [row for row in rows_of(output) if "same_plan_as" not in row]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"point": 3, "mod')
    main(arguments(folder, output, few))
    assert sum(passes[2:]) == len({row["plan_hash"] for row in rows_of(output)}) - 3
    assert [row["point"] for row in rows_of(output)] == list(range(16))


@pytest.mark.distributed
def test_processes_share_an_output_and_no_plan_is_evaluated_twice(made, tmp_path: Path):
    folder, output = made("qwen3_moe"), tmp_path / "shared"
    few = f"memory_budget={5 * LENGTH * 64 * 4 * 3}"  # one plan a pass
    commands = [arguments(folder, output, few, f"slice={part}") for part in ("1/2", "1/1")]  # the second one's holds the first one's
    jobs = [forks().start(command) for command in commands]
    ends = [(*job.wait(), job.said()) for job in jobs]
    assert 0 in [code for code, _ in ends], ends
    for code, said in ends:  # the other one may have found everything done before it started
        assert code == 0 or "finished output" in said, said
    rows = records.read(output / "records.jsonl")
    assert sorted(row["point"] for row in rows) == list(range(16))
    evaluated = [row["plan_hash"] for row in rows if "same_plan_as" not in row]
    assert len(set(evaluated)) == len(evaluated)


def test_slices_are_disjoint_complete_and_stable():
    hashes = [f"plan{i}" for i in range(23)]
    for count in (1, 2, 5, 23, 30):
        parts = [in_slice(hashes, (i, count)) for i in range(1, count + 1)]
        assert sorted(plan for part in parts for plan in part) == sorted(hashes)
        assert parts == [in_slice(list(hashes), (i, count)) for i in range(1, count + 1)]


def test_the_default_grid_is_the_papers_350():
    found = points(GridConfig(), experts=128, active=8)
    assert len(found) == 350
    assert list(dict.fromkeys(point.config["keep"] for point in found)) == [8, 16, 32, 64, 128]
    assert len({json.dumps(point.config, sort_keys=True) for point in found}) == 350
    assert {point.methods.grouper is None for point in found if point.config["keep"] == 8} == {True}


def test_a_dry_run_counts_and_writes_nothing(made, tmp_path: Path, capsys):
    main(arguments(made("qwen3_moe"), tmp_path / "dry", "--dry-run"))
    facts = json.loads(capsys.readouterr().out)
    assert facts["configurations"] == 16
    assert facts["to_evaluate"] == facts["distinct_plans"] < 16
    assert facts["forward_flops"] > 0
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("grid.keep=[16]", "at most 8"),
        ("grid={keep: [2], groups: [4]}", "no group may be empty"),
        ("grid.score=[sf, sf]", "twice"),
        ("grid.score=[sff]", "did you mean 'sf'?"),
        ("slice=3/2", "1 <= i <= n"),
        ("slice=1/2 overwrite=true", "delete each other"),
        ("grid.keep=[0]", "at least 1"),
        ("grid.refit=[ridge]", "give refit_data.path"),
        ("refit_data.path=text", "refit_data has no effect"),
    ],
)
def test_what_can_not_be_swept_is_refused(changes: str, message: str, made, tmp_path: Path, capsys):
    more = changes.split(" ") if changes.startswith("slice") else [changes]
    with pytest.raises(SystemExit) as caught:
        main(arguments(made("qwen3_moe"), tmp_path / "out", *more))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_is_not_mixed_nor_overwritten_unasked(made, tmp_path: Path, capsys):
    folder, output, small = made("qwen3_moe"), tmp_path / "out", "{keep: [2], score: [sf]}"

    def refusal(*more: str, grid: str = small) -> str:
        with pytest.raises(SystemExit) as caught:
            main(arguments(folder, output, *more, grid=grid))
        assert caught.value.code == 2
        return capsys.readouterr().err

    main(arguments(folder, output, grid=small))
    assert "is a finished output" in refusal()
    assert "another config" in refusal(grid="{keep: [2], score: [pp]}")
    main(arguments(folder, output, "overwrite=true", grid="{keep: [2], score: [pp]}"))
    assert {row["config"]["score"]["method"] for row in rows_of(output)} == {"pp"}
    (output / "moe2dense.json").write_text(json.dumps({"stage": "convert", "status": "finished", "config_hash": ""}))
    assert "output of `convert`" in refusal("overwrite=true")
    (output / "moe2dense.json").unlink()
    assert "exists" in refusal("overwrite=true")
    assert rows_of(output)


def test_grid_blocks_are_strict():
    with pytest.raises(UserError, match="unknown key"):
        build(GridConfig, {"score": [{"method": "sf", "seed": 1}]}, "test")
