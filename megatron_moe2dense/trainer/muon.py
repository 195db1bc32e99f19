"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the matrices of decoder layers, under tensor parallelism.

Megatron-Core's own needs a package that NVIDIA's container brings and no index has; torch.optim.Muon sees neither Megatron-Core's fused
matrices nor their shards. Here every matrix of the Hugging Face checkpoint is orthogonalised alone and whole, as torch.optim.Muon does it
in one process: fused ones are taken apart, shards gathered over the tensor-parallel group, and each rank keeps its part.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, _get_param_groups, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import Dims
from megatron_moe2dense.trainer.config import MuonConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.mapping import WeightMapping, join, split, splits_heads
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec

_QUINTIC = (3.4445, -4.7750, 2.0315)
_EPSILON = 1e-7
_RMS_OF_ADAMW = 0.2
_NO_MATRIX = {"params": [], "wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}


@dataclass(frozen=True)
class Matrices:
    """How one parameter is taken apart.

    Attributes:
        kind: of the family's rule. dims: this rank's share of the heads. dim: the axis that tensor parallelism splits, None: none.
        anywhere: it splits the parameter itself, wherever that cuts its matrices; dims are then those of the model.
    """

    kind: str
    dims: Dims
    dim: int | None
    anywhere: bool = False

    def apart(self, tensor: Tensor) -> list[Tensor]:
        """The Hugging Face matrices, this rank's part of each."""
        return split(self.kind, tensor, self.dims)

    def together(self, parts: Iterable[Tensor]) -> Tensor:
        """The inverse of `apart`."""
        return join(self.kind, parts, self.dims.kv_heads)


class Muon(torch.optim.Optimizer):
    """Updates of the size of AdamW's: orthogonalised momentum times 0.2 sqrt(larger side) (Liu et al. 2025, arXiv:2502.16982).

    Args:
        param_groups: one. matrices: of each parameter, in order.
        place: the tensor-parallel ranks, and the type of the orthogonalisation.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        matrices: list[Matrices],
        settings: MuonConfig,
        place: tuple[dist.ProcessGroup, torch.dtype],
    ):
        super().__init__(param_groups, {})
        assert len(self.param_groups) == 1, "matrices are known by their place in the group"
        self._matrices, self._settings, (self._group, self._dtype) = matrices, settings, place

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; gradients of all parameters are there."""
        assert closure is None
        _fresh_state(self)
        (group,) = self.param_groups
        for parameter, matrices in zip(group["params"], self._matrices, strict=True):
            momentum = self.state[parameter]["momentum_buffer"]
            momentum.lerp_(parameter.grad, 1 - self._settings.momentum)
            direction = parameter.grad.lerp(momentum, self._settings.momentum)
            update = self._of_parameter(direction, matrices)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])

    def _of_parameter(self, direction: Tensor, matrices: Matrices) -> Tensor:
        """This rank's part of one parameter's update."""
        if not matrices.anywhere:
            return matrices.together(self._update(part, matrices.dim) for part in matrices.apart(direction))
        assert matrices.dim is not None, "what is split is split along an axis"
        # rounded for the way as for the orthogonalisation
        apart = matrices.apart(self._gathered(direction.to(self._dtype), matrices.dim).to(direction))
        whole = matrices.together(self._update(part, None) for part in apart)
        return whole.chunk(self._group.size(), matrices.dim)[self._group.rank()]

    def _gathered(self, part: Tensor, dim: int) -> Tensor:
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self._group.size())]
        dist.all_gather(parts, part.contiguous(), group=self._group)
        return torch.cat(parts, dim)

    def _update(self, part: Tensor, dim: int | None) -> Tensor:
        """This rank's part of one matrix's update."""
        whole = part.to(self._dtype)
        if dim is not None:
            whole = self._gathered(whole, dim)
        update = orthogonal(whole, self._settings.iterations)
        own = update if dim is None else update.chunk(self._group.size(), dim)[self._group.rank()]
        return own.to(part) * (_RMS_OF_ADAMW * max(whole.shape) ** 0.5)


def orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """Roughly U V^T of the singular value decomposition, by Newton-Schulz iterations of the quintic polynomial of Jordan et al."""
    a, b, c = _QUINTIC
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=_EPSILON)
    for _ in range(iterations):
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def beside_adamw(settings: MuonConfig, shared: OptimizerConfig, chunks: Sequence[Any], model: tuple[ModelSpec, Groups]) -> ChainedOptimizer:
    """Muon over the matrices of the wrapped chunks' layers, Megatron-Core's AdamW over the rest.

    Args:
        shared: of both; AdamW's learning rates, where Muon has none of its own.

    Raises:
        UserError: the model is a MoE.
    """
    spec, groups = model
    require_dense(spec)
    found = {parameter: matrices for chunk in chunks for parameter, matrices in _matrices(chunk.module, spec, groups)}
    others = [p for chunk in chunks for p in chunk.parameters() if p not in found]
    # Megatron-Core makes groups of what has gradients
    with _frozen(others):
        # none on a stage where no matrix is trained, which takes part in sums over the ranks all the same
        (group,) = _get_param_groups(list(chunks), shared, {}) or [dict(_NO_MATRIX)]
    with _frozen(found):
        adamw = get_megatron_optimizer(shared, list(chunks))
    assert isinstance(adamw, ChainedOptimizer)
    assert shared.lr is not None
    assert shared.min_lr is not None
    lr = settings.lr or shared.lr
    group |= {"max_lr": lr, "min_lr": lr * shared.min_lr / shared.lr}
    matrices = [found[parameter] for parameter in group["params"]]
    half = bool(shared.bf16)
    muon = Muon([group], matrices, settings, (groups.collection.tp, torch.bfloat16 if half else torch.float32))
    no_scaler: Any = None
    if half:
        wrapped = Float16OptimizerWithFloat16Params(muon, shared, no_scaler, _fresh_state)
    else:
        wrapped = FP32Optimizer(muon, shared, _fresh_state)
    wrapped.grad_stats_parallel_group = adamw.get_grad_stats_parallel_group()
    return ChainedOptimizer([*adamw.chained_optimizers, wrapped])


def require_dense(spec: ModelSpec) -> str:
    """UserError for the matrices of a MoE."""
    if spec.dims.experts:
        raise UserError("optim.muon for a MoE", "a dense student: nothing here orthogonalises experts", "drop optim.muon")
    return "Muon"


@contextlib.contextmanager
def _frozen(parameters: Collection[Tensor]) -> Iterator[None]:
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad = True


def is_matrix(name: str, axes: int) -> bool:
    """Whether Muon takes the parameter of this name: the matrices of decoder layers."""
    return axes == 2 and ".layers." in f".{name}"


def _matrices(chunk: HeadlessGPT, spec: ModelSpec, groups: Groups) -> Iterator[tuple[Tensor, Matrices]]:
    mapping, ranks = WeightMapping(spec), groups.collection.tp.size()
    dims = spec.dims
    own = dataclasses.replace(dims, heads=dims.heads // ranks, kv_heads=dims.kv_heads // ranks)
    for name, parameter in chunk.named_parameters():
        if is_matrix(name, parameter.dim()) and parameter.requires_grad:
            sharded = ranks > 1 and getattr(parameter, "tensor_model_parallel", False)
            kind, dim = mapping.rule(name)[0].kind, parameter.partition_dim if sharded else None  # type: ignore[attr-defined]
            anywhere = splits_heads(kind, dims, ranks)
            yield parameter, Matrices(kind, dims if anywhere else own, dim, anywhere)


def _fresh_state(muon: Any, config: Any = None) -> None:  # noqa: ARG001 - as Megatron-Core calls it before it loads
    for group in muon.param_groups:
        for parameter in group["params"]:
            if not muon.state[parameter]:
                muon.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
