"""A fuzz of the check of checkpoints: each tensor in turn absent, of another shape, of another type, NaN, or there twice. Whatever is done,
a command either gives stock transformers' own result or exits 2 and names the tensor.

python -m tests.cases.fuzz [every=N] [subject ...]     # all of it, or one in N of these; prints the table of counts
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megatron_moe2dense.checkpoint.index import CheckpointIndex, TensorInfo
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.shards import TensorSpec
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.table import render
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.surgery.source import MoeSource
from tests.cases import fuzz_commands as commands
from tests.families.every import IMAGE_AND_TEXT, as_in_memory, moe_types, stock_class, tiny_checkpoint, wrapper_types
from tests.helpers.tiny_models import as_mxfp4, tiny

Tensors = dict[str, torch.Tensor]
# What is done to a tensor of a checkpoint; None where that can not be done to it, or changes nothing.
Fault = Callable[[Tensors, str], Tensors | None]


def _replaced(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Fault:
    def fault(tensors: Tensors, name: str) -> Tensors | None:
        changed = change(tensors[name])
        return None if changed is None else {**tensors, name: changed.contiguous()}

    return fault


def _typed(dtype: torch.dtype) -> Fault:
    return _replaced(lambda tensor: None if tensor.dtype == dtype else tensor.to(dtype))


def _doubled(rename: Callable[[str], str]) -> Fault:
    def fault(tensors: Tensors, name: str) -> Tensors | None:
        other = rename(name)
        return None if other in tensors else {**tensors, other: tensors[name] + 1}

    return fault


def _absent(tensors: Tensors, name: str) -> Tensors:
    return {each: tensor for each, tensor in tensors.items() if each != name}


def _transposed(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.transpose(-1, -2) if tensor.ndim > 1 and tensor.shape[-1] != tensor.shape[-2] else None


def _with_nan(tensors: Tensors, name: str) -> Tensors | None:
    changed = tensors[name].clone()
    if changed.is_floating_point():
        changed.view(-1)[-1] = torch.nan
    elif name.endswith("_scales"):  # of MXFP4
        changed.view(-1)[-1] = 255
    else:
        return None
    return {**tensors, name: changed}


FAULTS: dict[str, Fault] = {
    "absent": _absent,
    "a row less": _replaced(lambda tensor: tensor[:-1] if tensor.ndim else None),
    "transposed": _replaced(_transposed),
    "an axis less": _replaced(lambda tensor: tensor[0] if tensor.ndim else None),
    "an axis more": _replaced(lambda tensor: tensor[None]),
    "F16": _typed(torch.float16),
    "F64": _typed(torch.float64),
    "F8_E4M3": _typed(torch.float8_e4m3fn),
    "U8": _typed(torch.uint8),
    "I32": _typed(torch.int32),
    "BOOL": _typed(torch.bool),
    "NaN": _with_nan,
    "doubled": _doubled(lambda name: f"{name}_copy"),
    "doubled, a module more": _doubled(lambda name: f"module.{name}"),
    "doubled, a module less": _doubled(lambda name: name.partition(".")[2] or f"model.{name}"),
}
WRONG = ("silent", "unnamed", "traceback")


@dataclass(frozen=True)
class Outcome:
    """Of one fault. kind: `ran`, with stock's own result; `refused`, naming the tensor; or one of WRONG, and `said` tells what happened."""

    subject: str
    what: str
    fault: str
    tensor: str
    kind: str
    said: str = ""


Try = Callable[[], Outcome | None]  # None where the fault can not be made


def role(name: str) -> str:
    """What a tensor is: its name without numbers."""
    return re.sub(r"\d+", "*", name)


def one_a_role(names: Iterable[str]) -> list[str]:
    """The last tensor of each role: of a layer with experts, mostly."""
    return list({role(name): name for name in names}.values())


