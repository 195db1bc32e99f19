"""The weights of a model by name and shape, of a whole one that Megatron-Core builds on torch's meta device: without memory, process
groups or a GPU, from its config.json alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_moe2dense.families import WeightRule
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.mapping import WeightMapping
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime import Runtime, upstream

_META = Runtime(torch.device("meta"), "gloo", transformer_engine=False)
# Nothing is drawn, and nothing asks for a CUDA stream or for buffers on a CUDA device.
_SHAPES_ALONE = {
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_enable_expert_bias": False,
}


@dataclass(frozen=True)
class Weight:
    """A parameter.

    name: Megatron-Core's. shape: whole. rule: its row of the family's table. expert: the number of the expert that it is of, or 0.
    summed_by_name: one of those whose gradients Megatron-Core adds up over tensor-parallel ranks because of what they are called
    (finalize_model_grads.py).
    """

    name: str
    shape: tuple[int, ...]
    rule: WeightRule
    expert: int
    summed_by_name: bool

    @property
    def is_expert(self) -> bool:
        """Of a routed expert."""
        return "{expert}" in self.rule.megatron

    @property
    def matrix(self) -> int:
        """Elements of a matrix, 0 for a vector: norms, biases, the gate of a shared expert."""
        return math.prod(self.shape) if len(self.shape) > 1 and min(self.shape) > 1 else 0


@dataclass(frozen=True)
class Outline:
    """A model in the order in which Megatron-Core registers its weights. layers: of one decoder layer without experts (False) and of one
    with (True), where it has them; all of a kind are alike. last: what follows the layers."""

    embedding: Weight
    layers: Mapping[bool, tuple[Weight, ...]]
    last: tuple[Weight, ...]


@functools.lru_cache(maxsize=32)
def outline(spec: ModelSpec) -> Outline:
    """Of a model; the same object gives the same outline, built once.

    Raises:
        UserError: Megatron-Core would compute this model otherwise.
    """
    moe = spec.moe_layers
    kinds = sorted({layer in moe for layer in range(spec.dims.layers)})
    pattern = {"moe_layer_freq": [int(kind) for kind in kinds]} if spec.dims.experts else {}
    upstream.latent_attention_without_te()
    with upstream.on_meta():
        fields = {**_SHAPES_ALONE, "num_layers": len(kinds), **pattern}
        (model,) = models.build(dataclasses.replace(spec, in_fp8=False), Groups.alone(), _META, PipelineLayout((len(kinds),), 1), **fields)
    embedding, *weights = _weights(model, spec)
    layers = {kind: tuple(each for each in weights if f".layers.{place}." in each.name) for place, kind in enumerate(kinds)}
    return Outline(embedding, layers, tuple(each for each in weights if ".layers." not in each.name))


def _weights(model: models.HeadlessGPT, spec: ModelSpec) -> Iterator[Weight]:
    mapping = WeightMapping(spec)
    for name, parameter in model.named_parameters():
        rule, numbers = mapping.rule(name)
        by_name = model.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        yield Weight(name, tuple(parameter.shape), rule, numbers.get("expert", 0), by_name)


@functools.lru_cache(maxsize=32)
def count_parameters(spec: ModelSpec, active: int | None = None) -> tuple[int, int]:
    """Parameters of the whole model and those active per token, in matrices (vectors and padding are left out).

    Args:
        active: experts per token, when it is not the model's own number.
    """
    dims, found = spec.dims, outline(spec)
    count = {True: len(spec.moe_layers), False: dims.layers - len(spec.moe_layers)}
    rest = dims.vocab_size * dims.hidden_size * (1 if dims.tied_embeddings else 2)
    of_one_expert = 0
    for kind, layer in found.layers.items():
        rest += count[kind] * sum(weight.matrix for weight in layer if not weight.is_expert)
        of_one_expert += count[kind] * sum(weight.matrix for weight in layer if weight.is_expert and weight.expert == 0)
    return rest + dims.experts * of_one_expert, rest + (dims.active if active is None else active) * of_one_expert
