"""The files of `init`: a YAML for each command, each key with a reason, and a script that runs them and goes on where it was stopped."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from megatron_moe2dense.common.progress import duration
from megatron_moe2dense.init.sizes import Sizes, validation
from megatron_moe2dense.operations.plan.hardware import Machine
from megatron_moe2dense.operations.plan.search import Verdict
from megatron_moe2dense.tokens.config import DataConfig


@dataclass(frozen=True)
class Facts:
    """What the files say.

    Attributes:
        keep: experts of width of the dense FFN. layout: of distill; None for a family that the trainer does not build.
        parameters: of the dense model. back: the way from the output to where the user stood, whose paths these are.
    """

    source: str
    output: str
    keep: int
    data: DataConfig
    sizes: Sizes
    machine: Machine
    layout: Verdict | None
    parameters: int
    back: str

    @property
    def steps(self) -> int:
        """Of distill."""
        return self.sizes.tokens // (self.sizes.batch * self.sizes.length)

    @property
    def hours(self) -> float:
        """Of distill, on paper."""
        assert self.layout is not None
        return self.layout.step.seconds * self.steps / 3600

    def summary(self) -> str:
        """For people."""
        size = f"dense: {self.parameters:,} parameters (K = {self.keep})"
        if self.layout is None:
            return f"{size}; the trainer has no mapping for this family, so there is no distill.yaml"
        gpus = self.machine.config.world()
        return (
            f"{size}; distill: {self.sizes.tokens:,} tokens, {self.steps:,} steps, about {duration(self.hours * 3600)} on {gpus} x "
            f"{self.machine.config.gpu}, {self.hours * gpus:,.1f} GPU-hours, {self.hours * gpus * self.machine.price:,.0f} USD, on paper"
        )


def _yaml(value: Any) -> str:
    """A scalar or a flow list, which JSON's quoting makes YAML of."""
    return json.dumps(value, ensure_ascii=False)


def files_of(facts: Facts) -> dict[str, str]:
    """Name to content."""
    made = {"data.yaml": _data(facts), "calibrate.yaml": _calibrate(facts), "convert.yaml": _convert(facts)}
    if facts.layout is not None:
        made |= {"distill.yaml": _distill(facts, facts.layout), "export.yaml": _export(facts)}
    return {**made, "eval.yaml": _eval(facts), "run.sh": _run(facts)}


def _data(facts: Facts) -> str:
    data, out = facts.data, facts.output
    end = "    # ends each document" if data.eod_token else "    # null: the tokenizer's own end-of-sequence token"
    return f"""# moe2dense data
# Text to token files: {out}/tokens.bin/.idx, and {out}/tokens_validation.bin/.idx, which nothing trains on.
source: {_yaml(data.source)}
tokenizer: {_yaml(data.tokenizer)}
output: {_yaml(f"{out}/tokens")}
eod_token: {_yaml(data.eod_token)}{end}
validation_fraction: {data.validation_fraction}    # of the documents
workers: {data.workers}    # processes
"""


def _calibrate(facts: Facts) -> str:
    return f"""# moe2dense calibrate
# What every expert does on the text, one layer in memory at a time. Under torchrun each process takes a share of the sequences.
source: {_yaml(facts.source)}
output: {_yaml(f"{facts.output}/statistics")}
data: {{path: {_yaml(f"{facts.output}/tokens")}, sequence_length: {facts.sizes.length}, sequences: 512, seed: 0}}    # the paper's 512
batch_tokens: 16384    # of one forward pass: less where memory is short
"""


def _convert(facts: Facts) -> str:
    return f"""# moe2dense convert
# {facts.keep} experts of each layer, side by side in one FFN: {facts.parameters:,} parameters. Better starts: docs/beyond.md.
source: {_yaml(facts.source)}
statistics: {_yaml(f"{facts.output}/statistics")}
output: {_yaml(f"{facts.output}/dense")}
keep: {facts.keep}
groups: {facts.keep}
score: {{method: do_acp}}    # the paper's best
scale: {{method: uniform}}
"""


