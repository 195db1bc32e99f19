"""A checkpoint is unpickled as data: whatever code its files name is not run, also where its seal fits."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import distill, export
from megatron_moe2dense.trainer.checkpoints import seal
from megatron_moe2dense.trainer.checkpoints.writer import latest
from megatron_moe2dense.trainer.config import DistillConfig, ExportConfig
from tests.helpers.tiny_models import tiny_qwen3, write_tokens


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
    content: dict[str, Any] = torch.load(checkpoint / "common.pt")
    torch.save({**content, "more": bomb}, checkpoint / "common.pt")


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
    (checkpoint / seal.SEAL).unlink()
    seal.write(checkpoint, {})
    with pytest.raises(UserError) as refused:
        load(root)
    assert "take the checkpoint from the run that wrote it" in refused.value.do
    assert not marker.exists()


def test_a_file_that_the_seal_does_not_list_is_refused(checkpoint: Path, root: Path):
    (checkpoint / "__1_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"__1_0\.distcp is not in files\.json"):
        exported(root)
