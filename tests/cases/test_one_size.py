"""How large a model is: one number with one name, whichever command says it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from tests.helpers.tiny_models import tiny, write_tokens

# Tied embeddings, a vocabulary that the trainer pads, biases, a correction bias beside the router, a dense first layer and shared experts.
MODELS = {
    "qwen3_moe": {"tie_word_embeddings": True, "vocab_size": 200},
    "gpt_oss": {"vocab_size": 200},
    "deepseek_v3": {"vocab_size": 200},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_a_user_reads_how_large_a_model_is(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`parameters` of a MoE and of its dense student, in inspect, convert, distill --dry-run and eval: as stock transformers counts"""

    def said(*arguments: str) -> str:
        capsys.readouterr()
        main(list(arguments))
        return capsys.readouterr().out

    tiny(family, tmp_path / "moe", **MODELS[family])
    write_tokens(tmp_path / "text", 16 * 40, vocab=200)
    text = f"{{path: {tmp_path}/text, sequence_length: 16, sequences: 4}}"
    main(["calibrate", f"source={tmp_path}/moe", f"output={tmp_path}/statistics", f"data={text}"])
    convert = ["convert", f"source={tmp_path}/moe", f"statistics={tmp_path}/statistics", f"output={tmp_path}/dense", "score.method=sf"]
    promised, written = json.loads(said(*convert, "--dry-run"))["parameters"], said(*convert)
    stock = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).num_parameters() for name in ("moe", "dense")}
    moe, dense = (json.loads(said("inspect", f"{tmp_path}/{name}", "--json")) for name in ("moe", "dense"))
    assert moe["parameters"]["total"] == stock["moe"]
    assert [dense["parameters"]["total"], moe["dense"]["parameters"], promised] == [stock["dense"]] * 3
    assert re.findall(r": ([\d,]+) parameters", written) == [f"{stock['dense']:,}"]
    run = [f"student={tmp_path}/dense", f"teacher={tmp_path}/moe", f"data={{path: {tmp_path}/text, sequence_length: 16}}"]
    dry = json.loads(said("distill", *run, f"output={tmp_path}/run", "batch={micro: 1, global: 2}", "train.steps=2", "--dry-run"))
    assert (dry["student"]["parameters"], dry["teacher"]["parameters"]) == (stock["dense"], stock["moe"])
    main(["eval", f"models=[{tmp_path}/dense, {tmp_path}/moe]", f"output={tmp_path}/r.jsonl", f"perplexity.data={text}"])
    assert [row["parameters"] for row in records.read(tmp_path / "r.jsonl")] == [stock["dense"], stock["moe"]]
