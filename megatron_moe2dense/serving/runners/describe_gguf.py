"""What a GGUF file says, as JSON on stdout: describe_gguf.py LLAMA_CPP FILE. Long lists are told by their length."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_LONG = 64


def main(checkout: str, file: str) -> None:
    """Print fields and tensors."""
    sys.path[:0] = [str(Path(checkout, "gguf-py"))]
    reader = import_module("gguf").GGUFReader(file)
    fields = {name: _value(field.contents()) for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {tensor.name: {"shape": [int(size) for size in tensor.shape], "type": tensor.tensor_type.name} for tensor in reader.tensors}
    print(json.dumps({"fields": fields, "tensors": tensors}))


def _value(contents: Any) -> Any:
    if isinstance(contents, list) and len(contents) > _LONG:
        return {"length": len(contents)}
    return getattr(contents, "tolist", lambda: contents)()


if __name__ == "__main__":
    main(*sys.argv[1:])
