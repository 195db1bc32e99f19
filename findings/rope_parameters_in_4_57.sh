#!/usr/bin/env bash
# transformers 5.23.0 writes, transformers 4.57.6 reads (torch 2.13.0): the base of the rotary embeddings is lost without a word.
# The older classes look for `rope_theta` and `rope_scaling`. save_pretrained of the newer ones writes `rope_parameters` alone, which the older ones
# keep as a key of no meaning, and take their default, 10,000. Their classes for later models still find every weight, so nothing warns. What served
# by an engine with transformers 4 is another model then. Both sets of keys together are read alike by both.
# Seen for Qwen3 with base 1,000,000 (2 layers, hidden size 64, 200 tokens): rope_theta 10000.0, logits off by 0.17; with `rope_theta` beside
# `rope_parameters` in config.json: 1000000.0 and the same logits, bit for bit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for name in new old; do "${PYTHON:-python3}" -m venv "$folder/$name"; done
"$folder/new/bin/python" -m pip install -q torch==2.13.0 numpy==2.4.6 huggingface_hub==2.4.0 tokenizers==0.23.3 \
    regex==2026.11.19 pyyaml==6.0.4 packaging==26.4 tqdm==4.70.1
"$folder/new/bin/python" -m pip install -q --no-deps transformers==5.23.0 safetensors==0.8.0
"$folder/old/bin/python" -m pip install -q torch==2.13.0 numpy==2.4.6 transformers==4.57.6
export HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
cd "$folder"
"$folder/new/bin/python" - << 'PY'
import json
import shutil

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
torch.manual_seed(0)
rope = {"rope_type": "default", "rope_theta": 1e6}
model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, vocab_size=256, max_position_embeddings=512, rope_parameters=rope)).eval()
model.save_pretrained("saved")
torch.save(model(torch.arange(200)[None]).logits, "logits.pt")
shutil.copytree("saved", "both")
content = json.load(open("both/config.json"))
json.dump({**content, "rope_theta": content["rope_parameters"]["rope_theta"]}, open("both/config.json", "w"))
if "rope_theta" in content or AutoConfig.from_pretrained("both").rope_parameters != model.config.rope_parameters:
    raise SystemExit("the behaviour changed: 5.23.0 writes rope_theta, or reads both otherwise")
PY
"$folder/old/bin/python" - << 'PY'
import torch
from transformers import AutoModelForCausalLM

expected = torch.load("logits.pt")
for name in ("saved", "both"):
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    off = (model(torch.arange(200)[None]).logits - expected).abs().max().item()
    print(f"{name}: rope_theta {model.config.rope_theta}, logits off by {off:.2g}")
    if (model.config.rope_theta, off > 0.1) != ((10000.0, True) if name == "saved" else (1e6, False)):
        raise SystemExit("the behaviour changed")
print("as described")
PY
