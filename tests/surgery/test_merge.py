"""Merging the experts of a group, with and without alignment of their neurons (docs/method.md#groups-merging-scaling)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.cli import main
from megatron_moe2dense.families.ffn import Ffn
from megatron_moe2dense.surgery.align import aligned, matching, reorder
from megatron_moe2dense.surgery.densify import densify
from megatron_moe2dense.surgery.types import LayerPlan

D, WIDTH = 12, 20


def expert(seed: int, dtype: torch.dtype = torch.bfloat16, biases: bool = True) -> Ffn:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ffn = Ffn(random(WIDTH, D), random(WIDTH, D), random(D, WIDTH))
    return replace(ffn, gate_bias_F=random(WIDTH), up_bias_F=random(WIDTH), down_bias_D=random(D)) if biases else ffn


def shuffled(ffn: Ffn, seed: int) -> Ffn:
    return reorder(ffn, torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed)))


def merged(experts: list[Ffn], weights: tuple[float, ...], align: str, scale: float = 1.0) -> Ffn:
    plan = LayerPlan(0, tuple(range(len(experts))), (0,) * len(experts), weights, (scale,), align=align)  # type: ignore[arg-type]
    return densify(plan, experts.__getitem__)


def same(one: Ffn, other: Ffn) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Ffn)]
    return all((a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1), (1 / 3, 2 / 3)])
def test_an_expert_merged_with_a_permuted_copy_of_itself_comes_back_exactly(weights: tuple, dtype: torch.dtype, biases: bool):
    one = expert(0, dtype, biases)
    assert same(merged([one, shuffled(one, 5)], weights, "hungarian"), one)
    assert not same(merged([one, shuffled(one, 5)], weights, "none"), one)


def test_many_permuted_copies_come_back_scaled_once():
    one = expert(0, torch.float32)
    copies = [one, *(shuffled(one, seed) for seed in range(3))]
    assert same(merged(copies, (0.4, 0.3, 0.2, 0.1), "hungarian", 0.25), merged([one], (1.0,), "none", 0.25))


@pytest.mark.parametrize("align", ["none", "hungarian"])
def test_a_group_of_one_is_copied_bit_for_bit(align: str):
    assert same(merged([expert(3)], (1.0,), align), expert(3))


def test_alignment_does_not_change_what_an_expert_computes():
    x = torch.randn(7, D, dtype=torch.float64)

    def run(ffn: Ffn) -> torch.Tensor:
        hidden = torch.nn.functional.silu(x @ ffn.gate_FD.T + ffn.gate_bias_F) * (x @ ffn.up_FD.T + ffn.up_bias_F)
        return hidden @ ffn.down_DF.T + ffn.down_bias_D

    others = [expert(seed, torch.float64) for seed in range(3)]
    for before, after in zip(others, aligned(others), strict=True):
        torch.testing.assert_close(run(after), run(before), rtol=1e-12, atol=1e-12)
    assert same(aligned(others)[0], others[0])


def test_matching_is_the_best_of_all_permutations_of_normalised_neurons():
    small = [
        Ffn(*(part[:5] for part in (e.gate_FD, e.up_FD)), e.down_DF[:, :5]) for e in (expert(1, biases=False), expert(2, biases=False))
    ]

    def neurons(ffn: Ffn) -> torch.Tensor:
        rows = torch.stack([torch.cat([ffn.gate_FD[i], ffn.up_FD[i], ffn.down_DF[:, i]]) for i in range(5)]).double()
        return rows / rows.norm(dim=1, keepdim=True)

    cosine = neurons(small[0]) @ neurons(small[1]).T
    permutations = torch.cartesian_prod(*[torch.arange(5)] * 5)
    permutations = permutations[[len(set(p.tolist())) == 5 for p in permutations]]
    best = permutations[cosine[torch.arange(5), permutations].sum(1).argmax()]
    assert matching(*small).tolist() == best.tolist()


def test_a_dead_neuron_is_matched_like_any_other():
    one = expert(0, biases=False)
    dead = replace(one, gate_FD=one.gate_FD.clone(), up_FD=one.up_FD.clone(), down_DF=one.down_DF.clone())
    dead.gate_FD[4], dead.up_FD[4], dead.down_DF[:, 4] = 0, 0, 0
    assert same(merged([dead, shuffled(dead, 5)], (0.5, 0.5), "hungarian"), dead)


def test_convert_aligns_where_the_group_block_says_so(moe: Path, statistics: Path, tmp_path: Path, user_error: Callable[..., str]):
    arguments = ["convert", f"source={moe}", f"statistics={statistics}", "keep=5", "groups=2"]
    for align in ("none", "hungarian"):
        main([*arguments, f"output={tmp_path / align}", f"group={{method: anchor, align: {align}}}"])
    main(["convert", f"source={moe}", f"plan={tmp_path / 'hungarian/plan.json'}", f"output={tmp_path / 'again'}"])
    plain, matched, again = (load_file(tmp_path / name / "model.safetensors") for name in ("none", "hungarian", "again"))
    assert all(torch.equal(matched[name], again[name]) for name in matched)
    assert any(not torch.equal(matched[name], plain[name]) for name in matched)
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("none", "hungarian")]
    assert plans[1]["group"] == {"method": "anchor", "align": "hungarian"}
    assert [{**layer, "align": "none"} for layer in plans[1]["layers"]] == plans[0]["layers"]
    hashes = [json.loads((tmp_path / name / "moe2dense.json").read_text())["plan_hash"] for name in ("none", "hungarian", "again")]
    assert hashes[0] != hashes[1] == hashes[2]
    assert "align" in user_error(*arguments, f"output={tmp_path / 'x'}", "group={method: anchor, align: hungary}")
