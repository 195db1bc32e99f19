"""The distilled student guesses ahead of its own teacher (speculative decoding), in vLLM and llama.cpp; lines `name value unit goal`.

The MoE of the example and what the quickstart makes of it share a tokenizer. One stream, greedy, float32, held-out prompts: tokens/s of
the teacher alone, of the student alone, and of the teacher with guesses; the share of the guesses it takes, how many tokens come of one of
its passes, and whether its tokens are those that it writes alone. Interpreters of engines: MOE2DENSE_VLLM, MOE2DENSE_LLAMA_CPP (one that
has xllamacpp, or the program llama-server); an engine that is not named is left out. MOE2DENSE_STUDENT: instead of out/quickstart/export.

On the example a pass of the student costs what one of the teacher does, and no gain can come of it. Lines with `wide` are of the same pair
with the teacher's experts filled up with zeros, so that its passes cost what those of a large MoE do beside a small student.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTHONWARNINGS", "ignore")

import torch
from safetensors.torch import load_file, save_file

from megatron_moe2dense.serving import gguf
from megatron_moe2dense.serving.compare import taken
from megatron_moe2dense.serving.config import Engine, GgufConfig, PythonConfig
from megatron_moe2dense.serving.engines import Place, find
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import Limits, windows

ROOT = Path(__file__).resolve().parents[1]
TEACHER, TEXT = ROOT / "examples/pico_moe/model", ROOT / "examples/pico_moe/tokens/heldout"
STUDENT = Path(os.environ.get("MOE2DENSE_STUDENT", ROOT / "out/quickstart/export"))
PROMPTS, PROMPT, NEW, VOCABULARY = 16, 64, 64, 2048
ENGINES: tuple[Engine, ...] = ("vllm", "llama_cpp")
AHEAD = (1, 2, 4)
WIDER = 64
Asked = Callable[..., dict[str, Any]]


def widened(folder: Path) -> Path:
    """The teacher with neurons of zeros in every expert: it computes the same, and a pass of it costs several of the student."""
    target = folder / "wide"
    shutil.copytree(TEACHER, target)
    tensors = load_file(target / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors[name].shape
        more = (0, columns * (WIDER - 1)) if "down_proj" in name else (0, 0, 0, rows * (WIDER - 1))
        tensors[name] = torch.nn.functional.pad(tensors[name], more)
    save_file(tensors, str(target / "model.safetensors"), {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["moe_intermediate_size"] *= WIDER
    (target / "config.json").write_text(json.dumps(config))
    return target


def compare(name: str, asked: Asked, teacher: str, student: str, prompts: list[list[int]]) -> None:
    """Print the lines of one engine and teacher."""
    alone, rates = asked(teacher), {}
    for who, answer in (("teacher", alone), ("student", asked(student))):
        rates[who] = len(prompts) * NEW / answer["written"]["seconds"]
        print(f"{name}_{who}_alone {rates[who]:.0f} tokens/s -")
    for ahead in AHEAD:
        found = asked(teacher, {"model": student, "tokens": ahead})
        share, a_pass = taken(found["written"])
        rate = len(prompts) * NEW / found["written"]["seconds"]
        same = sum(one == other for one, other in zip(alone["greedy"], found["greedy"], strict=True)) / len(prompts)
        print(f"{name}_acceptance_ahead_{ahead} {share:.2f} share -")
        print(f"{name}_tokens_a_pass_ahead_{ahead} {a_pass:.2f} tokens >=1.5")
        print(f"{name}_same_tokens_ahead_{ahead} {same:.2f} share ==1.0")
        print(f"{name}_ahead_{ahead} {rate:.0f} tokens/s -")
        print(f"{name}_over_teacher_ahead_{ahead} {rate / rates['teacher']:.2f} ratio -", flush=True)


def measure(place: Place, prompts: list[list[int]], folder: Path) -> None:
    """Let one engine read both models, and compare."""
    request = {
        "prompts": prompts,
        "texts": [],
        "dtype": "float32",
        "vocabulary": VOCABULARY,
        "context": PROMPT + NEW + max(AHEAD) + 1,
        "new_tokens": NEW,
        "threads": 1,
        "batch": 1,
        "rounds": 3,
        "speed": None,
    }

    def asked(model: str, draft: dict[str, Any] | None = None) -> dict[str, Any]:
        return place.ask({**request, "model": model, "draft": draft}, folder)

    def readable(source: Path, name: str) -> str:
        if place.engine != "llama_cpp":
            return str(source)
        gguf.write(source, folder / f"{name}.gguf", "float32", GgufConfig())
        return str(folder / f"{name}.gguf")

    student = readable(STUDENT, "student")
    compare(f"draft_{place.engine}", asked, readable(TEACHER, "teacher"), student, prompts)
    compare(f"draft_{place.engine}_wide", asked, readable(widened(folder), "wide"), student, prompts)


def main() -> None:
    """All engines that are named."""
    python = PythonConfig(vllm=os.environ.get("MOE2DENSE_VLLM"), llama_cpp=os.environ.get("MOE2DENSE_LLAMA_CPP"))
    named: list[Engine] = [engine for engine in ENGINES if getattr(python, engine)]
    if not named or not (STUDENT / "config.json").exists():
        print("draft_model: left out; it needs `make quickstart`, and MOE2DENSE_VLLM or MOE2DENSE_LLAMA_CPP", file=sys.stderr)
        return
    text = TokensConfig(path=str(TEXT), sequence_length=PROMPT, sequences=PROMPTS)
    prompts = windows(text, Limits(VOCABULARY)).tolist()
    for place in find(named, python):
        with tempfile.TemporaryDirectory() as folder:
            measure(place, prompts, Path(folder))


if __name__ == "__main__":
    main()
