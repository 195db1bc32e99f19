"""A checkpoint is unpickled as data: whatever code its files name is not run, also where its checksums fit."""

from __future__ import annotations

import dataclasses
import enum
import io
import os
import pickle
import pickletools
import re
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.serving import export
from megatron_moe2dense.serving.config import ExportConfig
from megatron_moe2dense.trainer import distill
from megatron_moe2dense.trainer.checkpoints import checksums, pickles
from megatron_moe2dense.trainer.checkpoints.writer import latest
from megatron_moe2dense.trainer.config import DistillConfig
from tests.helpers.tiny_models import tiny_qwen3, write_tokens
from tests.trainer.forms.make import description

pytestmark = pytest.mark.slow


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pickles")
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", 16 * 4 * 2 + 1)
    run(root)
    return root


def run(root: Path) -> None:
    settings = {
        "student": str(root / "student"),
        "teacher": None,
        "output": str(root / "run"),
        "data": {"path": str(root / "tokens"), "sequence_length": 16},
        "batch": {"micro": 2, "global": 4},
        "train": {"steps": 2},
        "dtype": "float32",
    }
    distill.run(build(DistillConfig, settings, "the test"))


def metadata(checkpoint: Path, bomb: Bomb) -> None:
    content = pickle.loads((checkpoint / ".metadata").read_bytes())
    content.storage_meta.save_id = bomb
    (checkpoint / ".metadata").write_bytes(pickle.dumps(content))


def common(checkpoint: Path, bomb: Bomb) -> None:
    """Megatron-Core 0.19 writes no such file any more, but reads one that is there."""
    path = checkpoint / "common.pt"
    content: dict[str, Any] = torch.load(path) if path.exists() else {}
    torch.save({**content, "more": bomb}, path)


def random_state(checkpoint: Path, bomb: Bomb) -> None:
    """A part of a shard that torch's planner reads without weights_only."""
    content = pickle.loads((checkpoint / ".metadata").read_bytes())
    place = next(info for index, info in content.storage_data.items() if index.fqn.startswith("random"))
    written = io.BytesIO()
    torch.save(bomb, written)
    shard = bytearray((checkpoint / place.relative_path).read_bytes())
    place.offset, place.length = len(shard), written.getbuffer().nbytes
    (checkpoint / place.relative_path).write_bytes(bytes(shard) + written.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(content))


@pytest.fixture
def checkpoint(root: Path) -> Iterator[Path]:
    """Of the run, which is as it was afterwards."""
    shutil.copytree(root / "run", root / "kept")
    found = latest(root / "run/checkpoints")
    assert found is not None
    yield found
    shutil.rmtree(root / "run")
    (root / "kept").rename(root / "run")


def resumed(root: Path) -> None:
    manifest = root / "run/moe2dense.json"
    manifest.write_text(manifest.read_text().replace('"status": "finished"', '"status": "unfinished"'))
    run(root)


def exported(root: Path) -> None:
    export.run(build(ExportConfig, {"checkpoint": str(root / "run"), "output": str(root / "exported")}, "the test"))


@pytest.mark.parametrize(
    ("plant", "load"),
    [(metadata, resumed), (metadata, exported), (common, resumed), (common, exported), (random_state, resumed)],
    ids=lambda function: function.__name__,
)
def test_code_in_a_checkpoint_is_not_run(
    plant: Callable[..., None], load: Callable[[Path], None], checkpoint: Path, root: Path, tmp_path: Path
):
    marker = tmp_path / "it ran"
    plant(checkpoint, Bomb(marker))
    (checkpoint / checksums.LISTING).unlink()
    checksums.write(checkpoint, {})
    with pytest.raises(UserError) as refused:
        load(root)
    assert "take the checkpoint from the run that wrote it" in refused.value.do
    assert not marker.exists()


def test_a_file_that_the_checksums_do_not_list_is_refused(checkpoint: Path, root: Path):
    (checkpoint / "__1_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"__1_0\.distcp is not in files\.json"):
        exported(root)


FORMS = sorted((Path(__file__).parent / "forms").glob("*.pickle"))


def portable(form: Path, folder: Path) -> bytes:
    shutil.copy(form, folder / ".metadata")
    pickles.make_portable(folder)
    return (folder / ".metadata").read_bytes()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_every_interpreters_own_form_is_read(form: Path, tmp_path: Path):
    expected = description()
    with form.open("rb") as file:
        assert pickles.read(file) == expected
    assert expected.storage_meta is not None
    expected.storage_meta.checkpoint_id = "run/step_00000002"
    assert pickle.loads(portable(form, tmp_path)) == expected


def test_all_forms_become_one_that_names_torch_alone(tmp_path: Path):
    assert {form.stem for form in FORMS} == {"3.11.2", "3.11.7", "3.12.1", "3.13.0"}
    first, *others = {portable(form, tmp_path) for form in FORMS}
    assert not others
    assert {global_.partition(" ")[0] for global_ in names(first)} == {"torch", "torch.serialization", *pickles._DESCRIPTIONS}


def names(content: bytes) -> set[str]:
    """The globals of a pickle, `module name`."""
    found, strings = set(), []
    for opcode, argument, _ in pickletools.genops(content):
        if "UNICODE" in opcode.name:
            strings.append(argument)
        elif opcode.name == "STACK_GLOBAL":
            found.add(" ".join(strings[-2:]))
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            strings.append(f"memo {argument}")
    return {name for name in found if "memo" not in name}


class Named:
    """Pickled as a call of a function, none of which would harm."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


class Colour(enum.Enum):
    RED = 1


HARMLESS = {
    "the form of 3.11.2 with no member": (Named(getattr, _MEM_FORMAT_ENCODING, "mro"), "builtins.getattr"),
    "the form of 3.11.2 with another class": (Named(getattr, Metadata, "__doc__"), "builtins.getattr"),
    "the form of 3.11.2 with a value": (Named(getattr, "text", "upper"), "builtins.getattr"),
    "the form of 3.11.2 with a default": (Named(getattr, _MEM_FORMAT_ENCODING, "mro", None), "positional"),
    "an enumeration of another module": (Colour.RED, "test_checkpoint_pickles"),
    "a path of another kind": (PureWindowsPath("a"), "PureWindowsPath"),
    "a function": (Named(len, "text"), "builtins.len"),
    "a class that describes nothing": (Fraction(1, 2), "fractions.Fraction"),
    "no description": ({"weight": 1}, "dict"),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_no_description_stays_out(what: str, tmp_path: Path):
    content, named = HARMLESS[what]
    if not isinstance(content, dict):
        content = dataclasses.replace(description(), planner_data=content)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=re.escape(named)) as refused:
        pickles.require_data(tmp_path)
    assert "do not load it" in refused.value.do


def test_a_checkpoint_with_another_interpreters_names_is_loaded(checkpoint: Path, root: Path):
    """3.13 pickles paths under a module that earlier ones do not have."""
    content = pickle.loads((checkpoint / ".metadata").read_bytes())
    content.storage_meta.checkpoint_id = Path("a")
    foreign = pickle.dumps(content, protocol=3).replace(b"cpathlib\n", b"cpathlib._local\n")
    assert b"cpathlib._local\n" in foreign
    (checkpoint / ".metadata").write_bytes(foreign)
    (checkpoint / checksums.LISTING).unlink()
    checksums.write(checkpoint, {})
    resumed(root)
    exported(root)
