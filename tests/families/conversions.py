"""One tiny checkpoint on its whole way through the commands, and what the stock model says of it: for test_every_conversion.py.

Nothing here reads how the package describes a family: experts and routers are found in the stock model by the names of their modules.
"""

from __future__ import annotations

import inspect
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call
from torch.nn.functional import softplus
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.cli import main
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.surgery.source import MoeSource
from tests.families.every import experts_modules
from tests.families.every_table import LAYER

EXACT = 1e-5  # of the largest entry: float32 beside float64, or beside another order of float32
Score = Callable[[torch.Tensor], torch.Tensor]
Loaded = tuple[PreTrainedModel, dict[str, Any]]

# What a stock router makes of its first output (the only one, where it has one) before it selects, as read in its file; softmax where
# nothing is said, so that a new type of another kind shows as wrong sums.
SCORES: dict[str, Score] = {
    **dict.fromkeys(
        (
            *("afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text", "exaone_moe"),
            *("flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "hy_v4", "inkling2_text", "kimi_linear", "kolibri1", "laguna"),
            *("lfm2_moe", "llama4_text", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "nemotron_h", "solar_open"),
        ),
        torch.sigmoid,
    ),
    "deepseek_v4": lambda logits: softplus(logits).sqrt(),
    "gemma4_text": lambda probabilities: probabilities,
}

# What a stock block multiplies the weighed sum of its experts by, as read in its file, with the values of tiny_configs.
BEHIND: dict[str, float] = {**dict.fromkeys(("beam", "laguna", "minimax_m3_vl_text"), 1.5), "cohere2_moe": 0.5}


@dataclass(frozen=True)
class Conversion:
    """One checkpoint and what the commands made of it. dense: K = G, the experts of a token; merged: K = 2 G. inspected: of inspect."""

    model_type: str
    source: Path
    inspected: dict[str, Any]

    @property
    def statistics(self) -> Path:
        return self.source.parent / "statistics"

    @property
    def dense(self) -> Path:
        return self.source.parent / "dense"

    @property
    def merged(self) -> Path:
        return self.source.parent / "merged"

    @cached_property
    def stock(self) -> PreTrainedModel:
        return load(self.source)[0]

    @cached_property
    def loaded(self) -> dict[Path, Loaded]:
        """The dense results."""
        return {directory: load(directory) for directory in (self.dense, self.merged)}


@contextmanager
def opened_once() -> Iterator[None]:
    """All commands share what opening a source finds out: half of their time."""
    known: dict[tuple[str, bool, int], MoeSource] = {}
    real_open, real_of = MoeSource.open, MoeSource.of

    def opened(directory: str | Path, text_only: bool = False, pad_to: int = 1) -> MoeSource:
        key = (str(directory), text_only, pad_to)
        return known[key] if key in known else real_open(directory, text_only, pad_to)

    def of(index: CheckpointIndex, stock: Stock, text_only: bool = False, pad_to: int = 1) -> MoeSource:
        key = (str(index.directory), text_only, pad_to)
        if key not in known:
            known[key] = real_of(index, stock, text_only, pad_to)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoeSource, "open", opened)
        patch.setattr(MoeSource, "of", of)
        yield


def run(arguments: list[str]) -> None:
    """A command that ends well; in a fixture an exit would be no failure of one type but of all after it."""
    try:
        main(arguments)
    except SystemExit as stopped:
        raise AssertionError(f"{arguments[0]} exits with {stopped.code}") from None


