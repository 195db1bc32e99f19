"""Every mixture-of-experts type that transformers has, from a tiny checkpoint to a dense one, judged by its stock class.

One type alone: -k "[mixtral]". Without the slower half of the laws: -k "not layout_in_memory and not float64".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.cli import main
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.evals.perplexity import Loaded, measure
from megatron_moe2dense.families.table import EXCEPTIONS, FamilyException
from megatron_moe2dense.surgery.seam import MoeWatcher
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stats import CalibratedStats
from megatron_moe2dense.surgery.stream import Compute, StreamedModel
from tests.families.conversions import (
    BEHIND,
    SCORES,
    Conversion,
    constant_routing,
    convert,
    hidden_states,
    load,
    opened_once,
    reference_statistics,
    require_close,
)
from tests.families.every import as_in_memory, moe_types, tiny_checkpoint, tiny_config, tiny_model
from tests.helpers.tiny_models import write_tokens

pytestmark = pytest.mark.slow

# A gated delta rule multiplies the rounding of float32 by some hundred: these types are calibrated in float64.
IN_FLOAT64 = ("qwen3_5_moe_text", "qwen3_next")
# Its router computes in float32 whatever type its weights have, so the stock model runs in no other.
IN_FLOAT32 = ("inkling2_text",)
WINDOWS = np.random.default_rng(0).integers(0, 128, (10, 16))
REFUSED = {name: EXCEPTIONS[name].refused for name in moe_types() if name in EXCEPTIONS and EXCEPTIONS[name].refused}
CONVERTED = [model_type for model_type in moe_types() if model_type not in REFUSED]
# Forms of a type that a config key switches on, with another dense form: of the same name before the colon.
VARIANTS: dict[str, dict[str, Any]] = {"nemotron_h:moe_latent_size": {"moe_latent_size": 32}}
# Types that no transformers has: Qwen3-MoE under names of its own, one with a line in the table of exceptions, one without.
ADDED: dict[str, FamilyException | None] = {"added_with_a_line": FamilyException(sibling="qwen3"), "added_without": None}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """No warnings and no bars of transformers while models are loaded."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    prefix = write_tokens(tmp_path_factory.mktemp("text") / "tokens", WINDOWS.flatten(), vocab=128)
    return [f"data.path={prefix}", "data.sequence_length=16", "batch_tokens=64"]  # batches of 4, 4 and 2 windows


@pytest.fixture(scope="module", params=[*CONVERTED, *VARIANTS, *ADDED])
def made(request: pytest.FixtureRequest, text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversion]:
    model_type, folder = request.param.partition(":")[0], tmp_path_factory.mktemp(request.param.replace(":", "-"))
    with opened_once(), pytest.MonkeyPatch.context() as patch:
        if model_type in ADDED:
            _register(model_type, folder / "moe")
            if (line := ADDED[model_type]) is not None:
                patch.setitem(EXCEPTIONS, model_type, line)
        else:
            tiny_checkpoint(folder / "moe", model_type, **VARIANTS.get(request.param, {}))
        yield convert(model_type, folder / "moe", [*text, f"dtype={'float64' if model_type in IN_FLOAT64 else 'float32'}"])


