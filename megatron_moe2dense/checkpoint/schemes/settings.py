"""What config.json says of how weights are encoded: `quantization_config`, as every library writes it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from megatron_moe2dense.checkpoint.index import CheckpointIndex

# By quant_method: what reads the tensors. None: files without a quantization_config, whose tensors have to say enough.
READABLE = (None, "fp8", "fbgemm_fp8", "modelopt", "compressed-tensors", "mxfp4", "awq", "gptq")
_EXCLUDED = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")


@dataclass(frozen=True)
class Settings:
    """quantization_config of a checkpoint. content: as it stands there, empty without one."""

    content: Mapping[str, Any]

    @classmethod
    def of(cls, index: CheckpointIndex) -> Settings:
        """That of a checkpoint."""
        return cls.of_config(index.config)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Settings:
        """That of config.json, or of the language model in it."""
        found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
        return cls(found if isinstance(found, dict) else {})

    @property
    def method(self) -> str | None:
        """quant_method; None without a quantization_config."""
        return str(self.content.get("quant_method", "no quant_method")) if self.content else None

    @property
    def readable(self) -> bool:
        """Whether there is a reader for what this says; the tensors have to fit it too."""
        rotated = bool((self.content.get("transform_config") or {}).get("config_groups"))
        return self.method in READABLE and not rotated

    def excludes(self, module: str) -> bool:
        """Whether a module's weights were left as they are: named in a list, itself or a module around it, by name, glob or regex."""
        return any(_matches(pattern, module) for pattern in self._excluded)

    @cached_property
    def _excluded(self) -> list[str]:
        return [str(pattern) for key in _EXCLUDED for pattern in self.content.get(key) or ()]

    def weights(self, module: str) -> Mapping[str, Any]:
        """What compressed-tensors says of a module's weights: of the group that names it, else of that for all linear layers."""
        groups = [group for group in (self.content.get("config_groups") or {}).values() if isinstance(group, dict)]
        own = [group for group in groups if any(_matches(str(target), module) for target in group.get("targets") or ())]
        classes = [group for group in groups if any(_is_class(str(target)) for target in group.get("targets") or ())]
        found = (own or classes or [{}])[0]
        return found.get("weights") or {}

    def fp8_columns(self, module: str) -> int | None:
        """Columns of a block of FP8 weights (more than any matrix has, where rows or all share a scale); None where it says of no FP8."""
        weights, algorithm = self.weights(module), str(self.content.get("quant_algo", ""))
        if self.method == "compressed-tensors":
            if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
                return None
            return self.block(module)[1] if weights.get("strategy") in ("block", "group") else sys.maxsize
        if self.method == "fp8":
            return self.block(module)[1] or sys.maxsize
        return sys.maxsize if self.method == "fbgemm_fp8" or (self.method == "modelopt" and algorithm.startswith("FP8")) else None

    def block(self, module: str) -> tuple[int | None, int | None]:
        """Rows and columns of a block of FP8 weights. Without a word 128 x 128: transformers' default, and what DeepSeek-V3 has."""
        weights = self.weights(module)
        size = weights.get("group_size")
        told = weights.get("block_structure") or ([1, size] if size and size > 0 else None)
        told = told or self.content.get("weight_block_size", [128, 128])
        return (int(told[0]), int(told[1])) if isinstance(told, list | tuple) and len(told) == 2 else (None, None)


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target and target[:1].isupper()


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.startswith(f"{pattern}.") or ("*" in pattern and _of_glob(pattern, module))


def _of_glob(pattern: str, module: str) -> bool:
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
