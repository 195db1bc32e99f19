"""Config of `distill`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, model_validator

from megatron_moe2dense.common.config import Config, key
from megatron_moe2dense.common.hub import Source
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.trainer.data.config import TrainDataConfig
from megatron_moe2dense.trainer.losses import Loss, losses


class ParallelConfig(Config):
    """How the processes share the work; the rest of them is data parallel."""

    tensor: int = key(1, "tensor parallel size of teacher and student", "processes", gt=0)
    pipeline: int = key(1, "pipeline stages of teacher and student", "processes", gt=0)
    virtual_pipeline: int = key(1, "model chunks of the student on each pipeline stage; above 1: the interleaved schedule", "chunks", gt=0)
    layers_per_stage: list[int] | None = key(
        None, "decoder layers of the student on every (virtual) stage, in order of depth; null: the same number on all", "layers"
    )
    teacher_layers_per_stage: list[int] | None = key(
        None, "decoder layers of the teacher on every pipeline stage; null: the same number on all", "layers"
    )
    context: int = key(1, "context parallel size: each sequence is shared by so many", "processes", gt=0)
    expert: int = key(1, "expert parallel size of the MoE", "processes", gt=0)
    sequence: bool = key(False, "sequence parallelism inside the tensor-parallel group")
    distributed_optimizer: bool = key(True, "shard optimizer state over data-parallel ranks")
    overlap_gradients: bool | None = key(
        None, "reduce gradients over data-parallel ranks while the backward pass goes on; null: on GPUs, where the loss allows it"
    )
    recompute: Literal["none", "selective", "full"] = key(
        "none", "activations of the student computed again in the backward pass: those inside its FFN blocks, or all of each layer"
    )

    @model_validator(mode="after")
    def _stages(self) -> ParallelConfig:
        if self.pipeline == 1 and (self.virtual_pipeline > 1 or self.layers_per_stage or self.teacher_layers_per_stage):
            raise ValueError("virtual_pipeline, layers_per_stage and teacher_layers_per_stage have no effect with pipeline: 1")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence has no effect with tensor: 1: there is no group whose ranks would share a sequence")
        for layers in (self.layers_per_stage or [], self.teacher_layers_per_stage or []):
            if any(count < 1 for count in layers[1:-1]) or any(count < 0 for count in layers):
                raise ValueError(f"{layers}: only the first and the last stage may have no layers")
        return self

    @property
    def expert_tensor(self) -> int:
        """Tensor parallel size inside an expert: experts are split over ranks whole, or each like the rest of the model."""
        return 1 if self.expert > 1 else self.tensor


class MuonConfig(Config):
    """Muon for the matrices of the decoder layers; embedding, head, norms and biases stay with AdamW."""

    lr: float | None = key(None, "peak learning rate of the matrices, whose updates are as large as AdamW's; null: optim.lr", gt=0)
    momentum: float = key(0.95, "decay of the momentum (Nesterov's)", ge=0, lt=1)
    iterations: int = key(5, "Newton-Schulz iterations of an orthogonalisation", "iterations", gt=0, lt=100)


class OptimConfig(Config):
    """AdamW of Megatron-Core, and Muon."""

    lr: float = key(1e-4, "peak learning rate", gt=0)
    betas: list[float] = key([0.9, 0.95], "Adam's moment decays", min_length=2, max_length=2)
    eps: float = key(1e-8, "Adam's epsilon", gt=0)
    weight_decay: float = key(0.1, "decoupled weight decay; norms and biases have none", ge=0)
    clip: float = key(1.0, "global gradient norm limit; 0: none", ge=0)
    muon: MuonConfig | None = key(None, "Muon for the matrices of the decoder layers; null: AdamW for all")

    def require_whole_matrices(self, parallel: ParallelConfig) -> None:
        """ValueError for Muon with a sharded optimizer."""
        if self.muon is not None and parallel.distributed_optimizer:
            raise ValueError("optim.muon takes whole matrices, not shards: set parallel.distributed_optimizer=false")


class ScheduleConfig(Config):
    """Learning rate over the steps of the run."""

    style: Literal["cosine", "linear", "wsd", "constant"] = key("cosine", "after the warm-up; wsd: stable, then decay at the end")
    warmup: float = key(0.02, "share of the steps spent warming up from 0", "fraction", ge=0, lt=1)
    final: float | None = key(None, "last learning rate as a share of the peak (not for constant); null: 0.1", "fraction", ge=0, le=1)
    decay: float | None = key(None, "share of the steps spent decaying, for wsd; null: 0.2", "fraction", gt=0, le=1)
    shape: Literal["minus_sqrt", "linear", "cosine", "exponential"] | None = key(None, "how wsd decays; null: minus_sqrt")

    @model_validator(mode="after")
    def _settings_have_effect(self) -> ScheduleConfig:
        if self.style == "constant" and self.final is not None:
            raise ValueError("final has no effect with style: constant")
        if self.style != "wsd" and (self.decay is not None or self.shape is not None):
            raise ValueError(f"decay and shape have no effect with style: {self.style}; they belong to wsd")
        if self.style == "wsd" and self.warmup + self.resolved_decay() > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.resolved_decay()} are more than the whole run")
        return self

    def resolved_final(self) -> float:
        """`final` with its default filled in; a constant schedule ends at its peak."""
        if self.style == "constant":
            return 1.0
        return 0.1 if self.final is None else self.final

    def resolved_decay(self) -> float:
        """`decay` with its default filled in."""
        return 0.2 if self.decay is None else self.decay


class BatchConfig(Config):
    """Sequences per model call and per optimizer step."""

    model_config = Config.model_config | {"populate_by_name": True}

    micro: int = key(1, "sequences per model call and rank", "sequences", gt=0)
    global_: int = key(256, "sequences per optimizer step over all ranks", "sequences", gt=0, alias="global")


class Fp8Config(Config):
    """Matrix products of the student in FP8, on GPUs with Transformer Engine."""

    format: Literal["hybrid", "e4m3"] = key("hybrid", "hybrid: e4m3 forward, e5m2 for gradients")
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = key(
        "tensorwise",
        "scaling: tensors by their history or their own maximum, blocks of 128 (Hopper), 32 with shared exponents (Blackwell)",
    )


_PARTS = Literal["all", "ffn", "ffn+norms+head"]


def _listed(parts: Any) -> Any:
    if isinstance(parts, str) and parts not in get_args(_PARTS):
        raise ValueError(f"{', '.join(get_args(_PARTS))}, or a list of name patterns: train.parts=['{parts}']")
    return parts


# What is trained of a student.
TrainedParts = Annotated[_PARTS | list[str], BeforeValidator(_listed)]


class TrainConfig(Config):
    """Length of the run and what happens on the way."""

    steps: int | None = key(None, "optimizer steps; give this or tokens", "steps", gt=0)
    tokens: int | None = key(None, "training tokens, rounded down to whole steps", "tokens", gt=0)
    parts: TrainedParts = key(
        "all",
        "what is trained of the student, or patterns of its weights' names, such as ['model.layers.*.mlp.*']; the rest has no gradient and "
        "no optimizer state; a tied head is the embedding",
    )
    save_every: int = key(500, "steps between checkpoints; the last step is always saved", "steps", gt=0)
    keep: int = key(2, "checkpoints kept", "checkpoints", gt=0)
    async_save: bool = key(True, "go on training while a checkpoint is written; costs host memory for a copy of this rank's state")
    eval_every: int | None = key(None, "steps between evaluations on data.validation; null: at the end only", "steps", gt=0)
    log_every: int = key(
        10, "steps between lines on stderr (the first, and one after 30 s, come anyway); metrics.jsonl has every step", "steps", gt=0
    )
    seed: int = key(0, "seed of data order and of random weights")
    timeout: float = key(
        30.0, "of several processes, how long a step, an evaluation or a save may take before the late ranks are named", "minutes", gt=0
    )
    most_skipped: int = key(10, "steps in a row without a finite loss and gradient after which the run stops", "steps", gt=0)
    spike: float | None = key(1.5, "warn of a loss above this multiple of the median of the last 64; null: never", gt=1)

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens")
        if self.parts == []:
            raise ValueError("parts: nothing would be trained")
        return self


class RoutingConfig(Config):
    """Routing of the frozen teacher."""

    active: int | None = key(
        None, "experts the teacher activates per token (expanded routing, paper Eq 6); null: its own top-k", "experts", gt=0
    )


class TeacherCheckConfig(Config):
    """What the teacher has to show before step 0, besides weights that are those of its files."""

    loss_bound: float | None = key(
        0.8, "most next-token loss on the first sample, as a share of log(vocabulary), a uniform guess; null: any", "fraction", gt=0
    )
    stock_forward: Literal["auto", "always", "never"] = key(
        "auto", "compare its logits with those of stock transformers; auto: when that model fits in free host memory"
    )


class TeacherConfig(Config):
    """The frozen teacher, live or cached. A path in place of the block is its `path`."""

    path: Annotated[str | None, Source()] = key(None, "Hugging Face directory of the model; null: its cache alone")
    cache: str | None = key(
        None, "directory of `moe2dense cache-teacher`, read in place of the model; a `path` beside it has to be the cached one"
    )
    routing: RoutingConfig | None = key(None, "teacher routing")
    check: TeacherCheckConfig | None = key(None, "checks of the teacher; null: the defaults")
    dtype: Literal["model", "fp8"] = key(
        "model",
        "how its matrices stand in memory; model: in the run's dtype; fp8: in FP8 E4M3, made numbers of that dtype as they are used. "
        "Those of an FP8 checkpoint are kept as they are, others are rounded",
    )

    @model_validator(mode="after")
    def _settings_have_effect(self) -> TeacherConfig:
        given = [name for name in ("routing", "check") if getattr(self, name) is not None] + ["dtype"] * (self.dtype != "model")
        if self.path is None and self.cache is None:
            what = f"teacher.{given[0]} has no effect without a teacher: " if given else ""
            raise ValueError(f"{what}give its path, or its cache")
        if self.cache is not None and given:
            raise ValueError(f"teacher.{given[0]} has no effect with teacher.cache: it was applied when the cache was written")
        return self

    @property
    def live(self) -> str | None:
        """Its directory, where it is a model of the job."""
        return self.path if self.cache is None else None

    @property
    def active(self) -> int | None:
        """Experts per token that it is asked for, None: its own number."""
        return self.routing.active if self.routing else None


_BESIDE = {"teacher_cache": "cache", "teacher_routing": "routing", "teacher_check": "check"}


def teacher_block(raw: Any) -> Any:
    """Before a config is validated: `teacher: DIR` becomes the block that it stands for, and what stood beside it until 0.1 goes inside
    (accepted for one version).

    Raises:
        ValueError: a key in both places.
    """
    if not isinstance(raw, dict):
        return raw
    found = {name: value for name, value in raw.items() if name not in _BESIDE}
    if isinstance(found.get("teacher"), str):
        found["teacher"] = {"path": found["teacher"]}
    old = {name: raw[name] for name in _BESIDE if raw.get(name) is not None}
    if not old:
        return found
    block = found.get("teacher") or {}
    for name in old:
        if block.get(_BESIDE[name]) is not None:
            raise ValueError(f"{name} and teacher.{_BESIDE[name]} are the same key: give the second alone")
        logger.info("%s is now teacher.%s; the next version will not know the old name", name, _BESIDE[name])
    found["teacher"] = {**block, **{_BESIDE[name]: value for name, value in old.items()}}
    return found


class MoeConfig(Config):
    """Training a MoE as a plain language model."""

    aux_loss: float = key(0.01, "coefficient of the load-balancing loss", ge=0)
    z_loss: float = key(0.0, "coefficient of the router z-loss", ge=0)


class WandbConfig(Config):
    """Weights & Biases; offline unless an API key is set."""

    project: str = key(..., "W&B project")
    name: str | None = key(None, "display name of the run; null: the last two parts of `output`")
    entity: str | None = key(None, "team or user that the project belongs to; null: W&B's default")
    group: str | None = key(None, "runs that belong together, such as the seeds of one arm")
    tags: list[str] = key([], "labels of the run")
    notes: str | None = key(None, "a longer description")


class LoggingConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig | None = key(None, "Weights & Biases")
    tensorboard: bool = key(False, "write TensorBoard events to <output>/tensorboard")


class DistillConfig(Config):
    """`moe2dense distill`."""

    plain: ClassVar[Mapping[str, str]] = {"teacher": "path"}

    student: Annotated[str, Source()] = key(..., "Hugging Face directory of the student (only its config.json with initialize: random)")
    teacher: TeacherConfig | None = key(..., "the frozen teacher, its Hugging Face directory or this block; null: plain language modelling")
    output: str = key(..., "directory of the run: checkpoints/, metrics.jsonl, moe2dense.json")
    initialize: Literal["checkpoint", "random_ffn", "random"] = key(
        "checkpoint",
        "the student's weights: of its directory, all but the FFNs of it and these drawn, or all drawn (train.seed)",
    )
    data: TrainDataConfig = key(..., "training text")
    loss: Annotated[Loss, *losses.field] | None = key(None, "loss block; null: forward_kl with a teacher, cross_entropy without")
    parallel: ParallelConfig = key(ParallelConfig(), "parallelism")
    optim: OptimConfig = key(OptimConfig(), "optimizer")
    schedule: ScheduleConfig = key(ScheduleConfig(), "learning-rate schedule")
    batch: BatchConfig = key(BatchConfig(), "batch sizes")
    train: TrainConfig = key(..., "length of the run")
    moe: MoeConfig | None = key(None, "balancing losses of a MoE student (plain language modelling only)")
    logging: LoggingConfig = key(LoggingConfig(), "metrics")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "cuda where there is a GPU, else cpu")
    dtype: Literal["float32", "bfloat16"] = key("bfloat16", "compute type; bfloat16 keeps float32 master weights")
    fp8: Fp8Config | None = key(None, "FP8 products of the student (never of the teacher); needs dtype: bfloat16; null: none")
    overwrite: bool = key(False, "replace a finished or foreign run in output")

    @model_validator(mode="before")
    @classmethod
    def _teacher_block(cls, raw: Any) -> Any:
        return teacher_block(raw)

    @model_validator(mode="after")
    def _settings_have_effect(self) -> DistillConfig:
        if self.teacher_cache is not None and (self.loss is None or self.loss.tokens_of_cache() is None):
            asked = "the default loss" if self.loss is None else f"loss {self.loss.method_name()}"
            raise ValueError(f"teacher.cache holds the teacher's top k alone, {asked} needs all: set loss to {{method: top_k_kl, k: ...}}")
        if self.loss is not None and self.loss.needs_teacher != (self.teacher is not None):
            wants = "needs a teacher" if self.loss.needs_teacher else "does not use the teacher: set teacher to null"
            raise ValueError(f"loss {self.loss.method_name()} {wants}")
        if self.teacher is not None and self.moe is not None:
            raise ValueError("moe has no effect with a teacher: it is for training a MoE as a language model")
        if self.parallel.overlap_gradients and not self.resolved_loss().trains_head():
            raise ValueError(
                f"parallel.overlap_gradients waits for a gradient of the LM head, loss {self.resolved_loss().method_name()} has none"
            )
        self.optim.require_whole_matrices(self.parallel)
        if self.fp8 is not None and self.dtype != "bfloat16":
            raise ValueError(f"fp8 has no effect with dtype: {self.dtype}")
        if self.data.validation is None and self.train.eval_every is not None:
            raise ValueError("train.eval_every has no effect without data.validation")
        return self

    @property
    def live_teacher(self) -> str | None:
        """Directory of a teacher that is a model of this job."""
        return self.teacher.live if self.teacher is not None else None

    @property
    def teacher_cache(self) -> str | None:
        """Directory of a teacher that is read from disk."""
        return self.teacher.cache if self.teacher is not None else None

    def resolved_loss(self) -> Loss:
        """The loss, with its default filled in."""
        return self.loss or losses["cross_entropy" if self.teacher is None else "forward_kl"]()

    def active_experts(self) -> int | None:
        """Experts per token that the teacher is asked for, None: its own number."""
        return self.teacher.active if self.teacher is not None else None

    def resolved_teacher_check(self) -> TeacherCheckConfig:
        """The checks, with their defaults filled in."""
        return (self.teacher.check if self.teacher is not None else None) or TeacherCheckConfig()

    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return max(1, self.train.tokens // (self.batch.global_ * self.data.sequence_length))
