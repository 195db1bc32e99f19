"""The dense checkpoint: stock transformers loads it, and it holds exactly what docs/method.md#groups-merging-scaling says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from megatron_moe2dense.cli import main
from tests.helpers.tiny_models import tiny_qwen3_moe, write_tokens
from tests.surgery.conftest import calibration

FFN = ("gate_proj", "up_proj", "down_proj")


def convert(moe: Path, statistics: Path, output: Path, *options: str) -> dict[str, torch.Tensor]:
    main(["convert", f"source={moe}", f"statistics={statistics}", f"output={output}", *options])
    return load_file(output / "model.safetensors")


MERGED = ("keep=5", "groups=3", "group.method=round_robin", "scale.method=proportional")


@pytest.mark.parametrize("options", [(), ("keep=3", "groups=3"), MERGED], ids=["default", "wider", "merged"])
def test_stock_transformers_loads_it_with_no_missing_or_unexpected_key(
    options: tuple[str, ...], moe: Path, statistics: Path, tmp_path: Path
):
    convert(moe, statistics, tmp_path / "dense", *options)
    model, info = Qwen3ForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) is Qwen3ForCausalLM
    assert model.config.intermediate_size == 32 * (2 if not options else 3)
    assert model.dtype == torch.bfloat16
    assert not {"num_experts", "num_local_experts", "moe_intermediate_size", "norm_topk_prob"} & set(model.config.to_dict())
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


@pytest.mark.parametrize("options", [(), MERGED], ids=["pruned", "merged"])
def test_the_ffn_is_the_formula_of_the_plan_rounded_once(options: tuple[str, ...], moe: Path, statistics: Path, tmp_path: Path):
    dense = convert(moe, statistics, tmp_path / "dense", *options)
    experts = load_file(moe / "model.safetensors")
    for layer in json.loads((tmp_path / "dense/plan.json").read_text())["layers"]:
        prefix = f"model.layers.{layer['layer']}.mlp."
        for kind in FFN:
            slices = []
            for group, scale in enumerate(layer["scales"]):
                merged = np.zeros(experts[f"{prefix}experts.0.{kind}.weight"].shape)
                for expert, of, weight in zip(layer["experts"], layer["group_of"], layer["merge_weights"], strict=True):
                    if of == group:
                        merged += weight * experts[f"{prefix}experts.{expert}.{kind}.weight"].double().numpy()
                slices.append(merged * scale if kind == "down_proj" else merged)
            expected = torch.from_numpy(np.concatenate(slices, axis=1 if kind == "down_proj" else 0)).bfloat16()
            assert torch.equal(dense[f"{prefix}{kind}.weight"], expected)


def test_everything_outside_the_moe_blocks_is_copied_bit_for_bit(moe: Path, statistics: Path, tmp_path: Path):
    (moe / "tokenizer_config.json").write_text('{"model_max_length": 256}')
    dense, source = convert(moe, statistics, tmp_path / "dense"), load_file(moe / "model.safetensors")
    outside = {name for name in source if ".mlp." not in name}
    assert outside == {name for name in dense if ".mlp." not in name}
    for name in outside:
        assert dense[name].dtype == source[name].dtype
        assert dense[name].view(torch.int16).equal(source[name].view(torch.int16))
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (moe / name).read_bytes()


def test_a_group_of_one_is_copied_bit_for_bit_negative_zeros_too(tokens: str, tmp_path: Path):
    moe = tiny_qwen3_moe(tmp_path / "moe", dtype="bfloat16")
    tensors = load_file(moe / "model.safetensors")
    for name, tensor in tensors.items():
        if "experts" in name:
            tensor[0] = -0.0
    save_file(tensors, moe / "model.safetensors", metadata={"format": "pt"})
    main(["calibrate", *calibration(moe, tokens, tmp_path / "stats")])
    dense = convert(moe, tmp_path / "stats", tmp_path / "dense")
    first = json.loads((tmp_path / "dense/plan.json").read_text())["layers"][0]["experts"][0]
    for kind in ("gate_proj", "up_proj"):
        expert = tensors[f"model.layers.0.mlp.experts.{first}.{kind}.weight"]
        assert dense[f"model.layers.0.mlp.{kind}.weight"][:32].view(torch.int16).equal(expert.view(torch.int16))


def constant_routing(directory: Path, kept: list[list[int]]) -> Path:
    """A MoE whose router gives every token the experts `kept[layer]` with equal gates: channel 0 of the residual stream is a
    constant that nothing changes, and the router looks at it alone."""
    path = tiny_qwen3_moe(directory)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 5.0
    for layer, experts in enumerate(kept):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "self_attn.o_proj.weight"][0] = 0
        tensors[prefix + "post_attention_layernorm.weight"][0] = 1.0
        router = torch.zeros_like(tensors[prefix + "mlp.gate.weight"])
        router[:, 0] = -1.0
        router[experts, 0] = 1.0
        tensors[prefix + "mlp.gate.weight"] = router
        for expert in range(8):
            tensors[f"{prefix}mlp.experts.{expert}.down_proj.weight"][0] = 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("score", ["sf", "cp", "do_acp"])
@torch.no_grad()
def test_where_all_tokens_use_the_kept_experts_equally_the_dense_model_is_the_moe(score: str, tokens: str, tmp_path: Path):
    kept = [[1, 6], [0, 3], [5, 7], [2, 4]]
    moe = constant_routing(tmp_path / "moe", kept)
    main(["calibrate", *calibration(moe, tokens, tmp_path / "stats")])
    convert(moe, tmp_path / "stats", tmp_path / "dense", f"score.method={score}")
    plan = json.loads((tmp_path / "dense/plan.json").read_text())
    assert [sorted(layer["experts"]) for layer in plan["layers"]] == kept
    text = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(3))
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(text).logits for name in ("dense", "moe"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_plan_gives_the_same_bytes_as_the_methods_it_came_from(moe: Path, statistics: Path, tmp_path: Path):
    convert(moe, statistics, tmp_path / "methods", *MERGED)
    main(["convert", f"source={moe}", f"plan={tmp_path / 'methods/plan.json'}", f"output={tmp_path / 'plan'}"])
    for name in ("model.safetensors", "config.json", "plan.json"):
        assert (tmp_path / "plan" / name).read_bytes() == (tmp_path / "methods" / name).read_bytes()
    first, second = (json.loads((tmp_path / name / "moe2dense.json").read_text()) for name in ("methods", "plan"))
    assert first["plan_hash"] == second["plan_hash"]


@pytest.mark.parametrize("dense_width", [128, 40])  # wider than the result's 64, narrower
@torch.no_grad()
def test_layers_that_are_dense_already_keep_their_function(dense_width: int, tokens: str, tmp_path: Path):
    moe = tiny_qwen3_moe(tmp_path / "moe", mlp_only_layers=[1], intermediate_size=dense_width)
    main(["calibrate", *calibration(moe, tokens, tmp_path / "stats")])
    convert(moe, tmp_path / "stats", tmp_path / "dense")
    dense, info = Qwen3ForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert dense.config.intermediate_size == max(64, dense_width)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(moe)
    torch.testing.assert_close(dense.model.layers[1].mlp(x), stock.model.layers[1].mlp(x), rtol=1e-6, atol=1e-6)


def test_a_sharded_source_gives_the_same_bytes(moe: Path, tokens: str, tmp_path: Path):
    results = []
    for name, shard in (("single", "1GB"), ("sharded", "100KB")):
        path = tiny_qwen3_moe(tmp_path / name, dtype="bfloat16", max_shard_size=shard)
        main(["calibrate", *calibration(path, tokens, tmp_path / f"stats_{name}")])
        results.append(convert(path, tmp_path / f"stats_{name}", tmp_path / f"dense_{name}"))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_dry_run_tells_the_size_it_will_write(moe: Path, statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["convert", f"source={moe}", f"statistics={statistics}", f"output={tmp_path / 'dense'}", *MERGED]
    main([*arguments, "--dry-run"])
    facts = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "dense").exists()
    main(arguments)
    tensors = load_file(tmp_path / "dense/model.safetensors")
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert facts["writes"][str(tmp_path / "dense")] == 2 * facts["parameters"]


def test_tied_embeddings_stay_tied(tokens: str, tmp_path: Path):
    moe = tiny_qwen3_moe(tmp_path / "moe", tie_word_embeddings=True)
    main(["calibrate", *calibration(moe, tokens, tmp_path / "stats")])
    assert "lm_head.weight" not in convert(moe, tmp_path / "stats", tmp_path / "dense")
    model, info = Qwen3ForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_token_file_of_another_seed_selects_by_its_own_statistics(moe: Path, statistics: Path, tmp_path: Path):
    skewed = write_tokens(tmp_path / "skewed", np.tile(np.arange(4), 160), 256)
    main(["calibrate", *calibration(moe, skewed, tmp_path / "stats")])
    plans = []
    for name, stats in (("a", statistics), ("b", tmp_path / "stats")):
        convert(moe, stats, tmp_path / name, "score.method=sf")
        plans.append(json.loads((tmp_path / name / "plan.json").read_text())["layers"])
    assert plans[0] != plans[1]
