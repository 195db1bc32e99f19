"""What the tests run in several processes at once (tests/helpers/forks.py: launch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_moe2dense.cli import main
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.surgery.hidden import HiddenPlace, HiddenStates
from megatron_moe2dense.surgery.refit.layer import LayerFit
from megatron_moe2dense.surgery.refit.reconstruct import LayerText
from megatron_moe2dense.surgery.resume import Resume

PRUNED = "target={hidden_size: 48, num_hidden_layers: 3, num_attention_heads: 2, intermediate_size: 96}"
SELECTED = "select={method: ols, prefilter: 2}"


class InterruptedRunError(Exception):
    """What ends a run in the middle, on every rank."""


def calibrate_on_two_ranks(arguments: list[str], folder: str) -> list[str]:
    """Calibrate straight, spilling, interrupted and resumed; more ranks than batches; select; prune. The refusals of all ranks."""
    main(["calibrate", *arguments, f"output={folder}/straight"])
    main(["calibrate", *arguments, f"output={folder}/spilled", "memory_budget=1"])
    with pytest.MonkeyPatch.context() as patch:
        finish_layer = Resume.finish_layer

        def interrupted(self: Resume, layer: int, *rest: object) -> None:
            finish_layer(self, layer, *rest)  # type: ignore[arg-type]
            if layer == 1:
                raise InterruptedRunError

        patch.setattr(Resume, "finish_layer", interrupted)
        with pytest.raises(InterruptedRunError):
            main(["calibrate", *arguments, f"output={folder}/resumed"])
    assert not Path(folder, "resumed").exists()
    main(["calibrate", *arguments, f"output={folder}/resumed"])
    main(["select", *arguments, f"statistics={folder}/one", f"output={folder}/selected", SELECTED])
    main(["prune-dense", *arguments, f"source={folder}/dense", f"output={folder}/pruned", PRUNED])
    messages = [refusal([*arguments, f"output={folder}/straight"]), refusal([*arguments, f"output={folder}/x", "batch_tokens=100000"])]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, messages)
    return [message for messages in everyone for message in messages]


def convert_on_two_ranks(arguments: list[str], folder: str) -> None:
    """Refit in both modes."""
    for mode in ("parallel", "sequential"):
        main(["convert", *arguments, f"refit.mode={mode}", f"output={folder}/{mode} by two"])


def refusal(arguments: list[str]) -> str:
    """The message of the UserError that a calibration must end in."""
    from megatron_moe2dense.common.config import load
    from megatron_moe2dense.surgery.calibrate import run
    from megatron_moe2dense.surgery.config import CalibrateConfig

    with pytest.raises(UserError) as caught:
        run(load(CalibrateConfig, None, arguments))
    return str(caught.value)


def reconstruct_half() -> list[tuple[dict[str, torch.Tensor], float | None]]:
    """Every rank's result of the reconstruction of test_reconstruct.py with its half of the windows."""
    from megatron_moe2dense.surgery.config import ReconstructConfig
    from tests.surgery import test_reconstruct as test

    whole, ranks = test.layer_text(), Ranks(dist.get_rank(), dist.get_world_size())
    half = slice(ranks.rank * 10, ranks.rank * 10 + 10)
    own = [HiddenStates((10, test.LENGTH, test.HIDDEN), torch.float32, 10, HiddenPlace()) for _ in range(2)]
    text = LayerText(own[0], own[1], whole.held_out_N[half])
    text.put(0, torch.cat(list(whole.inputs))[half], torch.cat(list(whole.targets))[half])
    text.complete()
    settings = ReconstructConfig(epochs=4, lr=1e-2, batch_tokens=test.WINDOWS * test.LENGTH)
    fit = LayerFit({"down_DF": test.ffn_of(test.mlp(seed=3)).down_DF}, test.REPORT)
    found = test.reconstruction(settings, ranks=ranks).train(fit, text, seed=0)
    assert found is not None
    everyone: list[Any] = [None] * ranks.world
    dist.all_gather_object(everyone, (found.tensors, found.report.reconstructed))
    return everyone