class Subject:
    """A tiny checkpoint in `folder`, opened once. make: writes it."""

    def __init__(self, name: str, make: Callable[[Path], object], folder: Path):
        self.name, self.folder, self.sound = name, folder, folder / "sound"
        make(self.sound)
        self.tensors: Tensors = load_file(self.sound / "model.safetensors")
        self.index = CheckpointIndex.open(self.sound)
        self.stock = Stock.read(self.sound)
        self._as_stock: dict[tuple[str, str], str] = {}
        self._results: dict[str, commands.Result] = {}

    def written(self, tensors: Tensors, name: str = "faulty") -> Path:
        """A folder with these tensors."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        shutil.copy(self.sound / "config.json", self.folder / name)
        save_file(tensors, self.folder / name / "model.safetensors", {"format": "pt"})
        return self.folder / name

    def headers(self, tensors: Tensors) -> CheckpointIndex:
        """What such a folder says of itself, without writing it."""
        specs, file = [TensorSpec.of(name, tensor) for name, tensor in tensors.items()], self.folder / "none"
        infos = {spec.name: TensorInfo(spec.name, file, spec.dtype, spec.shape, 0, spec.nbytes) for spec in specs}
        return CheckpointIndex(self.folder, self.index.config, infos)

    def check(self, fault: str, name: str) -> Outcome | None:
        """By headers alone, as every command begins. What passes is compared with what stock transformers loads, once a role."""

        def found(tensors: Tensors) -> str:
            Account.of(self.headers(tensors), self.stock)
            key = (role(name), fault)
            if key not in self._as_stock:
                self._as_stock[key] = self._unlike_stock(self.written(tensors))
            return self._as_stock[key]

        return self._outcome("headers", fault, name, found) if fault != "NaN" else None

    def _unlike_stock(self, folder: Path) -> str:
        """What of a checkpoint is read otherwise than stock transformers does; "" where nothing is."""
        kind = self.index.config["model_type"]
        cls: Any = stock_class(kind) if kind in (*moe_types(), *IMAGE_AND_TEXT) else AutoModelForCausalLM
        try:
            model, report = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
        except (RuntimeError, ValueError) as error:
            return f"stock transformers: {error}"
        if any(report.values()):
            return f"stock transformers: {report}"
        account = Account.open(folder)
        with CheckpointReader(account.index) as reader:
            read = account.values.reader(reader)
            for name, loaded in model.state_dict().items():
                if account.disk.names_of(name) and not account.disk.tensor(name, read).to(loaded.dtype).equal(loaded):
                    return f"{name} is another than in stock transformers"
        return ""

    def run(self, command: str, fault: str, name: str) -> Outcome | None:
        """A command on the faulty checkpoint; what it gives is compared with what it gives for the values that stock reads there."""

        def found(tensors: Tensors) -> str:
            result = self._result(command, self.written(tensors))
            differ = list(commands.differences(result, self._expected(command, tensors)))
            return f"{len(differ)} results such as {differ[0]}" if differ else ""

        return self._outcome(command, fault, name, found)

    def _expected(self, command: str, tensors: Tensors) -> commands.Result:
        as_read = {name: _as_read(tensors.get(name, tensor), tensor) for name, tensor in self.tensors.items()}
        if not all(as_read[name].equal(tensor) for name, tensor in self.tensors.items()):
            return self._result(command, self.written(as_read, "as stock reads it"))
        if command not in self._results:
            self._results[command] = self._result(command, self.sound)
        return self._results[command]

    def _result(self, command: str, model: Path) -> commands.Result:
        return commands.result(commands.ALL[command], self.place, model)

    @cached_property
    def commands(self) -> list[str]:
        """Those that take the sound checkpoint."""
        trained = self.name in TRAINED
        try:
            _ = MoeSource.open(self.sound).form
        except UserError:  # dense, or without a dense form
            return list(commands.DENSE) if trained else ["eval"]
        return list({**commands.SURGERY, **(commands.STREAMED | commands.TRAINER if trained else {})})

    @cached_property
    def place(self) -> commands.Place:
        return commands.prepared(self.folder, self.sound, "calibrate" in self.commands)

    def _outcome(self, what: str, fault: str, name: str, found: Callable[[Tensors], str]) -> Outcome | None:
        tensors = FAULTS[fault](self.tensors, name)
        if tensors is None:
            return None
        names = {name, name.removesuffix("_scales"), *(tensors.keys() - self.tensors.keys())}
        outcome = partial(Outcome, self.name, what, fault, name)
        try:
            wrong = found(tensors)
        except (UserError, commands.ExitedError) as error:
            named = any(each in str(error) for each in names)
            return outcome("refused") if named else outcome("unnamed", str(error))
        except Exception as error:
            return outcome("traceback", f"{type(error).__name__}: {error}")
        return outcome("silent", wrong) if wrong else outcome("ran")


def _as_read(stored: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
    """Values that stock computes with; the sound ones where they can not be."""
    same = stored.shape == sound.shape and not (stored.is_floating_point() and stored.isnan().any())
    return stored.to(sound.dtype) if same else sound


SIZES = {"vocab_size": commands.VOCABULARY}
TRAINED: dict[str, Callable[[Path], object]] = {
    **{f"{family}, trained": partial(tiny, family, **SIZES) for family in FAMILIES},
    "qwen3_moe, tied": partial(tiny, "qwen3_moe", **SIZES, tie_word_embeddings=True),
    "gpt_oss, MXFP4": lambda folder: as_mxfp4(tiny("gpt_oss", folder.parent / "plain", "bfloat16", **SIZES, intermediate_size=64), folder),
    "mixtral, in memory's layout": lambda folder: as_in_memory(tiny_checkpoint(folder.parent / "saved", "mixtral"), folder),
}
SUBJECTS: dict[str, Callable[[Path], object]] = {
    **{each: partial(tiny_checkpoint, model_type=each) for each in (*moe_types(), *wrapper_types())},
    **TRAINED,
}


def by_headers(subject: Subject) -> list[Try]:
    """Every tensor and fault."""
    return [partial(subject.check, fault, tensor) for tensor in subject.tensors for fault in FAULTS]


def by_commands(subject: Subject) -> list[Try]:
    """Faults of one tensor of each role, by each command that takes the checkpoint."""
    pairs = list(_for_commands(subject))
    return [partial(subject.run, command, fault, tensor) for command in subject.commands for fault, tensor in pairs]


def outcomes_of(name: str, ways: Sequence[Callable[[Subject], list[Try]]], every: int) -> Iterator[Outcome]:
    """Of one in `every`, by chance."""
    with TemporaryDirectory() as folder:
        subject = Subject(name, SUBJECTS[name], Path(folder))
        tries = [each for way in ways for each in way(subject)]
        for each in Random(name).sample(tries, -(-len(tries) // every)):
            outcome = each()
            if outcome is not None:
                yield outcome


def _for_commands(subject: Subject) -> Iterator[tuple[str, str]]:
    """One tensor of each role: with what only its values show, with another type, and with one of the other faults in turn, as every
    command begins with the same check."""
    others = [fault for fault in FAULTS if fault not in ("NaN", "F16")]
    for number, tensor in enumerate(one_a_role(subject.tensors)):
        for fault in ("NaN", "F16", others[number % len(others)]):
            yield fault, tensor


def table(outcomes: Sequence[Outcome], by: Callable[[Outcome], str]) -> str:
    """Counts, one row for each of what `by` tells, and all of them."""
    kinds: dict[str, list[str]] = {}
    for outcome in outcomes:
        kinds.setdefault(by(outcome), []).append(outcome.kind)
        kinds.setdefault("all", []).append(outcome.kind)
    rows = [[name, len(found), *(found.count(kind) for kind in ("ran", "refused", *WRONG))] for name, found in kinds.items()]
    return render(["", "tried", "ran", "refused", *WRONG], rows)


def main(arguments: Sequence[str]) -> None:
    """Print what is wrong as it is found, once where it is alike, then the tables."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    every = next((int(each.removeprefix("every=")) for each in arguments if each.startswith("every=")), 1)
    outcomes: list[Outcome] = []
    printed: set[tuple[str, ...]] = set()
    for name in [each for each in arguments if not each.startswith("every=")] or SUBJECTS:
        for outcome in outcomes_of(name, (by_headers, by_commands), every):
            outcomes.append(outcome)
            alike = (outcome.subject, outcome.what, outcome.kind, role(outcome.said))
            if outcome.kind in WRONG and alike not in printed:
                printed.add(alike)
                print(json.dumps(vars(outcome)), flush=True)
        print(name, len(outcomes), flush=True)
    for by in (lambda each: each.subject, lambda each: each.what, lambda each: each.fault):
        print(table(outcomes, by), end="\n\n")
    sys.exit(any(outcome.kind in WRONG for outcome in outcomes))


if __name__ == "__main__":
    main(sys.argv[1:])
