"""Every family's dense result in real engines: python -m tests.serving.every_engine [model_type ...] [output=FILE] [keys of serve-check]

Tiny random MoEs of sizes that engines have kernels for, calibrated and converted with defaults, asked by `serve-check`. `make serving`
calls it and writes the table of docs/serving.md."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_moe2dense.cli import main as moe2dense
from megatron_moe2dense.common.errors import UserError
from tests.families.every import random_model
from tests.families.tiny_configs import YARN, engine_config

EXAMPLE = Path("examples/pico_moe")
OLD = ("qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe", "mixtral", "qwen2_moe")
NEW = (
    *("qwen3_next", "qwen3_5_moe_text", "glm4_moe", "glm4_moe_lite", "minimax_m2", "ernie4_5_moe", "hunyuan_v1_moe", "granitemoe"),
    *("granitemoehybrid", "lfm2_moe", "gemma4_text", "nemotron_h", "llama4_text", "dots1", "exaone_moe", "afmoe", "phimoe", "cohere2_moe"),
    *("jamba", "flex_olmo", "deepseek_v32", "hy_v3", "solar_open", "mistral4"),
)
# What a published model of the type has and the tiny one of the other tests has not.
ROPE = YARN | {"original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 0.707}
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_hidden_layers": 27, "q_lora_rank": None, "rope_parameters": ROPE},  # llama.cpp knows V2-Lite by its 27 layers
    "deepseek_v3": {"rope_parameters": ROPE},
    "gpt_oss": {"swiglu_limit": 7.0},
}
# Tokens that llama.cpp's converter asks the tokenizers of some families for.
SPECIAL = ("[gMASK]", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def dense_result(model_type: str, folder: Path) -> Path:
    """A tiny MoE of the type, made dense with defaults, in bfloat16."""
    moe, statistics, dense = folder / "moe", folder / "statistics", folder / "dense"
    shutil.rmtree(folder, ignore_errors=True)
    random_model(model_type, engine_config(model_type, **AS_PUBLISHED.get(model_type, {}))).bfloat16().save_pretrained(moe)
    shutil.copy(EXAMPLE / "model" / "tokenizer_config.json", moe)
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "model" / "tokenizer.json"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(moe / "tokenizer.json"))
    (moe / "chat_template.jinja").write_text(CHAT)
    text = f"data={{path: {EXAMPLE}/tokens/distill, sequence_length: 128, sequences: 16}}"
    moe2dense(["calibrate", f"source={moe}", f"output={statistics}", text])
    moe2dense(["convert", f"source={moe}", f"statistics={statistics}", f"output={dense}"])
    return dense


def checked(dense: Path, settings: list[str]) -> list[dict[str, Any]]:
    """The rows of `serve-check`."""
    rows = dense.parent / "rows.json"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "megatron_moe2dense",
        "serve-check",
        str(dense),
        f"output={rows}",
        "speed=false",
        "quantize=[Q8_0]",
    ]
    ended = subprocess.run([*command, "overwrite=true", *settings], capture_output=True, text=True, check=False)
    if not rows.exists():
        return [{"engine": "serve-check", "verdict": "broken", "reason": ended.stderr[-400:], "weights": "", "model": ""}]
    return json.loads(rows.read_text())["rows"]


def main(arguments: list[str]) -> None:
    """Check the types named, or all; write rows by type as JSON, one file that later runs add to."""
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    types = [argument for argument in arguments if "=" not in argument] or [*OLD, *NEW]
    output = Path(named.get("output", "out/serving/rows.json"))
    settings = [f"{name}={value}" for name, value in named.items() if name != "output"]
    found = json.loads(output.read_text()) if output.exists() else {}
    for model_type in types:
        try:
            rows = checked(dense_result(model_type, output.parent / model_type), settings)
        except (UserError, SystemExit) as error:
            rows = [{"engine": "convert", "verdict": "broken", "reason": str(error)[-400:], "weights": "", "model": ""}]
        found[model_type] = rows
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n")
        for row in rows:
            print(
                model_type,
                row["engine"],
                row["weights"],
                row.get("difference"),
                row.get("kl"),
                row["verdict"],
                row["reason"][:200],
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
