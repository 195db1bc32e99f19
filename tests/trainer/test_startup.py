"""One check of a run: every error of its start-up is one of it, and doctor, `--dry-run` and the run itself say the same."""

from __future__ import annotations

import ast
import itertools
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.operations import dry_run
from megatron_moe2dense.operations.doctor import readiness
from megatron_moe2dense.operations.doctor.readiness import Resources, judge
from megatron_moe2dense.trainer import distill, groups, runtime, startup
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.layout import answers, refuse
from megatron_moe2dense.trainer.model import ModelSpec
from tests.trainer import faked_world
from tests.trainer.startup_cases import CASES, OTHERS, config, write_inputs

pytestmark = pytest.mark.slow

TRAINER = Path(distill.__file__).parent


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("startup"))


def sites() -> Iterator[str]:
    """File and function of every UserError of the trainer."""
    for file in sorted(TRAINER.rglob("*.py")):
        yield from (f"{file.relative_to(TRAINER).as_posix()} {name}" for name in _raising(ast.parse(file.read_text()), []))


def _raising(node: ast.AST, inside: list[str]) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
        if isinstance(child, ast.Call) and getattr(child.func, "id", None) == "UserError":
            yield ".".join(inside)
        yield from _raising(child, [*inside, child.name] if named else inside)


def test_every_error_of_the_start_up_is_one_of_the_check():
    """A new UserError of the trainer is either asked before the start, with a case here, or belongs to what no header says."""
    checked = {site for _, _, site in CASES.values() if not site.startswith(("tokens/", "common/"))}
    assert not checked & set(OTHERS)
    assert set(sites()) == checked | set(OTHERS)


