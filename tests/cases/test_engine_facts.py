"""What engines will not do with a result is said before anybody serves it, by engine and version, from its config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_moe2dense.cli import main
from megatron_moe2dense.families.dense import DenseForm
from megatron_moe2dense.families.engines import FACTS, said_of_engines
from megatron_moe2dense.families.stock import Stock
from tests.families.published import DEEPSEEK_V2_LITE, GPT_OSS_20B, QWEN3_30B_A3B
from tests.helpers.tiny_models import tiny, write_tokens

CLAMP = "swiglu_limit 7.0 with swiglu_alpha 1.702"
DEPTH = "llama.cpp b11739: it takes 26 or 27 layers"
POSITIONS = "vLLM 0.32 on a CPU: its rotary positions"
ROUNDED = "llama.cpp b11549: it rounds the border dimensions of YaRN"


def said(published: dict[str, Any], **changed: Any) -> list[str]:
    form = DenseForm(Stock.of({**published, **changed}, "config.json"))
    return said_of_engines(form.of(32).stock.model.config.to_dict())


@pytest.mark.parametrize("published", [QWEN3_30B_A3B, DEEPSEEK_V2_LITE], ids=["qwen3", "deepseek_v2"])
def test_of_what_is_published_nothing_is_said(published: dict[str, Any]):
    """the dense results of Qwen3-30B-A3B and DeepSeek-V2-Lite at their own depth: nothing that these engines could not do"""
    assert said(published) == []


def test_the_published_gpt_oss_is_rounded_by_llama_cpp():
    """GPT-OSS as published, whose YaRN is not rounded: that llama.cpp rounds it is said, and nothing else"""
    (found,) = said(GPT_OSS_20B)
    assert found.startswith(ROUNDED)
    assert said(GPT_OSS_20B, rope_scaling={**GPT_OSS_20B["rope_scaling"], "truncate": True}) == []


@pytest.mark.parametrize(
    ("published", "changed", "expected"),
    [
        (GPT_OSS_20B, {"swiglu_limit": 5.0}, CLAMP),
        (GPT_OSS_20B, {"swiglu_alpha": 1.5}, CLAMP),
        (DEEPSEEK_V2_LITE, {"num_hidden_layers": 20}, DEPTH),
        (DEEPSEEK_V2_LITE, {"q_lora_rank": 512}, DEPTH),
        (DEEPSEEK_V2_LITE, {"rope_scaling": None}, POSITIONS),
    ],
)
def test_what_an_engine_does_otherwise(published: dict[str, Any], changed: dict[str, Any], expected: str):
    """another clamp of GPT-OSS, another depth of DeepSeek-V2, positions without YaRN: the engine that is wrong there, and what helps"""
    (found,) = [each for each in said(published, **changed) if not each.startswith(ROUNDED)]
    assert expected in found
    assert ("serve it with" in found) or ("serve it on" in found)


def test_the_other_depths_of_llama_cpp():
    """DeepSeek of 48 layers without a low rank of queries: loads with a vocabulary of 128256, with another it is said"""
    deep = {"num_hidden_layers": 48, "vocab_size": 128256}
    assert said(DEEPSEEK_V2_LITE, **deep) == []
    assert DEPTH in said(DEEPSEEK_V2_LITE, **{**deep, "vocab_size": 129280})[0]


def test_inspect_and_convert_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """a GPT-OSS with another swiglu_limit than 7.0: inspect, convert and its dry run say that no engine serves its dense result"""
    source = tiny("gpt_oss", tmp_path / "moe")
    tokens = write_tokens(tmp_path / "text", 32 * 4)
    main(["calibrate", f"source={source}", f"output={tmp_path}/stats", f"data.path={tokens}", "data.sequence_length=32"])
    arguments = ["convert", f"source={source}", f"statistics={tmp_path}/stats", f"output={tmp_path}/dense"]
    capsys.readouterr()
    main([*arguments, "--dry-run"])
    assert CLAMP in json.loads(capsys.readouterr().out)["engines"][0]
    main(arguments)
    assert f"{tmp_path}/dense: vLLM 0.32 and llama.cpp b11739: they clamp GPT-OSS at {CLAMP}" in capsys.readouterr().err
    for folder, of in ((source, "the dense result"), (tmp_path / "dense", "the dense result")):
        main(["inspect", str(folder)])
        assert f"{of} in vLLM 0.32 and llama.cpp b11739: they clamp GPT-OSS at {CLAMP}" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", sorted({name for fact in FACTS for name in fact.types}))
def test_every_fact_is_of_a_class_that_transformers_has(model_type: str):
    """a class whose keys are renamed in a later transformers: the facts about it fail here, not in a user's run"""
    config = CONFIG_MAPPING[model_type]().to_dict()
    said_of_engines({**config, "num_hidden_layers": 5})
    for fact in (fact for fact in FACTS if model_type in fact.types):
        assert fact.said.format_map(config) != fact.said