def _register(name: str, folder: Path) -> None:
    """A new type as any package may add one, and a checkpoint of it."""
    config_class: Any = type("AddedConfig", (Qwen3MoeConfig,), {"model_type": name})
    model_class: Any = type("AddedForCausalLM", (Qwen3MoeForCausalLM,), {"config_class": config_class})
    AutoConfig.register(name, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    config = tiny_config("qwen3_moe").to_dict()
    model = model_class(config_class(**{key: value for key, value in config.items() if key != "model_type"}))
    model.load_state_dict(tiny_model("qwen3_moe").state_dict())
    model.save_pretrained(folder)


def test_at_least_fifty_types_are_converted():
    assert len(CONVERTED) >= 50
    assert {*REFUSED, *SCORES, *BEHIND, *IN_FLOAT32, *IN_FLOAT64} <= set(moe_types())


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_type_is_named_with_the_reason(model_type: str, tmp_path: Path):
    with pytest.raises(UserError) as refused:
        MoeSource.open(tiny_checkpoint(tmp_path / "moe", model_type))
    assert refused.value.found == f"{model_type}: {REFUSED[model_type]}"


def test_streamed_hidden_states_are_those_of_the_stock_model(made: Conversion):
    expected = hidden_states(made.stock, torch.from_numpy(WINDOWS))
    source = MoeSource.open(str(made.source))
    with CheckpointReader(source.index) as reader:
        streamed = StreamedModel(source, reader, Compute(torch.device("cpu"), torch.float32, 4))
        found = [torch.cat(list(hidden)) for hidden in streamed.run(WINDOWS, MoeWatcher())]
    for layer, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        require_close(ours, theirs, layer)


def test_statistics_are_those_of_the_stock_model_in_float64(made: Conversion):
    model = deepcopy(made.stock) if made.model_type in IN_FLOAT32 else deepcopy(made.stock).double()
    expected = reference_statistics(model, made.model_type, torch.from_numpy(WINDOWS))
    found = CalibratedStats.open(made.statistics).layers
    assert found.keys() == expected.keys()
    for layer, sums in expected.items():
        assert found[layer].sums.keys() == sums.keys()
        for name, value in sums.items():
            require_close(found[layer][name], value, (layer, name))


def test_the_stock_class_takes_exactly_the_dense_checkpoint(made: Conversion):
    for directory, (model, faults) in made.loaded.items():
        assert not faults, directory.name
        assert json.loads((directory / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_inspect_foretells_the_dense_checkpoint(made: Conversion):
    tensors = load_file(made.dense / "model.safetensors")
    config = json.loads((made.dense / "config.json").read_text())
    foretold = made.inspected["dense"]
    assert made.inspected["family"] == made.model_type
    assert foretold["family"] == config["model_type"]
    assert foretold["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert foretold["bytes"] == sum(tensor.nbytes for tensor in tensors.values())


@torch.no_grad()
def test_with_constant_routing_the_moe_is_the_dense_model(made: Conversion):
    tokens, (dense, _) = torch.from_numpy(WINDOWS[:2]), made.loaded[made.dense]
    plan = json.loads((made.dense / "plan.json").read_text())
    with constant_routing(made.stock, plan, dense):
        expected = made.stock(input_ids=tokens, use_cache=False).logits
    require_close(dense(input_ids=tokens, use_cache=False).logits, expected, "logits")


def test_perplexity_is_finite(made: Conversion):
    for directory, (model, _) in made.loaded.items():
        assert math.isfinite(measure(Loaded(directory.name, model), WINDOWS, 4).perplexity)


@pytest.mark.parametrize("made", [*CONVERTED, *VARIANTS], indirect=True)
def test_the_layout_in_memory_gives_the_same_tensors(made: Conversion, tmp_path: Path):
    other = MoeSource.open(str(as_in_memory(made.source, tmp_path / "moe")))
    plan = json.loads((made.dense / "plan.json").read_text())
    plan["source"]["fingerprint"] = other.fingerprint  # the only thing that a plan knows of the files
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    main(["convert", f"source={other.index.directory}", f"plan={tmp_path}/plan.json", f"output={tmp_path}/dense"])
    expected, found = made.loaded[made.dense][0].state_dict(), load(tmp_path / "dense")[0].state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not tensor.equal(found[name])] == []


@pytest.mark.parametrize("made", ADDED, indirect=True)
def test_a_type_is_added_by_one_line_or_by_none(made: Conversion):
    becomes = json.loads((made.dense / "config.json").read_text())["model_type"]
    assert becomes == ("qwen3" if ADDED[made.model_type] else made.model_type)


def test_a_type_without_an_exact_form_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _register("added_without_form", tmp_path / "moe")
    monkeypatch.setitem(EXCEPTIONS, "added_without_form", FamilyException(sibling="llama"))  # which has no norms of queries and keys
    with pytest.raises(UserError) as refused:
        _ = MoeSource.open(tmp_path / "moe").form
    assert refused.value.found == "added_without_form: llama: no model.layers.0.self_attn.q_norm.weight"


def test_a_block_that_does_not_run_with_so_few_experts_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_checkpoint(tmp_path / "moe", "axk1")
    monkeypatch.setitem(EXCEPTIONS, "axk1", FamilyException(experts=1))  # fewer than its router looks at in a group
    with pytest.raises(UserError) as refused:
        _ = MoeSource.open(tmp_path / "moe").form
    assert refused.value.found == "axk1: itself, one expert: selected index k out of range"