class Raised:
    """UserErrors that were made, and the functions that made them, by file (in the trainer, or in the package) and name."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.sites: set[str] = set()
        make = UserError.__init__

        def watched(error: UserError, *arguments: Any) -> None:
            code = sys._getframe(1).f_code
            file = Path(code.co_filename)
            folder = TRAINER if file.is_relative_to(TRAINER) else TRAINER.parent
            name = code.co_qualname.replace(".<locals>", "").removesuffix(".<genexpr>")
            self.sites.add(f"{file.relative_to(folder).as_posix()} {name}")
            make(error, *arguments)

        patch.setattr(UserError, "__init__", watched)


def problems(settings: DistillConfig, world: int) -> dict[str, UserError]:
    questions = itertools.chain(startup.of_machine(settings), startup.of_run(settings, world, startup.Opened(settings.dtype)))
    return {name: answer for name, answer in answers(questions) if isinstance(answer, UserError)}


@pytest.mark.parametrize("case", CASES)
def test_doctor_dry_run_and_the_run_refuse_in_the_same_words(case: str, faulty: Path, monkeypatch: pytest.MonkeyPatch):
    changes, world, site = CASES[case]
    if torch.cuda.is_available() and site.startswith("runtime/"):
        return
    if site == "metrics.py require_loggers":
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    settings, raised = config(faulty, **changes), Raised(monkeypatch)
    there = Path(settings.output).exists()
    found = problems(settings, world)
    assert raised.sites - {"layout.py refuse"} == {site}
    with pytest.raises(UserError) as together:
        refuse(found.items())
    problem = str(together.value)
    told = [row for row in judge(settings, Resources([], world)) if row.level == "error"]
    assert [(row.found, row.do) for row in told] == [(error.found, f"{error.do} (expected: {error.expected})") for error in found.values()]
    monkeypatch.setenv("WORLD_SIZE", str(world))
    if not site.startswith("runtime/__init__") and "fp8" not in site:  # a dry run is of another machine
        with pytest.raises(UserError) as refused:
            dry_run.distill(settings)
        assert str(refused.value) == problem
    monkeypatch.delenv("WORLD_SIZE")
    with faked_world.world(world), pytest.raises(UserError) as refused:
        distill.run(settings)
    assert str(refused.value) == problem
    assert Path(settings.output).exists() == there, "nothing is written by a run that is refused"


# By key: what a random config may have in the place of what fits.
ODD: dict[str, list[Any]] = {
    "tensor": [1, 2, 3, 4],
    "pipeline": [1, 2, 3, 4],
    "virtual_pipeline": [1, 2],
    "context": [1, 2, 4],
    "expert": [1, 2, 3, 4, 8],
    "sequence": [False, True],
    "layers_per_stage": [None, [1, 3], [2, 2], [4]],
    "micro": [1, 2, 3],
    "global": [4, 8, 12, 24],
    "length": [8, 12, 16, 18],
    "steps": [1, 2, 20],
    "validation": [None, "{root}/tokens", "{root}/nothing"],
    "validation_sequences": [4, 8, 200],
    "path": ["{root}/tokens", "{root}/tokens", "{root}/other tokenizer", "{root}/short"],
    "student": ["{root}/student", "{root}/three", "{root}/teacher", "{root}/gpt_oss", "{root}/narrow", "{root}/other vocabulary"],
    "teacher": ["{root}/teacher", "{root}/gpt_oss", "{root}/deepseek_v3", "{root}/student", None],
    "active": [None, 1, 4, 6, 9],
    "muon": [None, {}],
    "loss": [None, {"method": "hidden_state"}, {"method": "top_k_kl", "k": 300}],
    "world": [1, 2, 3, 4, 8],
}
FITS: dict[str, Any] = {
    **{name: values[0] for name, values in ODD.items()},
    "global": 24,
    "length": 16,
}


def random_config(root: Path, draw: random.Random) -> tuple[DistillConfig, int]:
    """One that the config classes take, with a few keys that may not go together, and processes."""
    while True:
        chosen = {name: draw.choice(values) if draw.random() < 0.2 else FITS[name] for name, values in ODD.items()}
        layout = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "sequence", "layers_per_stage")
        parallel = {name: chosen[name] for name in layout} | {"distributed_optimizer": chosen["muon"] is None}
        data = {"path": chosen["path"], "sequence_length": chosen["length"], "validation": chosen["validation"]}
        live = {} if chosen["active"] is None else {"teacher_routing": {"active": chosen["active"]}}
        try:
            settings = config(
                root,
                student=chosen["student"],
                teacher=chosen["teacher"],
                parallel=parallel,
                batch={"micro": chosen["micro"], "global": chosen["global"]},
                data={**data, "validation_sequences": chosen["validation_sequences"]},
                train={"steps": chosen["steps"]},
                optim={"muon": chosen["muon"]},
                loss=chosen["loss"],
                **live,
            )
        except UserError:
            continue
        return settings, chosen["world"] if draw.random() < 0.3 else startup.processes(settings.parallel)


def built(settings: DistillConfig, world: int) -> Exception | None:
    """What a rank and Megatron-Core say by themselves, without the check, while everything is built; None: nothing."""
    with faked_world.world(world):
        try:
            with runtime.session(settings.device) as device, groups.initialized(settings.parallel, settings.train.seed) as place:
                trainer, _ = distill.build(settings, place, device)
                trainer.close()
        except Exception as error:
            return error
    return None


def test_doctor_and_the_start_up_agree_on_200_random_configs(faulty: Path, monkeypatch: pytest.MonkeyPatch):
    """Three judges of each config, on rank 0 of a world whose processes are faked: doctor; `distill.run` up to its first step; and what
    ranks and Megatron-Core refuse by themselves while they build, without the check. What doctor passes is built; what ranks refuse,
    doctor has named before. Not compared: whether a config that is refused would train all the same, and what only a step meets."""
    draw, refused, by_ranks = random.Random(7), 0, 0
    monkeypatch.setattr(readiness, "_room", lambda *_: [])
    monkeypatch.setattr(startup.Opened, "open", _once(startup.Opened.open))  # not what is compared, and longest
    for _ in range(200):
        settings, world = random_config(faulty, draw)
        told = {row.found for row in readiness.judge(settings, Resources([], world)) if row.level == "error"}
        said = None
        with faked_world.world(world):
            try:
                distill.run(settings)  # what goes through is built by it
            except UserError as error:
                said = error
        assert bool(told) == (said is not None), (settings, world, told, said)
        if said is None:
            shutil.rmtree(settings.output)
            continue
        assert all(words in str(said) for words in told), (told, said)
        assert not Path(settings.output).exists()
        own = built(settings, world)
        shutil.rmtree(settings.output, ignore_errors=True)
        assert not isinstance(own, UserError) or own.found in told, (own, told)
        refused, by_ranks = refused + 1, by_ranks + (own is not None)
    print(f"200 configs: {200 - refused} go, {refused} are refused, {by_ranks} of these by ranks themselves too")
    assert 50 < refused < 170
    assert by_ranks > 20


def _once(open_checkpoint: Callable[..., str]) -> Callable[..., str]:
    """As `Opened.open`, each checkpoint once."""
    found: dict[tuple[str, bool], tuple[ModelSpec, str]] = {}

    def again(opened: startup.Opened, name: str, directory: str, has_weights: bool) -> str:
        if (directory, has_weights) not in found:
            said = open_checkpoint(opened, name, directory, has_weights)
            found[directory, has_weights] = opened.specs[name], said
        opened.specs[name], said = found[directory, has_weights]
        return said

    return again
