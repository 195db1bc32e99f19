#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 on a CPU: which widths of an expert a stock MoE computes depends on the dtype.
# The experts implementation that a model gets unasked is grouped_mm. Its matrix product wants rows of a multiple of 16 bytes, so
# an intermediate_size that is no multiple of 8 in bfloat16, or of 4 in float32, raises in the first forward - however many experts there
# are, one included. With experts_implementation="eager" the same config computes. The config accepts any width and says nothing.
# Seen for OlmoeForCausalLM with 1 and with 4 experts: bfloat16 24 computes, 20 raises RuntimeError "strides should be multiple of 16
# bytes"; float32 20 computes, 18 raises the same; eager computes all of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install -q torch==2.13.0 numpy==2.4.6 huggingface_hub==2.4.0 tokenizers==0.23.3 \
    regex==2026.11.19 pyyaml==6.0.4 packaging==26.4 tqdm==4.70.1
"$python" -m pip install -q --no-deps transformers==5.23.0 safetensors==0.8.0
export HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
"$python" - "$folder" << 'EOF'
import sys

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


def outcome(dtype, width, experts, **more):
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = OlmoeConfig(
        **sizes, intermediate_size=width, num_experts=experts, num_experts_per_tok=1, eos_token_id=2, pad_token_id=1, **more
    )
    try:
        logits = OlmoeForCausalLM(config).to(dtype).eval()(torch.arange(8)[None]).logits
    except RuntimeError as error:
        return str(error)
    return "computes" if logits.isfinite().all() else "not finite"


RAISES = "strides should be multiple of 16 bytes"
for dtype, width, expected in (
    (torch.bfloat16, 24, "computes"),
    (torch.bfloat16, 20, RAISES),
    (torch.float32, 20, "computes"),
    (torch.float32, 18, RAISES),
):
    for experts in (1, 4):
        unasked, eager = outcome(dtype, width, experts), outcome(dtype, width, experts, experts_implementation="eager")
        print(f"{dtype}, width {width}, {experts} experts: {unasked}; eager: {eager}")
        check(expected in unasked, f"expected: {expected}")
        check(eager == "computes", "the eager implementation does not compute")
print("as described")
EOF