def _distill(facts: Facts, layout: Verdict) -> str:
    job, out, sizes = layout.job, facts.output, facts.sizes
    parallel = job.parallel
    names = ("tensor", "sequence", "pipeline", "virtual_pipeline", "context", "expert", "recompute", "distributed_optimizer")
    block = ", ".join(f"{name}: {_yaml(getattr(parallel, name))}" for name in names)
    whole = job.batch.micro * job.data * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
    read = validation(sizes, whole)
    held_out = [] if read is None else [f"  validation: {_yaml(f'{out}/tokens_validation')}", f"  validation_sequences: {read}"]
    lines = "".join(f"{line}\n" for line in held_out)
    evaluate = "" if read is None else f", eval_every: {max(1, facts.steps // 20)}"
    return f"""# moe2dense distill
# The dense student learns the frozen MoE's next-token distributions, each sample once.
# {facts.summary()}.
# `moe2dense plan {out}/distill.yaml parallel=null` compares layouts, `moe2dense doctor {out}/distill.yaml` looks at a machine.
student: {_yaml(f"{out}/dense")}
teacher: {_yaml(facts.source)}
output: {_yaml(f"{out}/run")}
data:
  path: {_yaml(f"{out}/tokens")}
{lines}  sequence_length: {sizes.length}
loss: {{method: forward_kl}}
# The fastest layout that fits {facts.machine.config.world()} x {facts.machine.config.gpu}: {layout.bytes / 1e9:.1f} GB of a GPU, on paper.
parallel: {{{block}}}
batch: {{micro: {job.batch.micro}, global: {sizes.batch}}}    # sequences of a call and of a step
optim: {{lr: 1e-4, betas: [0.9, 0.95], weight_decay: 0.1, clip: 1.0}}
schedule: {{style: cosine, warmup: 0.02, final: 0.1}}
# Whole batches of what the text surely has: tokens.json says how many there are once data has run.
train: {{tokens: {sizes.tokens}, save_every: {max(1, facts.steps // 20)}{evaluate}, seed: 0}}
dtype: bfloat16
"""


def _export(facts: Facts) -> str:
    return f"""# moe2dense export
# The last checkpoint of the run, as a Hugging Face folder that stock transformers and vLLM load.
checkpoint: {_yaml(f"{facts.output}/run")}
output: {_yaml(f"{facts.output}/export")}
"""


def _eval(facts: Facts) -> str:
    models = {"dense": f"{facts.output}/dense", **({} if facts.layout is None else {"distilled": f"{facts.output}/export"})}
    named = "".join(f"  {name}: {_yaml(place)}\n" for name, place in models.items())
    return f"""# moe2dense eval
# Perplexity, and KL(teacher || model), on text that nothing was trained on. Benchmarks: `harness: {{preset: paper}}` (docs/operations.md).
models:
{named}output: {_yaml(f"{facts.output}/records.jsonl")}
perplexity:
  data: {{path: {_yaml(f"{facts.output}/tokens_validation")}, sequence_length: {facts.sizes.length}, sequences: 256}}
kl: {{teacher: {_yaml(facts.source)}}}
"""


def _run(facts: Facts) -> str:
    out, hardware = shlex.quote(facts.output), facts.machine.config
    trains = facts.layout is not None
    distill = f"""
# Stopped, it goes on from its last checkpoint. doctor refuses what this machine lacks before the GPUs are taken.
if ! grep -qs '"status": "finished"' "$out/run/moe2dense.json"; then
    moe2dense doctor "$out/distill.yaml" processes={hardware.world()}
    "${{launcher[@]}}" distill "$out/distill.yaml"
fi
[[ -e $out/export ]] || moe2dense export "$out/export.yaml"
"""
    launcher = f"""# What starts a command on all GPUs. Inside a Slurm job of several nodes: launch/srun.sh of the checkout.
read -ra launcher <<< "${{LAUNCHER:-{_launcher(facts)}}}"
"""
    return f"""#!/usr/bin/env bash
# From the MoE to a distilled dense model: every step of the YAMLs beside this file. Started again it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"/{shlex.quote(facts.back)}    # the paths of the YAMLs begin there
out={out}
{launcher}
[[ -e $out/tokens.json ]] || moe2dense data "$out/data.yaml"
[[ -e $out/statistics ]] || "${{launcher[@]}}" calibrate "$out/calibrate.yaml"
[[ -e $out/dense ]] || moe2dense convert "$out/convert.yaml"
{distill if trains else ""}
[[ -e $out/records.jsonl ]] || moe2dense eval "$out/eval.yaml"
moe2dense plot records="[$out/records.jsonl{", $out/run/metrics.jsonl" if trains else ""}]" output="$out/figures" overwrite=true
"""


def _launcher(facts: Facts) -> str:
    hardware = facts.machine.config
    if hardware.nodes_in_all() > 1:
        return "launch/srun.sh"
    return f"torchrun --standalone --nproc-per-node {hardware.world()} -m megatron_moe2dense"
