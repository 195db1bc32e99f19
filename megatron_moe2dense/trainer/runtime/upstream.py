"""What differs between versions of Megatron-Core (0.16 to 0.19), and its faults, most of which show without CUDA, Transformer Engine or
Apex only: one named function each, with its versions."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import inspect
import pickle
import queue
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch


def has_transformer_engine() -> bool:
    """True when a working Transformer Engine is installed (the bare PyPI meta package has no `pytorch` part)."""
    try:
        return importlib.util.find_spec("transformer_engine.pytorch") is not None
    except (ImportError, RuntimeError):
        return False


def adam() -> str:
    """Which AdamW Megatron-Core took at its import: Transformer Engine's fused one, else NVIDIA Apex's, else torch's."""
    from megatron.core import optimizer

    cls: Any = optimizer.Adam
    return f"{cls.__module__.partition('.')[0]} {cls.__name__}"


def mend() -> None:
    """Apply the mends for machines without CUDA; each does nothing where its fault is absent."""
    random_state_on_cpu()
    moe_gemm_name_without_te()
    latent_attention_without_te()
    all_to_all_split_sizes_on_cpu()
    distributed_optimizer_with_torch_adam()


def all_reduce_of_strided_tensors() -> None:
    """On GPUs too (0.16): `mappings._reduce` sums a contiguous copy over the group and returns the tensor it was given.

    A gradient that is a view with strides, such as a slice of the last axis, is then not summed at all.
    """
    from megatron.core.tensor_parallel import mappings

    def reduce(input_: torch.Tensor, group: Any) -> torch.Tensor:
        if group.size() == 1:
            return input_
        whole = input_.contiguous()
        torch.distributed.all_reduce(whole, group=group)
        return whole

    mappings._reduce = reduce


def checkpoint_results_without_a_server() -> None:
    """Checkpoint writers report to the trainer through a server process, which a SIGTERM to the process group kills (all versions).

    Torchrun and Slurm signal whole groups, and the checkpoint asked for by that signal would be lost. Here a file takes its place.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    new = hasattr(filesystem_async, "get_write_results_queue")  # 0.17 renamed it
    setattr(filesystem_async, "get_write_results_queue" if new else "_get_write_results_queue", _ResultsFile)


def own_checkpoint_writers() -> dict[str, Any]:
    """Options of `dist_checkpointing.save`: Megatron-Core's own writers, where 0.17 and later would take nvidia-resiliency-ext's."""
    from megatron.core import dist_checkpointing

    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}


def use_experts(mlp: Any, experts: type) -> Any:
    """The MoE part of a local layer spec with another class of experts: a ModuleSpec's, or (0.19) that of a partial of MoELayer."""
    if isinstance(mlp, functools.partial):
        built = mlp.keywords["submodules"]
        built.experts = functools.partial(experts, *built.experts.args, **built.experts.keywords)
    else:
        mlp.submodules.experts.module = experts
    return mlp


def own_outputs(layers: Iterable[torch.nn.Module]) -> None:
    """Layers whose outputs may be added to. Experts with biases (GPT-OSS's) add theirs to the output of fc2 in place, which torch refuses
    with gradients where a reduction over one rank has handed its input on. 0.16 to 0.19.

    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.0/megatron/core/transformer/mlp.py
    """
    for layer in layers:
        layer.register_forward_hook(lambda _layer, _arguments, output: (output[0].clone(), *output[1:]))


def write_common(checkpoint: Path) -> None:
    """What belongs to no tensor in a file of its own, too: 0.19 keeps it among the sharded objects, where earlier versions do not look."""
    from megatron.core import dist_checkpointing

    if not (checkpoint / "common.pt").exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(checkpoint)), checkpoint / "common.pt")


def write_and_tell(write: Callable[..., None], rank: int, buckets: list[Any], results: Any) -> None:
    """In a forked writer: `write`, whose failure reports its reason. 0.17 and later leave only the class of the error, or nothing."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as Writers

    if not hasattr(Writers, "write_preloaded_data_multithread"):  # 0.16
        try:
            write(rank, buckets, results)
        except OSError as error:
            if error.errno not in _NO_SEMAPHORES:
                raise
            results.put(_in_turn(write, buckets))
        return
    single, failures = Writers.write_preloaded_data, _Failures()

    @functools.wraps(single)
    def write_bucket(*arguments: Any, **options: Any) -> Any:
        if options["results_queue"] is not None:  # in a thread
            options["results_queue"] = failures.on_the_way_to(options["results_queue"])
        output: Any = single(*arguments, **options)
        if options["results_queue"] is None and isinstance(output[1], Exception):
            raise output[1]
        return output

    Writers.write_preloaded_data = staticmethod(write_bucket)
    try:
        write(rank, buckets, results)
    except AssertionError as error:
        results.put(RuntimeError(str(failures.first or error)))


# What `sem_open` says where /dev/shm is full, closed, read-only, not there. Forks and pipes fail with others.
_NO_SEMAPHORES = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOSYS)


def _in_turn(write: Any, buckets: list[Any]) -> dict[int, Any] | Exception:
    """0.16 writes in processes that report through semaphores, which lie in /dev/shm and are made first. Where there are none, this process
    writes what they would have written, and answers as they do."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as Writers

    transforms, *_ = write.args
    done: Any = queue.Queue()  # of threads: nothing is shared with another process
    running: Any = queue.Queue()
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        running.put(number)
        Writers.write_preloaded_data(transforms, number, bucket, done, running, use_fsync=True)
        _, written[number] = done.get()
        if isinstance(written[number], Exception):
            return written[number]
    return written


