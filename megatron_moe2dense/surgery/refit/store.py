"""The refitted layers on disk, one file each, complete or not at all: what a killed refit goes on from and what convert writes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_moe2dense.common.outputs import disk_errors, read_json, write_json
from megatron_moe2dense.surgery.refit.layer import FitReport, LayerFit

_IDENTITY = "identity.json"


class FittedLayers:
    """Files of `folder`; those of another identity are thrown away.

    Args:
        identity: what the fits depend on.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder = folder
        path = folder / _IDENTITY
        if not path.exists() or read_json(path, "the refit's identity").get("identity") != identity:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_json(path, {"identity": identity})

    def __contains__(self, layer: int) -> bool:
        return self._path(layer).exists()

    def __getitem__(self, layer: int) -> LayerFit:
        with safe_open(self._path(layer), framework="pt") as file:
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            report = FitReport(**json.loads(file.metadata()["report"]))
        return LayerFit(tensors, report)

    def put(self, fit: LayerFit) -> None:
        """Keep the fit of a layer; UserError when the disk is full."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in fit.tensors.items()}
        path = self._path(fit.report.layer)
        partial = path.with_suffix(".tmp")
        facts = {name: value for name, value in fit.report.facts().items() if name != "overfits"}
        with disk_errors(partial):
            save_file(tensors, partial, {"report": json.dumps(facts)})
            partial.replace(path)

    def remove(self) -> None:
        """Everything is in the output."""
        shutil.rmtree(self.folder)

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"
