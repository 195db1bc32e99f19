"""The command line: `moe2dense COMMAND [CONFIG.yaml] [key.path=value ...]`. Commands are imported when they run."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import megatron_moe2dense
from megatron_moe2dense.common import restarts
from megatron_moe2dense.common.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Command:
    """One subcommand: where its config class, its `run(config)` and its `dry_run(config)` live, and its help line.

    `run` does the work; `dry_run` returns the facts that `--dry-run` prints. `positional` names the key that a bare argument sets
    instead of naming a YAML file, with `positional_yaml` even when it is one (of another command); `flags` are keys that also exist
    as `--key [value]`.
    """

    config: str
    run: str
    dry_run: str
    help: str
    positional: str | None = None
    positional_yaml: bool = False
    flags: tuple[str, ...] = ()


def _command(module: str, config: str, help_line: str, dry_run: str | None = None, **options: Any) -> Command:
    """Of a module beside its config; `dry_run` where that is another module's."""
    package = module.rpartition(".")[0]
    return Command(f"{package}.config:{config}", f"{module}:run", dry_run or f"{module}:dry_run", help_line, **options)


COMMANDS = {
    "inspect": _command(
        "surgery.inspect",
        "InspectConfig",
        "family, sizes and dense shape of a checkpoint",
        positional="source",
        flags=("keep", "json", "download"),
    ),
    "init": _command("init.run", "InitConfig", "a folder of YAMLs and a run.sh for a MoE, its text and your GPUs", positional="source"),
    "data": _command("tokens.prepare", "DataConfig", "text files to Megatron .bin/.idx token files"),
    "calibrate": _command("surgery.calibrate", "CalibrateConfig", "expert statistics of a MoE on calibration text"),
    "score": _command("surgery.score", "ScoreConfig", "rank experts from statistics"),
    "select": _command("surgery.select", "SelectConfig", "a dense FFN's neurons out of all experts of a layer, for convert"),
    "convert": _command("surgery.convert", "ConvertConfig", "MoE checkpoint and statistics to a dense checkpoint"),
    "prune-dense": _command("surgery.prune_dense.prune", "PruneDenseConfig", "a dense model to a smaller one, by importance"),
    "sweep": _command("sweep.run", "SweepConfig", "every combination of scoring, grouping, scaling and K, evaluated in memory"),
    "auto": _command("sweep.auto", "AutoConfig", "the best plan for a number of parameters, by successive halving over a sweep"),
    "cache-teacher": _command("trainer.cache.write", "CacheTeacherConfig", "the teacher's top-k log-probabilities to disk, for distill"),
    "distill": _command(
        "trainer.distill",
        "DistillConfig",
        "train the dense student on the teacher's logits (Megatron-Core)",
        dry_run="operations.dry_run:distill",
    ),
    "export": _command(
        "serving.export", "ExportConfig", "trainer checkpoint to a Hugging Face checkpoint; either to GGUF or FP8", positional="checkpoint"
    ),
    "serve-check": _command("serving.check", "ServeCheckConfig", "whether engines compute what transformers does", positional="source"),
    "eval": _command("evals.evaluate", "EvalConfig", "perplexity, KL to the teacher, lm-eval accuracy, generation speed of checkpoints"),
    "make-task": _command("evals.local_task", "MakeTaskConfig", "a multiple-choice task for eval out of held-out tokens"),
    "doctor": _command(
        "operations.doctor.run",
        "DoctorConfig",
        "what this machine has, what distill would use, and what a config of it lacks here",
        positional="config",
        positional_yaml=True,
    ),
    "plan": _command(
        "operations.plan.run", "PlanConfig", "memory, messages and time of a layout on given GPUs, or the best layouts; on paper"
    ),
    "plot": _command("plots.plot", "PlotConfig", "figures from statistics, metrics and records"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit 0 done, 2 a UserError (one message on stderr), 1 a bug (traceback)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if restarts.noted():
        sys.exit(2)
    try:
        _dispatch(argv)
    except UserError as error:
        if "--traceback" in argv:
            traceback.print_exc()
        print(f"moe2dense: error\n{error}", file=sys.stderr)
        restarts.note(error)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our stdout (`| head`) has gone
        sys.stderr.close()
        sys.exit(0)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return
    if argv[0] == "--version":
        print(megatron_moe2dense.__version__)
        return
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or "see `moe2dense --help`"
        raise UserError(f"command {name!r}", f"one of {', '.join(COMMANDS)}", hint)
    _run(name, COMMANDS[name], rest)


def _run(name: str, command: Command, argv: list[str]) -> None:
    from megatron_moe2dense.common import config as configs
    from megatron_moe2dense.common import hub
    from megatron_moe2dense.common.log import start_logging

    if "-h" in argv or "--help" in argv:
        print(_command_help(name, command))
        return
    options, path, overrides = _parse(name, command, argv)
    start_logging()
    config = configs.load(_load(command.config), path, overrides)
    if not options.print_config and "download" not in type(config).model_fields:
        for source, need in hub.sources_of(config):  # before libraries are imported for it
            hub.download(source, need) if options.download else hub.located(source)
    if options.print_config:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
    elif options.dry_run:
        facts = _load(command.dry_run)(config)
        print(json.dumps({"config": config.model_dump(mode="json"), **facts}, indent=2))
    else:
        _load(command.run)(config)


def _parse(name: str, command: Command, argv: list[str]) -> tuple[argparse.Namespace, Path | None, list[str]]:
    parser = argparse.ArgumentParser(prog=f"moe2dense {name}", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(download=None)
    for flag in ("--dry-run", "--print-config", "--traceback", *(["--download"] if _may_download(command) else [])):
        parser.add_argument(flag, action="store_true")
    for flag in command.flags:
        parser.add_argument(f"--{flag}", nargs="?", const="true")
    try:
        options, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error), f"the options of `moe2dense {name}`", f"see `moe2dense {name} --help`") from None
    if unknown:
        hint = did_you_mean(unknown[0], parser._option_string_actions) or f"see `moe2dense {name} --help`"
        raise UserError(f"option {unknown[0]!r}", f"an option of `moe2dense {name}`", hint)
    bare = [item for item in options.arguments if "=" not in item]
    overrides = [item for item in options.arguments if "=" in item]
    overrides += [f"{flag}={getattr(options, flag)}" for flag in command.flags if getattr(options, flag) is not None]
    if len(bare) > 1:
        raise UserError(f"arguments {bare}", "at most one argument without `=`", "write settings as key.path=value")
    if bare and command.positional and (command.positional_yaml or not bare[0].endswith((".yaml", ".yml"))):
        return options, None, [f"{command.positional}={bare[0]}", *overrides]
    return options, Path(bare[0]) if bare else None, overrides


def _may_download(command: Command) -> bool:
    """Whether there can be models to download before the command runs: `inspect` does it itself, by a key."""
    from megatron_moe2dense.common import hub

    return "download" not in command.flags and hub.names_models(_load(command.config))


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"megatron_moe2dense.{module}"), name)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "moe2dense COMMAND [CONFIG.yaml] [key.path=value ...] [--dry-run] [--print-config] [--download] [--traceback]",
            "",
            "Turn a trained Mixture-of-Experts language model into a dense one.",
            "",
            *lines,
            "",
            "`moe2dense COMMAND --help` shows every key with type, default and unit. Models are folders, or owner/name[@revision] on the",
            "Hugging Face Hub: read from its cache, and brought there with --download.",
        ]
    )


def _command_help(name: str, command: Command) -> str:
    from megatron_moe2dense.common import config as configs
    from megatron_moe2dense.common.table import wrapped

    rows = list(configs.describe_keys(_load(command.config)))
    usage = f"[{command.positional.upper()}] " if command.positional else "[CONFIG.yaml] "
    flags = "".join(f"[--{flag}] " for flag in command.flags)
    download = "[--download] " if _may_download(command) else ""
    return "\n".join(
        [
            f"moe2dense {name} {usage}{flags}[key.path=value ...] [--dry-run] [--print-config] {download}[--traceback]",
            "",
            command.help,
            "",
            wrapped(["key", "type", "default", "meaning"], rows, max(80, shutil.get_terminal_size((140, 24)).columns)),
        ]
    )