class _Failures:
    """The part of `queue.Queue` that a writing thread uses, which keeps the first error that passes."""

    def __init__(self) -> None:
        self.first: Exception | None = None

    def on_the_way_to(self, results: Any) -> Any:
        self._results = results
        return self

    def put(self, output: tuple[int, Any]) -> None:
        if self.first is None and isinstance(output[1], Exception):
            self.first = output[1]
        self._results.put(output)


class _ResultsFile:
    """The part of `multiprocessing.Queue` that the writers use, for one result: made before the fork, put after, got when it has ended."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object

    def put(self, results: Any) -> None:
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)  # noqa: S301 - of our own fork, through a file without a name
        except EOFError:
            raise queue.Empty from None


def random_state_on_cpu() -> None:
    """The RNG tracker forks the CUDA generator (all versions); without CUDA it must fork the CPU's."""
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:  # noqa: ARG001
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:  # noqa: ARG001
        torch.set_rng_state(new_state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    random.CudaRNGStatesTracker.fork = fork


def moe_gemm_name_without_te() -> None:
    """0.15 and 0.16: `moe_utils` uses the name `te_general_gemm` without defining it when TE is absent."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def latent_attention_without_te() -> None:
    """`multi_latent_attention` takes the mock instances that stand for TE's classes for TE, and asks isinstance of them (0.16).

    It knows a duplicated down projection by its class, whose name it does not import without TE (0.17 and later).
    """
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
        multi_latent_attention.Linear = Linear


def all_to_all_split_sizes_on_cpu() -> None:
    """The all-to-all dispatcher turns split sizes into numpy only when they are CUDA tensors (all versions)."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: ARG001
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def distributed_optimizer_with_torch_adam() -> None:
    """DistributedOptimizer over torch's Adam (no TE, no Apex; all versions): four faults around its state.

    - `state_dict` of a fresh optimizer asserts that a step exists: give every shard an empty state first.
    - `step` is kept in the param groups, and must not be sharded as if it were a tensor of the parameter.
    - a rank without parameters (a pipeline stage that is frozen) fails the same assertion; it takes the others' step, which rank 0 saves.
    - loading gives all parameters one shared `step` tensor; Adam then adds 1 to it once per parameter.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    cls = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict
    get_states = cls._get_main_param_and_optimizer_states
    if getattr(state_dict, "mended", False):
        return

    def state_dict_with_state(self: Any) -> Any:
        adam: Any = self.optimizer
        for group in adam.param_groups:
            for shard in group["params"]:
                if not adam.state.get(shard):
                    zeros = torch.zeros_like(shard)
                    adam.state[shard] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        if adam.state:
            found = state_dict(self)
        else:
            groups = [{key: value for key, value in group.items() if key != "params"} for group in adam.param_groups]
            found = {"optimizer": {"param_groups": groups}}
        step = torch.tensor(max((entry["step"].item() for entry in adam.state.values()), default=0.0))
        torch.distributed.all_reduce(step, op=torch.distributed.ReduceOp.MAX)
        for group in found["optimizer"]["param_groups"]:
            group["step"] = step.item()
        return found

    def get_without_step(self: Any, model_param: Any) -> Any:
        return {name: tensor for name, tensor in get_states(self, model_param).items() if name != "step"}

    @torch.no_grad()
    def set_without_step(self: Any, model_param: Any, tensors: Any) -> None:
        adam = self.optimizer
        group, order = self.model_param_group_index_map[model_param]
        main = adam.param_groups[group]["params"][order]
        for name, value in {"param": main, **adam.state[main]}.items():
            if name in tensors and name != "step":
                value.copy_(tensors[name])

    def load_with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for entry in self.optimizer.state.values():
            if torch.is_tensor(entry.get("step")):
                entry["step"] = entry["step"].clone()

    state_dict_with_state.mended = True  # type: ignore[attr-defined]
    cls.state_dict = state_dict_with_state
    cls.load_state_dict = load_with_own_steps
    cls._get_main_param_and_optimizer_states = get_without_step
    cls._set_main_param_and_optimizer_states = set_without_step


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Modules that are built inside are on torch's meta device.

    Megatron-Core (all versions) puts the rotary angles of YaRN and of latent attention on `torch.cuda.current_device()`, whatever the
    default device is: inside, that is meta too, and no CUDA context is made.
    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.0/megatron/core/models/common/embeddings/yarn_rotary_pos_embedding.py#L76
    """
    asked = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = asked
