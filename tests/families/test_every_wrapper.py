"""Every model of transformers for text and images (and sound) whose language model has experts: its dense result keeps what is around the
language model, or is the language model alone; judged by the stock classes. The language models themselves: test_every_conversion.py.

One type alone: -k "[gemma4]".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.cli import main
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.surgery.seam import MoeWatcher
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stream import Compute, StreamedModel
from tests.families.conversions import Loaded, constant_routing, hidden_states, load, opened_once, require_close, run
from tests.families.every import tiny_checkpoint, wrapper_types
from tests.helpers.tiny_models import write_tokens

pytestmark = pytest.mark.slow

WINDOWS = np.random.default_rng(0).integers(0, 128, (6, 16))
REFUSED = {
    "ernie4_5_vl_moe": "it has experts for text and experts for images",
    "inkling_mm_model": "its shared experts are weighed together with the routed ones",
    "muse_spark": "its experts are no plain FFNs: they hold model.language_model.layers.0.mlp.experts.post_expert_norm.weight",
}
CONVERTED = [model_type for model_type in wrapper_types() if model_type not in REFUSED]
IMAGES, TOKENS = "preprocessor_config.json", "tiktoken.model"
# Transformers 5.23 has no causal language model class for what stands in these.
NOT_ALONE = {"deepseek_ocr2", "glm4v_moe", "glm5_next", "mistral_large4", "step3p7", "unlimited_ocr"}


class Wrapped:
    """One tiny checkpoint, its dense result, and that of its language model alone."""

    def __init__(self, model_type: str, folder: Path, text: Path):
        self.model_type, self.source, self.dense, self.alone = model_type, folder / "moe", folder / "dense", folder / "alone"
        tiny_checkpoint(self.source, model_type)
        for name in (IMAGES, TOKENS):
            (self.source / name).write_text("{}")
        statistics = folder / "statistics"
        run(["calibrate", f"source={self.source}", f"output={statistics}", f"data.path={text}", "data.sequence_length=16"])
        self._convert = ["convert", f"source={self.source}", f"statistics={statistics}", "scale.method=proportional"]
        run([*self._convert, f"output={self.dense}"])

    def convert_alone(self) -> None:
        main([*self._convert, f"output={self.alone}", "text_only=true"])

    @cached_property
    def stock(self) -> PreTrainedModel:
        return load(self.source)[0]

    @cached_property
    def loaded(self) -> Loaded:
        """The dense result."""
        return load(self.dense)

    @property
    def plan(self) -> dict[str, Any]:
        return json.loads((self.dense / "plan.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_tokens(tmp_path_factory.mktemp("text") / "tokens", WINDOWS.flatten(), vocab=128))


@pytest.fixture(scope="module", params=CONVERTED)
def made(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wrapped]:
    with opened_once():
        yield Wrapped(request.param, tmp_path_factory.mktemp(request.param), text)


@torch.no_grad()
def test_the_dense_result_is_the_model_with_constant_routing(made: Wrapped):
    """In the class that config.json names, which takes every tensor; hidden states of the language model are streamed on the way."""
    stock, (dense, faults) = made.stock, made.loaded
    assert not faults
    tokens = torch.from_numpy(WINDOWS[:2])
    source = MoeSource.open(str(made.source))
    with CheckpointReader(source.index) as reader:
        streamed = StreamedModel(source, reader, Compute(torch.device("cpu"), torch.float32, 2))
        found = [torch.cat(list(hidden)) for hidden in streamed.run(WINDOWS[:2], MoeWatcher())]
    for layer, (ours, theirs) in enumerate(zip(found, hidden_states(stock, tokens), strict=True)):
        require_close(ours, theirs, layer)
    with constant_routing(stock, made.plan, dense):
        expected = stock(input_ids=tokens, use_cache=False).logits
    require_close(dense(input_ids=tokens, use_cache=False).logits, expected, "logits")


def test_what_is_around_the_language_model_is_carried_over_bit_for_bit(made: Wrapped):
    before, after = made.stock.state_dict(), made.loaded[0].state_dict()
    around = {name for name in before if "language_model." not in name and "lm_head" not in name}
    assert around, "there are towers"
    assert around == {name for name in after if "language_model." not in name and "lm_head" not in name}
    assert [name for name in around if not torch.equal(before[name], after[name])] == []
    assert (made.dense / IMAGES).exists()
    assert (made.dense / TOKENS).exists()
    tokens = [getattr(AutoConfig.from_pretrained(directory), "image_token_id", None) for directory in (made.source, made.dense)]
    assert tokens[0] == tokens[1]


@torch.no_grad()
def test_the_language_model_alone_computes_the_same(made: Wrapped, capsys: pytest.CaptureFixture[str]):
    if made.model_type in NOT_ALONE:
        with pytest.raises(SystemExit):
            made.convert_alone()
        assert "transformers has no class for it alone" in capsys.readouterr().err
        return
    made.convert_alone()
    alone, faults = load(made.alone)
    assert not faults
    assert type(alone).__name__.endswith("ForCausalLM")
    assert (made.alone / TOKENS).exists()
    assert not (made.alone / IMAGES).exists()
    tokens, whole = torch.from_numpy(WINDOWS[:2]), made.loaded[0]
    require_close(alone(input_ids=tokens, use_cache=False).logits, whole(input_ids=tokens, use_cache=False).logits, "logits")


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_type_is_named_with_the_reason(model_type: str, tmp_path: Path):
    with pytest.raises(UserError) as refused:
        MoeSource.open(tiny_checkpoint(tmp_path / "moe", model_type))
    assert REFUSED[model_type] in refused.value.found
