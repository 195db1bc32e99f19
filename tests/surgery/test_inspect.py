"""inspect and score: what they tell is what stock transformers and plain numpy tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.common.spectrum import effective_rank
from megatron_moe2dense.surgery.inspect import gpus_for_weights
from megatron_moe2dense.surgery.stats import CalibratedStats
from tests.helpers.tiny_models import tiny_qwen3

Capture = pytest.CaptureFixture[str]


def test_inspect_counts_what_stock_transformers_counts(moe: Path, capsys: Capture):
    main(["inspect", str(moe), "--json"])
    facts = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(moe)
    assert facts["family"] == "qwen3_moe"
    assert facts["parameters"]["total"] == model.num_parameters()
    assert facts["bytes"]["total"] == 2 * model.num_parameters()
    named = {name: p.numel() for name, p in model.named_parameters()}
    for part, text in (("experts", ".experts."), ("attention", "self_attn"), ("router", "mlp.gate.")):
        assert facts["parameters"][part] == sum(count for name, count in named.items() if text in name)
    assert facts["parameters"]["embeddings"] == 2 * 256 * 64
    assert facts["active_parameters"] == model.num_parameters() - 4 * 6 * 3 * 64 * 32


@pytest.mark.parametrize("keep", [None, 3, 8])
def test_the_dense_size_is_the_size_of_what_convert_writes(keep: int | None, moe: Path, statistics: Path, tmp_path: Path, capsys: Capture):
    main(["inspect", str(moe), "--json", *([] if keep is None else ["--keep", str(keep)])])
    dense = json.loads(capsys.readouterr().out)["dense"]
    options = [] if keep is None else [f"groups={keep}"]
    main(["convert", f"source={moe}", f"statistics={statistics}", f"output={tmp_path / 'dense'}", *options])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense["parameters"] == model.num_parameters()
    assert dense["bytes"] == 2 * model.num_parameters()
    assert dense["intermediate_size"] == model.config.intermediate_size


def test_inspect_reads_well(moe: Path, tmp_path: Path, capsys: Capture):
    main(["inspect", str(moe)])
    text = capsys.readouterr().out
    assert all(word in text for word in ("qwen3_moe", "experts", "router", "active per token", "dense with K = 2"))
    main(["inspect", str(tiny_qwen3(tmp_path / "dense"))])
    text = capsys.readouterr().out
    assert "attention" in text
    assert "router" not in text


def test_the_ranking_holds_what_the_table_shows(statistics: Path, tmp_path: Path, capsys: Capture):
    main(["score", f"statistics={statistics}", "score.method=sf", "keep=3", f"output={tmp_path / 'ranking.json'}"])
    text, ranking = capsys.readouterr().out, json.loads((tmp_path / "ranking.json").read_text())
    assert (ranking["format"], ranking["family"], ranking["keep"]) == (1, "qwen3_moe", 3)
    assert ranking["score"] == {"method": "sf"}
    for layer, stats in zip(ranking["layers"], CalibratedStats.open(statistics).layers.values(), strict=True):
        frequency = stats["selected_count"] / stats.tokens
        assert layer["scores"] == layer["selected_fraction"] == frequency.tolist()
        assert layer["experts"] == np.argsort(-frequency, kind="stable")[:3].tolist()
        eigenvalues = np.linalg.eigvalsh(stats["gram"][np.ix_(layer["experts"], layer["experts"])])
        shares = eigenvalues / eigenvalues.sum()
        assert layer["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
        assert f"{frequency.argmax()} ({frequency.max():#.3g})" in text
        assert layer["routing_kept"] == pytest.approx(np.sort(frequency)[-3:].sum() / frequency.sum())


def test_the_ranking_goes_beside_the_statistics_by_default(moe: Path, tokens: str, tmp_path: Path):
    data = [f"data.path={tokens}", "data.sequence_length=32", "statistics=[prob_sum]"]
    main(["calibrate", f"source={moe}", f"output={tmp_path / 'stats'}", *data])
    main(["score", f"statistics={tmp_path / 'stats'}", "score.method=pp"])
    ranking = json.loads((tmp_path / "stats/ranking.json").read_text())
    assert ranking["keep"] == 2
    assert ranking["layers"][0]["selected_fraction"] is None
    assert ranking["layers"][0]["effective_rank"] is None


def test_effective_rank_counts_directions():
    assert effective_rank(np.eye(4)) == pytest.approx(4)
    assert effective_rank(np.ones((4, 4))) == pytest.approx(1)
    assert effective_rank(np.zeros((4, 4))) == 0


def test_dry_runs_write_nothing(moe: Path, statistics: Path, tmp_path: Path, capsys: Capture):
    main(["score", f"statistics={statistics}", f"output={tmp_path / 'ranking.json'}", "--dry-run"])
    assert str(tmp_path / "ranking.json") in json.loads(capsys.readouterr().out)["writes"]
    main(["inspect", str(moe), "--dry-run"])
    assert json.loads(capsys.readouterr().out)["parameters"]["router"] == 4 * 8 * 64
    assert not list(tmp_path.iterdir())


def test_configs_statistics_scores_and_plans_need_no_torch():
    modules = ["config", "stats", "types", "plan", "score", "compare", "grouping", "scaling"]
    code = "import sys\n" + "\n".join(f"import megatron_moe2dense.surgery.{m}" for m in modules)
    code += "\nfrom megatron_moe2dense.surgery.scoring import scorers\nlist(scorers)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_fits_where_counts_gpus_by_the_bytes_of_the_weights():
    """61 GB (a 30B MoE in bfloat16) need one GPU of 80 GB at 80%, or four of 24 GB; 6.7 GB fit any."""
    assert gpus_for_weights(61_000_000_000) == {"16 GB": 5, "24 GB": 4, "48 GB": 2, "80 GB": 1, "141 GB": 1, "192 GB": 1}
    assert set(gpus_for_weights(6_700_000_000).values()) == {1}


def test_inspect_says_what_fits_where(moe: Path, capsys: Capture):
    main(["inspect", str(moe), "--json"])
    facts = json.loads(capsys.readouterr().out)
    sizes = {"this model": facts["bytes"]["total"], "dense": facts["dense"]["bytes"]}
    assert facts["gpus_for_weights"] == {name: gpus_for_weights(size) for name, size in sizes.items()}
