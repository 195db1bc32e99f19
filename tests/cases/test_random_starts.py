"""Random weights do not depend on where they are drawn. Two ranks would hide it: of their layers or experts none is in the middle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_moe2dense.families.account import Account
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import runtime, weights
from megatron_moe2dense.trainer.config import ParallelConfig
from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny
from tests.trainer.starts import begun, start

# Sizes that three and four ranks of every axis divide; a vocabulary that is padded.
DIVISIBLE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 8,
    "intermediate_size": 48,
}
MOE = {
    "qwen3_moe": {**DIVISIBLE, "num_experts": 12, "moe_intermediate_size": 24},
    "gpt_oss": {**DIVISIBLE, "num_local_experts": 12, "intermediate_size": 24},
}
LAYOUTS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    3: [
        ("qwen3_moe", {"tensor": 3}),
        ("qwen3_moe", {"pipeline": 3}),
        ("qwen3_moe", {"pipeline": 3, "virtual_pipeline": 2}),
        ("qwen3_moe", {"expert": 3}),
        ("qwen3_moe", {"context": 3}),
        ("gpt_oss", {"expert": 3}),
    ],
    4: [
        ("qwen3_moe", {"tensor": 4}),
        ("qwen3_moe", {"pipeline": 4}),
        ("qwen3_moe", {"pipeline": 2, "expert": 2}),
        ("qwen3_moe", {"tensor": 2, "expert": 4}),
        ("gpt_oss", {"expert": 4}),
        ("gpt_oss", {"pipeline": 4}),
    ],
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family the weights of its directory, and those that a single process draws for it."""
    root = tmp_path_factory.mktemp("drawn")
    for family, sizes in MOE.items():
        directory = tiny(family, root / family, **sizes)
        for how in ("random", "random_ffn"):
            (root / f"{family} {how}").mkdir()
            save_file(begun(directory, how), root / f"{family} {how}" / "model.safetensors")
            (root / f"{family} {how}" / "config.json").write_bytes((directory / "config.json").read_bytes())
    return root


def test_a_random_model_is_drawn(drawn: Path):
    """`initialize=random`: no two layers, experts or projections begin alike."""
    for family in MOE:
        by_size: dict[int, list[torch.Tensor]] = {}
        for tensor in load_file(drawn / f"{family} random" / "model.safetensors").values():
            for part in tensor if tensor.dim() == 3 else [tensor]:
                if part.dim() == 2 and part.any():  # biases of experts are zero
                    by_size.setdefault(part.numel(), []).append(part.flatten())
        assert max(map(len, by_size.values())) >= 12 * 12
        for size, matrices in by_size.items():
            correlation = torch.atleast_2d(torch.corrcoef(torch.stack(matrices))) - torch.eye(len(matrices))
            assert correlation.abs().max() < 7 * size**-0.5


@pytest.mark.distributed
@pytest.mark.parametrize("processes", LAYOUTS)
def test_a_random_start_in_another_layout(processes: int, drawn: Path):
    """`initialize=random` or `random_ffn` in another parallel layout: the same bytes, drawn from the seed and the name of each weight."""
    found = launch(processes, "tests.cases.test_random_starts:differences", str(drawn), LAYOUTS[processes])
    assert found == {f"{family} {layout} {how}": [] for family, layout in LAYOUTS[processes] for how in ("random", "random_ffn")}


def differences(root: str, cases: list[tuple[str, dict[str, Any]]]) -> dict[str, list[str]]:
    """On every rank of each layout: the parameters that differ from those of a single process."""
    found = {}
    for family, layout in cases:
        parallel = ParallelConfig(**layout)
        with runtime.session("cpu") as device, process_groups.initialized(parallel, seed=0) as groups:
            for how in ("random", "random_ffn"):
                chunks, spec = start(Path(root) / family, how, (groups, device))
                mine = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
                reference = replace(spec, account=Account.open(Path(root) / f"{family} {how}"))
                weights.load(chunks, reference, groups)
                named = [(name, parameter) for chunk in chunks for name, parameter in chunk.named_parameters()]
                wrong = [name for (name, parameter), own in zip(named, mine, strict=True) if not torch.equal(parameter, own)]
                ranks: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(ranks, wrong)
                found[f"{family} {layout} {how}"] = sorted({name for rank in ranks for name in rank})
    return found
