"""A random MoE and a dense model of as many FFN neurons as it activates, served by vLLM and llama.cpp on one thread of a CPU; lines
`name value unit goal`: tokens/s of reading a prompt and of writing, alone and in a batch, dense over MoE, and peak memory, MoE over dense.

Hidden size 1024, 8 layers, 64 experts of 256 neurons, 4 of them active (420 million parameters, 40 dense). bfloat16 in transformers and
vLLM, Q8_0 in llama.cpp. Interpreters of engines: MOE2DENSE_VLLM, MOE2DENSE_LLAMA_CPP (one that has xllamacpp, or the program llama-server);
an engine that is not named is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTHONWARNINGS", "ignore")

import torch
import transformers

from megatron_moe2dense.cli import main as moe2dense

TOKENIZER = Path(__file__).resolve().parents[1] / "examples/pico_moe/model"
ACTIVE, WIDTH = 4, 256
TRUNK: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "intermediate_size": ACTIVE * WIDTH,
}
EXPERTS = {"num_experts": 64, "num_experts_per_tok": ACTIVE, "moe_intermediate_size": WIDTH}
GOALS = {"prompt": ">=1.0", "decode": ">=1.0", "decode_batch": ">=1.0"}


def saved(folder: Path, stock: str, **sizes: int) -> Path:
    """A random stock model in bfloat16."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{stock}Config")(**TRUNK, **sizes)
    getattr(transformers, f"{stock}ForCausalLM")(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def measured(folder: Path) -> list[dict[str, Any]]:
    """Rows of `serve-check`."""
    dense, moe = saved(folder / "dense", "Qwen3"), saved(folder / "moe", "Qwen3Moe", **EXPERTS)
    named = {"vllm": os.environ.get("MOE2DENSE_VLLM"), "llama_cpp": os.environ.get("MOE2DENSE_LLAMA_CPP")}
    engines = ["transformers", *(name for name, place in named.items() if place)]
    places = [f"python.{name}={place}" for name, place in named.items() if place]
    settings = [f"engines=[{','.join(engines)}]", *places, f"moe={moe}", "dtype=bfloat16", "quantize=[Q8_0]", f"output={folder}/rows.json"]
    with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):  # what a random model says does not matter here
        moe2dense(["serve-check", str(dense), *settings])
    return json.loads((folder / "rows.json").read_text())["rows"]


def main() -> None:
    """Print the lines of each engine."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder))
    for dense in (row for row in rows if "Moe" not in row["model"] and row["peak_bytes"]):
        moe = next(row for row in rows if "Moe" in row["model"] and (row["engine"], row["weights"]) == (dense["engine"], dense["weights"]))
        name = f"serve_{dense['engine']}_{dense['weights'].lower()}"
        for key, goal in GOALS.items():
            if key in dense["speed"] and key in moe["speed"]:
                print(f"{name}_{key}_dense {dense['speed'][key]:.0f} tokens/s -")
                print(f"{name}_{key}_dense_over_moe {dense['speed'][key] / moe['speed'][key]:.2f} ratio {goal}")
        print(f"{name}_peak_memory_dense {dense['peak_bytes'] / 1e6:.0f} MB -")
        print(f"{name}_peak_memory_moe_over_dense {moe['peak_bytes'] / dense['peak_bytes']:.2f} ratio >=1.0", flush=True)


if __name__ == "__main__":
    main()
