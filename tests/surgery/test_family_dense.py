"""Every MoE family: inspect, calibrate, convert, and the stock dense class computes our formula, written out here from the stock
MoE's own parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from megatron_moe2dense.cli import main
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.surgery.grouping import groupers
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import Limits, windows
from tests.helpers.tiny_models import as_mxfp4, tiny, write_tokens
from tests.surgery.conftest import SEQUENCE, calibration

pytestmark = pytest.mark.slow

MOE = [name for name, spec in FAMILIES.items() if spec.router]
SIBLING = {"qwen3_moe": "qwen3", "mixtral": "mistral", "qwen2_moe": "qwen2"}  # the others become their own class without experts
MERGED = ("keep=5", "groups=3", "group.method=round_robin", "scale.method=proportional")
ASSETS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
TEXT = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(3))


def dense_of(moe: Path, tokens: str, folder: Path, *options: str) -> Path:
    """calibrate (once) and convert."""
    if not (folder / "stats").exists():
        main(["calibrate", *calibration(moe, tokens, folder / "stats")])
    main(["convert", f"source={moe}", f"statistics={folder / 'stats'}", f"output={folder / 'dense'}", *options])
    return folder / "dense"


def load_cleanly(path: Path, family: str) -> PreTrainedModel:
    """The stock class of the dense family, by its own name, with every key in its place."""
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[SIBLING.get(family, family)]]
    model, info = stock.from_pretrained(path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert type(AutoModelForCausalLM.from_pretrained(path)) is stock
    return model


def expert_output(block: Any, experts: list[int], weights: list[float], x: torch.Tensor) -> torch.Tensor:
    """f(x) of the weighted mean of these experts, float64, from the parameters as the stock class holds them."""
    w_K = torch.tensor(weights, dtype=torch.float64)
    p = {name: torch.einsum("k,k...->...", w_K, t[experts].double()) for name, t in block.experts.named_parameters()}
    if "down_proj_bias" in p:  # GPT-OSS
        gate_up = x @ p["gate_up_proj"] + p["gate_up_proj_bias"]
        limit = block.experts.limit
        gate, up = gate_up[:, 0::2].clamp(max=limit), gate_up[:, 1::2].clamp(-limit, limit)
        return (gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)) @ p["down_proj"] + p["down_proj_bias"]
    gate, up = (x @ p["gate_up_proj"].T).chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up) @ p["down_proj"].T


def expected_output(block: Any, layer: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """sum_g alpha_g f_g(x) + alpha s(x) by the plan, float64."""
    total = torch.zeros_like(x)
    for group, scale in enumerate(layer["scales"]):
        members = [i for i, of in enumerate(layer["group_of"]) if of == group]
        experts, weights = [layer["experts"][i] for i in members], [layer["merge_weights"][i] for i in members]
        total += scale * expert_output(block, experts, weights, x)
    shared = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
    if shared is not None:
        gate, up, down = (getattr(shared, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
        total += layer["shared_scale"] * ((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return total


@pytest.mark.parametrize("family", MOE)
@torch.no_grad()
def test_the_stock_dense_class_computes_our_formula_pruned_and_with_every_grouping(family: str, tokens: str, tmp_path: Path):
    path = tiny(family, tmp_path / "moe")
    moe = AutoModelForCausalLM.from_pretrained(path)
    merged = [(*MERGED, f"group.method={name}") for name in groupers]
    for options in [(), *merged]:
        dense = load_cleanly(dense_of(path, tokens, tmp_path, *options, "overwrite=true"), family)
        compare(moe, dense, json.loads((tmp_path / "dense/plan.json").read_text())["layers"])
        assert torch.isfinite(dense(TEXT, labels=TEXT).loss.exp())


def compare(moe: Any, dense: Any, layers: list[dict[str, Any]]) -> None:
    """Every FFN of the dense model against the formula, on random input."""
    plans = {layer["layer"]: layer for layer in layers}
    assert len(plans) == 4 - bool(getattr(moe.config, "first_k_dense_replace", 0))
    x_BSD = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    for number, layer in enumerate(moe.model.layers):
        found = dense.model.layers[number].mlp(x_BSD)
        found = found[0] if isinstance(found, tuple) else found
        expected = layer.mlp(x_BSD)  # of a dense layer: its own, padded with neurons that add nothing
        if number in plans:
            expected = expected_output(layer.mlp, plans[number], x_BSD[0].double())[None].float()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MOE)
@torch.no_grad()
def test_inspect_calibrate_convert_and_load(family: str, tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Sharded and tied, bfloat16; the test above has single files and untied ones."""
    path = tiny(family, tmp_path / "moe", dtype="bfloat16", tie_word_embeddings=True, max_shard_size="100KB")
    for name in ASSETS:
        (path / name).write_text(f'{{"name": "{name}"}}\n')
    main(["inspect", str(path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    stock = AutoModelForCausalLM.from_pretrained(path)
    assert facts["family"] == family
    assert facts["parameters"]["total"] == stock.num_parameters()
    assert facts["parameters"]["shared experts"] == sum(p.numel() for name, p in stock.named_parameters() if "shared_expert" in name)
    dense = load_cleanly(dense_of(path, tokens, tmp_path), family)
    assert dense.num_parameters() == facts["dense"]["parameters"]
    assert dense.config.intermediate_size == facts["dense"]["intermediate_size"]
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert dense.dtype == torch.bfloat16
    for name in ASSETS:
        assert (tmp_path / "dense" / name).read_bytes() == (path / name).read_bytes()
    nats = dense(TEXT, labels=TEXT).loss
    assert torch.isfinite(nats.exp())
    assert nats < 12
    capsys.readouterr()
    main(["inspect", str(tmp_path / "dense"), "--json"])
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == dense.num_parameters()


@pytest.mark.parametrize("family", MOE)
def test_what_is_no_ffn_is_copied_bit_for_bit(family: str, tokens: str, tmp_path: Path):
    path = tiny(family, tmp_path / "moe", dtype="bfloat16")
    source = load_file(path / "model.safetensors")
    dense = load_file(dense_of(path, tokens, tmp_path) / "model.safetensors")
    outside = {name for name in source if ".mlp." not in name and ".block_sparse_moe." not in name}
    assert {name for name in dense if ".mlp." not in name} == outside
    for name in outside:
        assert dense[name].view(torch.int16).equal(source[name].view(torch.int16))


@torch.no_grad()
def constant_routing(family: str, directory: Path, kept: dict[int, list[int]], config: dict[str, Any]) -> Path:
    """A MoE whose routers give every token the experts `kept[layer]` with equal gates: channel 0 of the residual stream is a constant
    that nothing changes, and the routers look at it alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny(family, directory, **config))
    model.model.embed_tokens.weight[:, 0] = 5.0
    for number, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.weight[0] = 1.0
        for name, parameter in layer.named_parameters():
            if name.endswith(("o_proj.weight", "o_proj.bias", "mlp.down_proj.weight")) or ("shared_expert" in name and "down_proj" in name):
                parameter[0] = 0  # nothing writes to channel 0
            elif name.endswith(("experts.down_proj", "experts.down_proj_bias")):
                channel_last = parameter.ndim == 2 or family == "gpt_oss"
                (parameter[..., 0] if channel_last else parameter[:, 0]).zero_()
            elif name.endswith("shared_expert_gate.weight"):
                parameter.zero_()  # a gate of 1/2
        router = getattr(layer.mlp, "gate", getattr(layer.mlp, "router", None))
        if router is not None:
            router.weight.zero_()
            router.weight[:, 0] = -60.0
            router.weight[kept[number], 0] = 60.0
            if hasattr(router, "bias"):
                router.bias.zero_()
    model.save_pretrained(directory)
    return directory


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in MOE),
    ("deepseek_v2", {"q_lora_rank": 24, "first_k_dense_replace": 2, "intermediate_size": 80}),
    ("mixtral", {"sliding_window": 6, "head_dim": 8}),
    ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": [2]}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}),
]


@pytest.mark.parametrize(("family", "config"), VARIANTS, ids=[f"{family}-{'-'.join(config) or 'plain'}" for family, config in VARIANTS])
@torch.no_grad()
def test_where_all_tokens_use_the_kept_experts_equally_the_dense_model_is_the_moe(
    family: str, config: dict[str, Any], tokens: str, tmp_path: Path
):
    kept = {0: [1, 6], 1: [0, 3], 2: [5, 7], 3: [2, 4]}
    moe = constant_routing(family, tmp_path / "moe", kept, config)
    dense = dense_of(moe, tokens, tmp_path)
    load_cleanly(dense, family)
    plan = json.loads((dense / "plan.json").read_text())
    assert [sorted(layer["experts"]) for layer in plan["layers"]] == [kept[layer["layer"]] for layer in plan["layers"]]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path)(TEXT).logits for path in (dense, moe))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_the_factor_of_a_gated_shared_expert_is_the_least_squares_one(tokens: str, tmp_path: Path):
    path = tiny("qwen2_moe", tmp_path / "moe")
    plan = json.loads((dense_of(path, tokens, tmp_path) / "plan.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    tokens_BS = torch.from_numpy(windows(TokensConfig(path=tokens, sequence_length=SEQUENCE), Limits(256)))
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda _m, inputs, _o, number=number: seen.update({number: inputs[0].flatten(0, 1)}))
    model(tokens_BS)
    for layer in plan["layers"]:
        block, x = model.model.layers[layer["layer"]].mlp, seen[layer["layer"]]
        shared = block.shared_expert(x)
        gated = torch.sigmoid(block.shared_expert_gate(x)) * shared
        solution = torch.linalg.lstsq(shared.flatten()[:, None], gated.flatten()[:, None]).solution.item()
        assert layer["shared_scale"] == pytest.approx(solution, rel=1e-5)
        assert 0.4 < solution < 0.6


def test_mxfp4_and_its_values_give_the_same_dense_weights(tokens: str, tmp_path: Path):
    plain, packed = as_mxfp4(tiny("gpt_oss", tmp_path / "plain", dtype="bfloat16", intermediate_size=64), tmp_path / "packed")
    results = []
    for name, path in (("of_plain", plain), ("of_packed", packed)):
        (tmp_path / name).mkdir()
        dense_of(path, tokens, tmp_path / name, *MERGED)
        load_cleanly(tmp_path / name / "dense", "gpt_oss")
        results.append(load_file(tmp_path / name / "dense/model.safetensors"))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert "quantization_config" not in json.loads((tmp_path / "of_packed/dense/config.json").read_text())


def test_layers_of_multi_token_prediction_are_left_out(tokens: str, tmp_path: Path):
    path = tiny("deepseek_v3", tmp_path / "moe")
    tensors = load_file(path / "model.safetensors")
    extra = {name.replace("layers.3.", "layers.4."): tensor.clone() for name, tensor in tensors.items() if "layers.3." in name}
    save_file({**tensors, **extra, "model.layers.4.eh_proj.weight": torch.ones(64, 128)}, path / "model.safetensors", {"format": "pt"})
    dense = dense_of(path, tokens, tmp_path)
    assert not [name for name in load_file(dense / "model.safetensors") if "layers.4." in name]
    assert load_cleanly(dense, "deepseek_v3").config.num_nextn_predict_layers == 0


def test_a_model_without_a_moe_layer_and_a_quantised_one_are_refused(tmp_path: Path, user_error: Any):
    tokens = write_tokens(tmp_path / "text", 100)
    dense = tiny("deepseek_v2", tmp_path / "dense", first_k_dense_replace=4)
    assert "has no layer of experts" in user_error("calibrate", *calibration(dense, tokens, tmp_path / "stats"))
    path = tiny("deepseek_v3", tmp_path / "moe")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path / "model.safetensors", {"format": "pt"})
    assert "is quantised (F8_E4M3)" in user_error("inspect", str(path))
    config = json.loads((tiny("deepseek_v2", tmp_path / "other") / "config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "topk_method": "noaux_tc"}))
    assert "noaux_tc" in user_error("inspect", str(tmp_path / "other"))


def test_inspect_counts_the_values_of_mxfp4_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain, packed = as_mxfp4(tiny("gpt_oss", tmp_path / "plain", dtype="bfloat16", intermediate_size=64), tmp_path / "packed")
    facts = []
    for path in (plain, packed):
        main(["inspect", str(path), "--json"])
        facts.append(json.loads(capsys.readouterr().out))
    for name in ("parameters", "active_parameters", "dense"):
        assert facts[0][name] == facts[1][name]
    assert facts[0]["parameters"]["experts"] == 4 * 8 * (3 * 64 * 64 + 2 * 64 + 64)
    # Half a byte a value and one byte for 32 of them, where bfloat16 has two bytes a value.
    assert facts[0]["bytes"]["experts"] - facts[1]["bytes"]["experts"] == 4 * 8 * 3 * 64 * 64 * 3 // 2 - 4 * 8 * 3 * 64 * 2


def test_an_mxfp4_exponent_of_nan_is_refused(tokens: str, tmp_path: Path, user_error: Any, monkeypatch: pytest.MonkeyPatch):
    """In any expert, whether it is kept or not."""
    _, packed = as_mxfp4(tiny("gpt_oss", tmp_path / "plain", dtype="bfloat16"), tmp_path / "packed")
    main(["calibrate", *calibration(packed, tokens, tmp_path / "stats")])
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    # The fingerprint samples large files; a tiny one it sees whole, so take it out of the way.
    monkeypatch.setattr("megatron_moe2dense.surgery.convert.require_same_source", lambda *_: None)
    for expert in range(8):
        damaged = tensors[name].clone()
        damaged[expert, 3, 0] = 255
        save_file({**tensors, name: damaged}, packed / "model.safetensors", {"format": "pt"})
        settings = [f"source={packed}", f"statistics={tmp_path / 'stats'}", f"output={tmp_path / 'dense'}"]
        message = user_error("convert", *settings, "overwrite=true")  # of what the last of these sources left
        assert "1 MXFP4 exponents of 255" in message
        assert name.removesuffix("_scales") in message
        assert not (tmp_path / "dense").exists()


def test_the_dry_run_of_a_family_with_a_gated_shared_expert_tells_the_bytes(
    tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = calibration(tiny("qwen2_moe", tmp_path / "moe"), tokens, tmp_path / "stats")
    main(["calibrate", *arguments, "--dry-run"])
    facts = json.loads(capsys.readouterr().out)
    main(["calibrate", *arguments])
    sums = load_file(tmp_path / "stats/stats.safetensors")
    assert facts["writes"][str(tmp_path / "stats")] == sum(tensor.nbytes for tensor in sums.values())