def convert(model_type: str, source: Path, calibration: list[str]) -> Conversion:
    """Inspect, calibrate and convert; the outputs stand beside the source. calibration: keys of that command."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        run(["inspect", str(source), "--json"])
    made = Conversion(model_type, source, json.loads(printed.getvalue()))
    methods = [f"source={source}", f"statistics={made.statistics}", "scale.method=proportional"]  # scales differ from expert to expert
    keep = 2 * made.inspected["dims"]["active"]
    with redirect_stdout(printed):
        run(["calibrate", f"source={source}", f"output={made.statistics}", *calibration])
        run(["convert", *methods, f"output={made.dense}"])
        run(["convert", *methods, f"output={made.merged}", f"keep={keep}", "group.method=weight_cluster"])
    return made


def require_close(found: Any, expected: torch.Tensor, what: Any) -> None:
    """Within EXACT, and of the same shape."""
    found = torch.as_tensor(found)
    assert found.shape == expected.shape, what
    error = (found.double() - expected.double()).abs().max().item() / expected.abs().max().item()
    assert error <= EXACT, f"{what}: {error:.1e}"


def load(directory: Path) -> Loaded:
    """The class that config.json names, in float32, and what of the checkpoint it did not take as it is; experts run one by one."""
    config = AutoConfig.from_pretrained(directory)
    cls = getattr(transformers, config.architectures[0], AutoModelForCausalLM)
    model, report = cls.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    model.set_experts_implementation("eager")
    return model.eval(), {kind: faults for kind, faults in report.items() if faults}


@torch.no_grad()
def hidden_states(model: PreTrainedModel, tokens_BS: torch.Tensor) -> list[torch.Tensor]:
    """Before the first and after every decoder layer."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))
    found: list[torch.Tensor] = []

    def before(_layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(arguments[0] if arguments else named["hidden_states"])

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(lambda _, __, output: found.append(_first(output))) for layer in layers]
    model(input_ids=tokens_BS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def constant_routing(model: PreTrainedModel, plan: dict[str, Any], kept: nn.Module) -> Iterator[None]:
    """Every token uses the plan's experts, weighed by its scales; gates of shared experts have the plan's value, but for those that the
    dense model `kept`."""
    layers, hooks = {layer["layer"]: layer for layer in plan["layers"]}, []
    gates = {name: module for name, module in model.named_modules() if name.endswith("shared_expert_gate")}
    for name, module in experts_modules(model).items():
        layer = layers[number_of(name)]
        experts_K, scales_G = torch.tensor(layer["experts"]), torch.tensor(layer["scales"])
        scales_K = scales_G[torch.tensor(layer["group_of"])] / BEHIND.get(model.config.get_text_config().model_type, 1.0)

        def fixed(_module: nn.Module, arguments: Any, experts_K: torch.Tensor = experts_K, scales_K: torch.Tensor = scales_K) -> Any:
            x, _, gates_TA = arguments
            shape = (len(gates_TA), len(experts_K))
            return x, experts_K.expand(shape), scales_K.to(gates_TA).expand(shape)

        if gates_inputs(module):
            router = model.get_submodule(name.rpartition(".")[0]).router
            hooks += _constant_inputs(module, router, experts_K, (scales_K, layer["input_scale"]))
        else:
            hooks.append(module.register_forward_pre_hook(fixed))
    for name in gates.keys() - dict(kept.named_modules()).keys():
        share = layers[number_of(name)]["shared_scale"]
        logit = math.log(share / (1 - share))
        hooks.append(gates[name].register_forward_hook(lambda _, __, output, logit=logit: torch.full_like(output, logit)))
    yield
    for hook in hooks:
        hook.remove()


def gates_inputs(module: nn.Module) -> bool:
    """Whether a stock module of experts gets all tokens once for each expert, times their gates, in place of indices and weights."""
    return len(inspect.signature(module.forward).parameters) == 1


def _constant_inputs(module: nn.Module, router: nn.Module, experts_K: torch.Tensor, scales: tuple[torch.Tensor, float]) -> list[Any]:
    """scales: of the outputs of the experts, and of the input."""
    scales_K, of_input = scales

    def routed(_module: nn.Module, _arguments: Any, output: tuple[torch.Tensor, ...]) -> Any:
        gates_TE = torch.zeros_like(output[0])
        gates_TE[:, experts_K] = of_input
        return gates_TE, *output[1:]

    def scaled(_module: nn.Module, _arguments: Any, y_ND: torch.Tensor) -> torch.Tensor:
        scales_E = torch.zeros(len(module.down_proj)).scatter(0, experts_K, scales_K)
        return (y_ND.view(len(scales_E), -1, y_ND.shape[-1]) * scales_E[:, None, None]).view_as(y_ND)

    return [router.register_forward_hook(routed), module.register_forward_hook(scaled)]


def number_of(name: str) -> int:
    """Of the layer that a module stands in."""
    found = LAYER.match(name)
    assert found is not None, name
    return int(found[1])


@torch.no_grad()
def reference_statistics(model: PreTrainedModel, model_type: str, tokens_BS: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """By layer, the sums of docs/method.md#statistics, written out in float64: from what the stock blocks hand to their experts, and
    what they multiply the sum of them by, in whatever type the model runs (it is made a float64 one then)."""
    score: Score = SCORES.get(model_type, lambda logits: logits.softmax(-1))
    seen: dict[str, Any] = {}
    hooks = []
    for name, module in experts_modules(model).items():
        block = name.rpartition(".")[0]
        parts = dict(model.get_submodule(block).named_children())
        watched = {part: parts[part] for part in ("gate", "router", "shared_expert", "shared_expert_gate") if part in parts}
        for part, child in watched.items():
            key = f"{block}.{'router' if part == 'gate' else part}"
            hooks.append(child.register_forward_hook(lambda _, __, output, key=key: seen.update({key: output})))
        hooks.append(module.register_forward_pre_hook(lambda _, arguments, name=name: seen.update({name: arguments})))
    model(input_ids=tokens_BS, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, module in experts_modules(model.double()).items():
        block = name.rpartition(".")[0]
        router, more = _first(seen[f"{block}.router"]), {}
        if gates_inputs(module):
            input_gates_TE, router = seen[f"{block}.router"]
            x, experts, gates = _of_gated_inputs(seen[name][0], input_gates_TE)
            more = {"input_gate_sum": input_gates_TE.sum().double()[None]}
        else:
            x, experts, gates = seen[name]
        weights = _rows(gates) * BEHIND.get(model_type, 1.0)
        sums = _sums(module, _rows(x), _rows(experts), weights, score(_rows(router))) | more
        if f"{block}.shared_expert_gate" in seen:
            squares_T = _rows(_first(seen[f"{block}.shared_expert"])).square().sum(-1)
            shares_T = _rows(_first(seen[f"{block}.shared_expert_gate"])).sigmoid()[:, 0]
            sums |= {"shared_square_sum": squares_T.sum()[None], "shared_gated_square_sum": (shares_T * squares_T).sum()[None]}
        found[number_of(name)] = sums
    return found


def _of_gated_inputs(x_ND: torch.Tensor, gates_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the one expert of each token gets, which it is, and a weight of 1."""
    x_ETD, experts_T = x_ND.view(gates_TE.shape[1], -1, x_ND.shape[-1]), gates_TE.argmax(1)
    return x_ETD[experts_T, torch.arange(len(experts_T))], experts_T[:, None], torch.ones(len(experts_T), 1)


def _rows(values: torch.Tensor) -> torch.Tensor:
    """Of tokens, flattened; numbers in float64."""
    rows = values.reshape(-1, values.shape[-1])
    return rows.double() if rows.is_floating_point() else rows


def _sums(
    module: nn.Module, x_TD: torch.Tensor, experts_TA: torch.Tensor, gates_TA: torch.Tensor, scores: torch.Tensor
) -> dict[str, torch.Tensor]:
    """scores: of all that the router chooses from, the experts first."""
    down = _Down.of(module)
    # A choice that is no expert is no selection: LongCat has identity experts beyond the others, ZAYA masks the skipping class as expert 0
    # with weight 0.
    chosen_TA = (experts_TA < down.experts) & (gates_TA != 0)
    probs_TE = scores[:, : down.experts]
    chosen_TAE = nn.functional.one_hot(experts_TA.where(chosen_TA, 0), down.experts) * chosen_TA[..., None]
    selected_TE, gates_TE = chosen_TAE.double().sum(1), (chosen_TAE * gates_TA[..., None]).sum(1)
    f_ETD, h_ETI = down.outputs(x_TD), down.neurons(x_TD)
    norms_TE = f_ETD.norm(dim=-1).T
    return {
        "tokens": torch.tensor([float(len(x_TD))]),
        "selected_count": selected_TE.sum(0),
        "prob_sum": probs_TE.sum(0),
        "selected_prob_sum": (probs_TE * selected_TE).sum(0),
        "gate_sum": gates_TE.sum(0),
        "gated_norm_sum": (gates_TE * norms_TE).sum(0),
        "selected_norm_sum": (selected_TE * norms_TE).sum(0),
        "gram": torch.einsum("itd,jtd->ij", f_ETD, f_ETD),
        "output_sum": f_ETD.sum(1),
        "prob_gram": probs_TE.T @ probs_TE,
        "neuron_energy": torch.einsum("te,eti->ei", gates_TE.square(), h_ETI.square()),
    }


@dataclass(frozen=True)
class _Down:
    """A stock module of experts, every one of which it runs on every token. name, weight: its down projections, [E, D, I], [E, I, D] or
    [E * I, D]."""

    module: nn.Module
    name: str
    weight: torch.Tensor
    experts: int

    @classmethod
    def of(cls, module: nn.Module) -> _Down:
        weights = dict(module.named_parameters())
        name = next(name for name in weights if name.rpartition(".")[2] in ("down_proj", "w2"))
        weight = weights[name]
        return cls(module, name, weight, len(weight) if weight.ndim == 3 else int(module.num_experts))

    def outputs(self, x_TD: torch.Tensor) -> torch.Tensor:
        """f_ETD, not weighed."""
        return self._run(x_TD, {})

    def neurons(self, x_TD: torch.Tensor) -> torch.Tensor:
        """h_ETI, what goes into the down projection: read off the module with projections that pass some neurons on as they are."""
        hidden = x_TD.shape[1]
        matrices = self.weight.reshape(self.experts, -1, self.weight.shape[-1])
        inputs_first = matrices.shape[2] == hidden
        width = matrices.shape[1 if inputs_first else 2]
        parts = []
        for start in range(0, width, hidden):
            passing_ID = torch.eye(width, dtype=x_TD.dtype)[:, start : start + hidden]
            passing_ID = nn.functional.pad(passing_ID, (0, hidden - passing_ID.shape[1]))
            passing = (passing_ID if inputs_first else passing_ID.T).expand_as(matrices).reshape(self.weight.shape)
            biases = {name: torch.zeros_like(bias) for name, bias in self.module.named_parameters() if name.endswith("down_proj_bias")}
            parts.append(self._run(x_TD, {self.name: passing, **biases})[..., : width - start])
        return torch.cat(parts, dim=-1)

    def _run(self, x_TD: torch.Tensor, changed: dict[str, torch.Tensor]) -> torch.Tensor:
        experts_N2 = torch.arange(self.experts).repeat_interleave(len(x_TD))[:, None].expand(-1, 2)
        weights_N2 = torch.tensor([1.0, 0.0], dtype=x_TD.dtype).expand(experts_N2.shape)  # LongCat's class takes no single column
        repeated = x_TD.repeat(self.experts, 1)
        arguments = (repeated,) if gates_inputs(self.module) else (repeated, experts_N2, weights_N2)
        return functional_call(self.module, changed, arguments).view(self.experts, len(x_TD), -1)
