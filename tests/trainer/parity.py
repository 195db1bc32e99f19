"""The parity table: two optimizer steps of the trainer in every layout, against stock transformers models in one process.

`make parity` prints it, `test_parity_table.py` asserts it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe2dense.common import table
from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.trainer.parity_worker import samples
from tests.trainer.stock import Balance, StockRun, train

LENGTH, SAMPLES, STEPS, LR, MUON_LR = 32, 8, 2, 1e-3, 2e-3  # the second step has the first one's moments
MASKED = 7


WHOLE = {"distributed_optimizer": False}  # Muon's matrices


@dataclass(frozen=True)
class Layout:
    """`parallel` on so many processes; student and teacher by the names of `write_inputs`. moe: coefficients of balancing losses."""

    processes: int
    parallel: dict[str, Any] = field(default_factory=dict)
    student: str = "student"
    teacher: str | None = "teacher"
    dtype: str = "float32"
    optimizer: str = "adamw"
    moe: tuple[float, float] | None = None

    @property
    def micro(self) -> int:
        """Samples in a micro-batch."""
        return 2 if self.parallel.get("pipeline", 1) == 1 else 1

    @property
    def reference(self) -> tuple[str, str | None, str, Balance | None]:
        """What decides the numbers: student, teacher, optimizer, balancing losses."""
        return self.student, self.teacher, self.optimizer, Balance(*self.moe, self.micro) if self.moe else None


LAYOUTS: dict[str, Layout] = {
    "TP1": Layout(1),
    "full recompute": Layout(1, {"recompute": "full"}),
    "selective recompute": Layout(1, {"recompute": "selective"}),
    "TP2": Layout(2, {"tensor": 2}),
    "TP2 SP": Layout(2, {"tensor": 2, "sequence": True}),
    "TP2 SP, full recompute": Layout(2, {"tensor": 2, "sequence": True, "recompute": "full"}),
    "PP2": Layout(2, {"pipeline": 2}),
    "PP2, tied embeddings": Layout(2, {"pipeline": 2}, student="tied student"),
    "PP2 interleaved": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP2 unequal": Layout(2, {"pipeline": 2, "layers_per_stage": [3, 1], "teacher_layers_per_stage": [4, 2]}),
    "PP2, heads alone": Layout(2, {"pipeline": 2, "layers_per_stage": [4, 0], "teacher_layers_per_stage": [6, 0]}),
    "DP2": Layout(2),
    "DP2 plain optimizer": Layout(2, {"distributed_optimizer": False}),
    "EP2 teacher": Layout(2, {"expert": 2}),
    "DP2, overlapped reduction": Layout(2, {"overlap_gradients": True}),
    "CP2": Layout(2, {"context": 2}),
    "CP2 plain optimizer": Layout(2, {"context": 2, "distributed_optimizer": False}),
    "TP4, shared KV heads": Layout(4, {"tensor": 4}),
    "TP4 SP, shared KV heads": Layout(4, {"tensor": 4, "sequence": True}),
    "TP2 x PP2": Layout(4, {"tensor": 2, "pipeline": 2}),
    "TP2 SP x PP2 interleaved": Layout(4, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}),
    "TP2 SP x EP2 teacher": Layout(4, {"tensor": 2, "sequence": True, "expert": 2}),
    "PP2 x DP2": Layout(4, {"pipeline": 2}),
    "PP2 interleaved x DP2, overlapped": Layout(4, {"pipeline": 2, "virtual_pipeline": 2, "overlap_gradients": True}),
    "CP2 x TP2 SP": Layout(4, {"context": 2, "tensor": 2, "sequence": True}),
    "CP2 x PP2 unequal": Layout(4, {"context": 2, "pipeline": 2, "layers_per_stage": [3, 1]}),
    "Muon": Layout(1, WHOLE, optimizer="muon"),
    "Muon TP2 SP": Layout(2, {"tensor": 2, "sequence": True, **WHOLE}, optimizer="muon"),
    "Muon PP2, heads alone": Layout(2, {"pipeline": 2, "layers_per_stage": [4, 0], **WHOLE}, optimizer="muon"),
    "Muon TP2 x DP2": Layout(4, {"tensor": 2, **WHOLE}, optimizer="muon"),
    "Muon TP4, shared KV heads": Layout(4, {"tensor": 4, **WHOLE}, optimizer="muon"),
    "bf16 Muon": Layout(1, WHOLE, dtype="bfloat16", optimizer="muon"),
    "bf16": Layout(1, dtype="bfloat16"),
    "bf16 TP2": Layout(2, {"tensor": 2}, dtype="bfloat16"),
    "bf16 PP2": Layout(2, {"pipeline": 2}, dtype="bfloat16"),
    "bf16 DP2": Layout(2, dtype="bfloat16"),
    # plain language modelling of the MoE itself
    "MoE": Layout(1, student="teacher", teacher=None),
    "MoE EP2": Layout(2, {"expert": 2}, student="teacher", teacher=None),
    "MoE EP2 x CP2": Layout(4, {"expert": 2, "context": 2}, student="teacher", teacher=None),
    "MoE EP2 x PP2 interleaved": Layout(4, {"expert": 2, "pipeline": 2, "virtual_pipeline": 3}, student="teacher", teacher=None),
    "MoE EP4, full recompute": Layout(4, {"expert": 4, "recompute": "full"}, student="teacher", teacher=None),
    # the same with balancing losses that outweigh it
    **{
        f"balanced MoE{' ' * bool(name)}{name}": Layout(processes, parallel, student="teacher", teacher=None, moe=(0.5, 0.05))
        for name, (processes, parallel) in {
            "": (1, {}),
            "full recompute": (1, {"recompute": "full"}),
            "TP2 SP": (2, {"tensor": 2, "sequence": True}),
            "CP2": (2, {"context": 2}),
            "DP2": (2, {}),
            "EP2": (2, {"expert": 2}),
            "PP2": (2, {"pipeline": 2}),
            "PP2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 3}),
            "CP2 x TP2 SP": (4, {"context": 2, "tensor": 2, "sequence": True}),
            "TP4 SP, shared KV heads": (4, {"tensor": 4, "sequence": True}),
            "TP2 SP x EP2": (4, {"tensor": 2, "sequence": True, "expert": 2}),
            "PP2 x DP2": (4, {"pipeline": 2}),
            "CP2 x EP2 x DP2": (4, {"context": 2, "expert": 2}),
        }.items()
    },
}


@dataclass(frozen=True)
class Differences:
    """Worst relative differences; of tensors in norm.

    Attributes:
        loss: of any step, gradient norms included. gradients: of a tensor at the first step, where weights are still equal.
        later_gradients: at any other step. weights: after the last.
    """

    loss: float
    gradients: float
    later_gradients: float
    weights: float


def write_inputs(root: Path) -> None:
    """Models of different depth, and text a fifth of which is masked, unevenly."""
    # of seeds with which no token's second and third expert are closer than 1e-4 at any step (stock.train asserts 5e-5)
    tiny_qwen3_moe(root / "teacher", seed=3, num_hidden_layers=6)
    tiny_qwen3(root / "student", seed=2)
    tiny_qwen3(root / "tied student", seed=3, tie_word_embeddings=True)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 256, LENGTH * SAMPLES * STEPS + 1)
    tokens[(np.arange(len(tokens)) % LENGTH < 12) & (generator.random(len(tokens)) < 0.5)] = MASKED
    write_tokens(root / "tokens", tokens)


def config(root: Path, name: str, **changed: Any) -> dict[str, Any]:
    """The run of one layout."""
    layout = LAYOUTS[name]
    return {
        "student": str(root / layout.student),
        "teacher": str(root / layout.teacher) if layout.teacher else None,
        "output": str(root / "runs" / name),
        "data": {"path": str(root / "tokens"), "sequence_length": LENGTH, "pad_token": MASKED},
        "parallel": layout.parallel,
        "optim": {"lr": LR, "muon": {"lr": MUON_LR} if layout.optimizer == "muon" else None},
        "schedule": {"style": "constant", "warmup": 0.0},
        "batch": {"micro": layout.micro, "global": SAMPLES},
        "train": {"steps": STEPS},
        "teacher_check": {"loss_bound": None, "stock_forward": "never"} if layout.teacher else None,  # its weights are random
        "moe": dict(zip(("aux_loss", "z_loss"), layout.moe, strict=True)) if layout.moe else None,
        "dtype": layout.dtype,
        **changed,
    }


def references(root: Path) -> dict[tuple[str, str | None, str, Balance | None], StockRun]:
    """By what decides the numbers, on the samples that the trainer reads in a single process."""
    steps = samples(config(root, "TP1", output=str(root / "samples")))
    found = {}
    for number, key in enumerate(dict.fromkeys(layout.reference for layout in LAYOUTS.values())):
        student, teacher, name, balance = key
        rates = (LR, MUON_LR if name == "muon" else None)
        models = (root / student, root / teacher if teacher else None, balance)
        found[key] = train(models, steps, rates, root / "references" / str(number))
    return found


def measure(root: Path) -> dict[str, Differences]:
    """Train every layout; one spawn for each number of processes."""
    expected, measured = references(root), {}
    for processes in sorted({layout.processes for layout in LAYOUTS.values()}):
        cases = {
            name: (config(root, name), expected[layout.reference]) for name, layout in LAYOUTS.items() if layout.processes == processes
        }
        measured |= launch(processes, "tests.trainer.parity_worker:differences", cases)
    return {name: Differences(**measured[name]) for name in LAYOUTS}


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        measured = measure(Path(folder))
    print(f"{STEPS} steps: worst relative difference from stock transformers in one process, in float32")
    header = ("layout", "processes", "loss", "gradients, step 1", "later", "weights")
    rows = [(name, LAYOUTS[name].processes, *(f"{value:.1e}" for value in vars(found).values())) for name, found in measured.items()]
    print(table.render(header, rows))


if __name__ == "__main__":
    main()
