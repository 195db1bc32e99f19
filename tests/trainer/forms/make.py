"""Writes `<version>.pickle` beside this file: what this interpreter makes of one small description, with all that such a one can hold."""

import pickle
import platform
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType


def description() -> Metadata:
    size, properties = torch.Size([2, 3]), TensorProperties(dtype=torch.bfloat16)
    chunk, index = ChunkStorageMetadata(torch.Size([0, 0]), size), MetadataIndex("weight", [0, 0], 0)
    item = WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, size))
    return Metadata(
        {"weight": TensorStorageMetadata(properties, size, [chunk]), "random": BytesStorageMetadata()},
        planner_data=SavePlan([item]),
        storage_data={index: _StorageInfo("__0_0.distcp", 0, 12)},
        storage_meta=StorageMeta(checkpoint_id=Path("run/step_00000002"), save_id="of a test"),
    )


if __name__ == "__main__":
    Path(__file__).with_name(f"{platform.python_version()}.pickle").write_bytes(pickle.dumps(description()))
