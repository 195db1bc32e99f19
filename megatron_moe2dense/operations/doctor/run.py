"""`moe2dense doctor`: the report, and exit code 2 when something in it would stop a run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from megatron_moe2dense.common import config as configs
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.table import render
from megatron_moe2dense.operations.doctor.config import DoctorConfig
from megatron_moe2dense.operations.doctor.machine import gpus, machine, torch_on
from megatron_moe2dense.operations.doctor.packages import Finding, packages
from megatron_moe2dense.trainer.config import DistillConfig


def run(config: DoctorConfig) -> None:
    """Print what was found, what a run would use, and what is wrong.

    Raises:
        UserError: at least one line of the report is an error; all of them are named.
    """
    job = configs.load(DistillConfig, Path(config.config), config.settings) if config.config is not None else None
    devices = gpus()
    findings = packages(has_gpu=bool(devices))
    sections = {"found": [*findings, *machine(devices, os.environ)]}
    if not _errors(findings):  # else importing torch or Megatron-Core may fail
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron-Core's, of packages that are not installed: the report says so
            from megatron_moe2dense.operations.doctor.readiness import Resources, judge
            from megatron_moe2dense.operations.doctor.used import used

        sections["found"] += torch_on(devices)
        sections["would be used"] = used(job)
        if job is not None:
            sections["this config"] = judge(job, Resources(devices, config.processes))
    for title, rows in sections.items():
        print(f"\n{render([title, ''], [[row.name, _text(row)] for row in rows])}")
    _conclude([row for rows in sections.values() for row in rows])


def dry_run(_config: DoctorConfig) -> dict[str, Any]:
    """The command itself changes nothing."""
    return {"reads": ["package metadata", "nvidia-smi", "the files of the config"], "writes": []}


def _text(row: Finding) -> str:
    return row.found if row.level == "fine" else f"{row.found}  <- {row.level}: {row.do}"


def _errors(rows: list[Finding]) -> list[Finding]:
    return [row for row in rows if row.level == "error"]


def _conclude(rows: list[Finding]) -> None:
    errors, warnings = _errors(rows), [row for row in rows if row.level == "warning"]
    if errors:
        print()
        raise UserError(
            "; ".join(f"{row.name}: {row.found}" for row in errors), "a machine and a config that fit", "; ".join(row.do for row in errors)
        )
    print(f"\n{len(warnings)} warnings, nothing that would stop a run" if warnings else "\nnothing wrong")
