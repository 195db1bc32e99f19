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
from tests.serving.document import records

EXAMPLE, QUICKSTART, EXPORT = Path("examples/pico_moe"), "quickstart", Path("out/quickstart/export")
OLD = ("qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe", "mixtral", "qwen2_moe")
NEW = (
    *("qwen3_next", "qwen3_5_moe_text", "glm4_moe", "glm4_moe_lite", "ernie4_5_moe", "hunyuan_v1_moe", "granitemoe"),
    *("lfm2_moe", "gemma4_text", "nemotron_h", "llama4_text", "dots1", "exaone_moe", "afmoe", "phimoe", "cohere2_moe"),
    *("jamba", "flex_olmo", "hy_v3", "solar_open", "mistral4"),
)
# What a published model of the type has and the tiny one of the other tests has not.
ROPE = YARN | {"original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 0.707}
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_hidden_layers": 27, "q_lora_rank": None, "rope_parameters": ROPE},  # llama.cpp knows V2-Lite by its 27 layers
    "deepseek_v3": {"rope_parameters": ROPE},
    # Keys of the published config.json that the class does not have.
    "glm4_moe": {"head_dim": 64},
    "exaone_moe": {"scoring_func": "sigmoid"},
    "gpt_oss": {"swiglu_limit": 7.0},
    "olmoe": {"num_key_value_heads": 4},  # as many as heads of queries, which llama.cpp takes for granted
    "dots1": {"num_key_value_heads": 4},
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


def checked(dense: Path, folder: Path, settings: list[str]) -> list[dict[str, Any]]:
    """The rows of `serve-check`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.json"
    rows.unlink(missing_ok=True)
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
    ended = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    if not rows.exists():
        return [{"engine": "serve-check", "verdict": "broken", "reason": ended.stderr[-400:], "weights": "", "model": "", "version": ""}]
    found = json.loads(rows.read_text())["rows"]
    return [row | {"reason": row["reason"].replace(f"{dense}/", "").replace(str(dense), "the model")} for row in found]


def main(arguments: list[str]) -> int:
    """Check the types named, or all and the student of the quickstart; write rows by type as JSON, one file that later runs add to.

    Returns:
        0: every engine computes what transformers does, or did not in docs/serving_records.json either; 1: one is worse.
    """
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    types = [argument for argument in arguments if "=" not in argument] or [*OLD, *NEW, QUICKSTART]
    output = Path(named.pop("output", "out/serving/rows.json"))
    found = json.loads(output.read_text()) if output.exists() else {}
    for model_type in types:
        found[model_type] = _rows(model_type, output.parent / model_type, [f"{name}={value}" for name, value in named.items()])
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n")
        for row in found[model_type]:
            figures = row.get("difference"), row.get("kl")
            print(model_type, row["engine"], row["weights"], *figures, row["verdict"], row["reason"][:300], flush=True)
    wrong = worse({name: found[name] for name in types}, records())
    print("worse than in docs/serving_records.json:", "; ".join(wrong) or "nothing")
    return int(bool(wrong))


def worse(found: dict[str, list[dict[str, Any]]], before: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Engines that do not compute what transformers does, and did, or were never asked; and what could not be converted or asked at all."""
    lines = []
    for name, rows in found.items():
        known = {(row["engine"], row["weights"]): row["verdict"] for row in before.get(name, [])}
        for row in rows:
            if row["verdict"] != "same" and known.get((row["engine"], row["weights"]), "same") in ("same", "broken"):
                lines.append(f"{name} in {row['engine']} {row['weights']}: {row['verdict']}, {row['reason'][:200]}")
    return lines


def _rows(model_type: str, folder: Path, settings: list[str]) -> list[dict[str, Any]]:
    try:
        return checked(EXPORT if model_type == QUICKSTART else dense_result(model_type, folder), folder, settings)
    except (UserError, SystemExit) as error:
        return [{"engine": "convert", "verdict": "broken", "reason": str(error)[-400:], "weights": "", "model": "", "version": ""}]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
