"""Print pip constraints that hold the GPU libraries of the base image at the versions it was built with."""

import contextlib
from importlib import metadata

for name in ("torch", "triton", "transformer-engine", "transformer-engine-torch", "flash-attn"):
    with contextlib.suppress(metadata.PackageNotFoundError):
        print(f"{name}==={metadata.version(name)}")  # `===`: local and pre-release versions count as they stand
