"""Commands on a checkpoint with a fault, and on the checkpoint that stock transformers reads it as: the second half of tests.cases.fuzz."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.cli import main
from tests.helpers.tiny_models import write_tokens

LENGTH, WINDOWS, VOCABULARY = 16, 6, 128
# What differs between two checkpoints whose values are equal: types and places in the files.
_OF_FILES = ("fingerprint", "bytes", "source", "gpus_for_weights", "tokenizer")
_UNCHECKED = ("teacher_check.loss_bound=null", "teacher_check.stock_forward=never")  # a teacher that learnt nothing
_GRID = "grid={score: [sf], group: [anchor], scale: [uniform], keep: [2]}"
Result = dict[str, Any]


class ExitedError(Exception):
    """A command ended with exit code 2; its message."""


def run(arguments: list[str]) -> str:
    """What a command prints. ExitedError: it exits with 2."""
    printed, said = StringIO(), StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(said):
            main(arguments)
    except SystemExit:  # with 2: any other end is an exception of its own
        raise ExitedError(said.getvalue()) from None
    return printed.getvalue()


@dataclass(frozen=True)
class Place:
    """What stands around a checkpoint: texts, statistics of it, a dense student, and where a command writes."""

    folder: Path

    @property
    def text(self) -> list[str]:
        return [f"data.path={self.folder}/text", f"data.sequence_length={LENGTH}"]

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def statistics(self, moe: Path) -> str:
        """Those of the sound checkpoint, as if they were made from this one."""
        made = self.folder / "statistics"
        of = self.folder / "statistics of"
        shutil.rmtree(of, ignore_errors=True)
        shutil.copytree(made, of)
        manifest = json.loads((made / "moe2dense.json").read_text())
        manifest["source"]["fingerprint"] = CheckpointIndex.open(moe).fingerprint()
        (of / "moe2dense.json").write_text(json.dumps(manifest))
        return f"statistics={of}"


def prepared(folder: Path, moe: Path, pruned: bool) -> Place:
    """Texts, and, of a MoE that the surgery takes, statistics and a student."""
    write_tokens(folder / "text", LENGTH * WINDOWS, VOCABULARY)
    place = Place(folder)
    if pruned:
        run(["calibrate", f"source={moe}", f"output={folder}/statistics", *place.text])
        run(["convert", f"source={moe}", f"statistics={folder}/statistics", f"output={folder}/student"])
    return place


def _inspect(_place: Place, moe: Path) -> Result:
    return _facts(json.loads(run(["inspect", str(moe), "--json"])))


def _facts(content: Any) -> Any:
    return {name: _facts(value) for name, value in content.items() if name not in _OF_FILES} if isinstance(content, dict) else content


def _calibrate(place: Place, moe: Path) -> Result:
    run(["calibrate", f"source={moe}", f"output={place.output}", *place.text])
    return load_file(place.output / "stats.safetensors")


def _select(place: Place, moe: Path) -> Result:
    run(["select", f"source={moe}", place.statistics(moe), f"output={place.output}", *place.text])
    return _plan(place.output)


def _plan(output: Path) -> Result:
    return {"layers": json.loads((output / "plan.json").read_text())["layers"]}


def _convert(place: Place, moe: Path) -> Result:
    run(["convert", f"source={moe}", place.statistics(moe), f"output={place.output}"])
    return {name: tensor.float() for name, tensor in load_file(place.output / "model.safetensors").items()} | _plan(place.output)


def _sweep(place: Place, moe: Path) -> Result:
    run(["sweep", f"source={moe}", place.statistics(moe), f"output={place.output}", *place.text, _GRID])
    return _metrics(place.output / "records.jsonl")


def _auto(place: Place, moe: Path) -> Result:
    texts = [*place.text, f"refit_data={{path: {place.folder}/text, sequence_length: {LENGTH}}}"]
    run(["auto", f"source={moe}", place.statistics(moe), f"output={place.output}", *texts, _GRID])
    return _plan(place.output)


def _metrics(records: Path) -> Result:
    return {row["model"]: row["metrics"] for row in map(json.loads, records.read_text().splitlines())}


def _eval(place: Place, moe: Path) -> Result:
    data = f"perplexity.data={{path: {place.folder}/text, sequence_length: {LENGTH}}}"
    run(["eval", f"models={{it: {moe}}}", f"output={place.output}", data])
    return _metrics(place.output)


def _cache(place: Place, moe: Path) -> Result:
    run(["cache-teacher", f"teacher={moe}", f"output={place.output}", *place.text, "samples=2", "k=4", "dtype=float32", *_UNCHECKED])
    return {file.name: file.read_bytes() for file in place.output.rglob("*") if file.suffix != ".json"}


def _distill(place: Place, *models: str) -> Result:
    batch = ["batch.micro=1", "batch.global=2", "train.steps=1", "dtype=float32"]
    run(["distill", *models, f"output={place.output}", *place.text, *batch])
    return {"loss": [json.loads(line).get("loss") for line in (place.output / "metrics.jsonl").read_text().splitlines()]}


def _teacher(place: Place, moe: Path) -> Result:
    return _distill(place, f"student={place.folder}/student", f"teacher={moe}", *_UNCHECKED)


def _student(place: Place, moe: Path) -> Result:
    return _distill(place, f"student={moe}", "teacher=null", "loss={method: cross_entropy}")


def _prune_dense(place: Place, dense: Path) -> Result:
    run(["prune-dense", f"source={dense}", f"output={place.output}", *place.text, "target.intermediate_size=64"])
    return {name: tensor.float() for name, tensor in load_file(place.output / "model.safetensors").items()}


Command = Callable[[Place, Path], Result]
# What every MoE that becomes a dense model goes through; what reads whole models beside it; and what Megatron-Core has to build.
SURGERY: dict[str, Command] = {"inspect": _inspect, "calibrate": _calibrate, "convert": _convert, "eval": _eval}
STREAMED: dict[str, Command] = {"select": _select, "sweep": _sweep, "auto": _auto}
TRAINER: dict[str, Command] = {"cache-teacher": _cache, "distill teacher": _teacher, "distill student": _student}
DENSE: dict[str, Command] = {"inspect": _inspect, "prune-dense": _prune_dense, "eval": _eval, "distill student": _student}
ALL: dict[str, Command] = {**SURGERY, **STREAMED, **TRAINER, **DENSE}


def result(command: Command, place: Place, model: Path) -> Result:
    """Of a command whose output goes away."""
    try:
        return command(place, model)
    finally:
        for left in (place.output, Path(f"{place.output}.tmp")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


def differences(found: Result, expected: Result) -> Iterator[str]:
    """Names of what is not equal."""
    for name in found.keys() | expected.keys():
        ours, theirs = found.get(name), expected.get(name)
        if not (ours.equal(theirs) if torch.is_tensor(ours) and torch.is_tensor(theirs) else ours == theirs):
            yield name
