"""`moe2dense init`: from a MoE, its text and the GPUs there are to a folder of commented YAMLs and a run.sh that goes through them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import write_text
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.init.config import InitConfig
from megatron_moe2dense.init.files import Facts, files_of
from megatron_moe2dense.init.sizes import Sizes, sizes_of
from megatron_moe2dense.operations.plan.config import PlanConfig, TextConfig
from megatron_moe2dense.operations.plan.hardware import Machine
from megatron_moe2dense.operations.plan.run import decide
from megatron_moe2dense.operations.plan.search import Verdict
from megatron_moe2dense.surgery.layout import dense_config, dense_size
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.types import check_keep
from megatron_moe2dense.tokens import prepare
from megatron_moe2dense.tokens.config import DataConfig
from megatron_moe2dense.tokens.tokenizers import open_tokenizer
from megatron_moe2dense.trainer.config import BatchConfig, OptimConfig, TeacherConfig

_LENGTH = 2048
_END = "<|endoftext|>"  # of pretraining, in tokenizers whose own end-of-sequence token ends chat turns


def run(config: InitConfig) -> None:
    """Write the files; prints what to look at, and how to start.

    Raises:
        UserError: no MoE with an exact dense form, no text or too little, no tokenizer, no layout that fits, files in the way.
    """
    facts, output = _facts(config), Path(_output(config))
    files = files_of(facts)
    there = sorted(str(output / name) for name in files if (output / name).exists())
    if there and not config.overwrite:
        raise UserError(f"existing {', '.join(there)}", "a folder without them", "choose another output, or add overwrite=true")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}", "a folder that can be made", "choose another output") from None
    for name, text in files.items():
        write_text(output / name, text)
    (output / "run.sh").chmod(0o755)
    print("\n".join(f"{output / name}" for name in files))
    print(f"\n{facts.summary()}\nlook at them, then: {output}/run.sh")


def dry_run(config: InitConfig) -> dict[str, Any]:
    """The files that would be written, with their content."""
    return {"reads": [config.source, config.text], "writes": {f"{_output(config)}/{name}": text for name, text in _content(config).items()}}


def _content(config: InitConfig) -> dict[str, str]:
    return files_of(_facts(config))


def _output(config: InitConfig) -> str:
    return config.output or f"out/{Path(config.source).absolute().name or Path(config.source).resolve().name}"


def _facts(config: InitConfig) -> Facts:
    source = MoeSource.open(config.source)
    keep = config.keep or source.dims.active
    check_keep(keep, source.dims.experts)
    data = _data(config)
    length = config.sequence_length or min(_LENGTH, source.dims.max_positions or _LENGTH)
    sizes = sizes_of(prepare.estimated_tokens(data), length, config.tokens, config.hardware.world())
    trains = source.family in FAMILIES
    here = os.path.relpath(Path.cwd(), Path(_output(config)).absolute())
    return Facts(
        source=config.source,
        output=_output(config),
        keep=keep,
        data=data.model_copy(update={"validation_fraction": sizes.held_out}),
        sizes=sizes,
        machine=Machine(config.hardware),
        layout=_layout(config, source, keep, sizes) if trains else None,
        parameters=dense_size(source, keep)[0],
        back=here,
    )


def _data(config: InitConfig) -> DataConfig:
    tokenizer = open_tokenizer(config.source)
    end = _END if tokenizer.token_id(_END) is not None else None
    workers = max(1, min(32, (os.cpu_count() or 1) // 2))
    return DataConfig(source=config.text, tokenizer=config.source, output=f"{_output(config)}/tokens", eod_token=end, workers=workers)


def _layout(config: InitConfig, source: MoeSource, keep: int, sizes: Sizes) -> Verdict:
    """The fastest that fits, of a student that is not there yet but for its config."""
    dense = dense_config(source, keep)
    with tempfile.TemporaryDirectory() as folder:
        student = Path(folder) / "config.json"
        student.write_text(json.dumps(dense), encoding="utf-8")
        wanted = PlanConfig(
            student=str(student),
            teacher=TeacherConfig(path=config.source),
            hardware=config.hardware,
            data=TextConfig(sequence_length=sizes.length),
            optim=OptimConfig(),
            batch=None,
        )
        best: list[Verdict] = []
        for micro in (1, 2, 4, 8):
            if sizes.batch % micro == 0:
                batch = BatchConfig.model_validate({"micro": micro, "global": sizes.batch})
                try:
                    best.append(decide(wanted.model_copy(update={"batch": batch}))[0][0])
                except UserError:
                    if micro == 1:
                        raise
    return min(best, key=lambda verdict: verdict.step.seconds)
