#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, safetensors 0.8.0: a Zaya checkpoint's bias of the class that skips the block is not loaded.
# A Zaya router has one class more than experts; a token that it sends there passes no expert. `balancing_biases`, a buffer that
# save_pretrained writes, shifts the choice. from_pretrained reads the file, reports nothing missing, and leaves -1.0 in the last
# entry whatever the file holds; the other entries are the file's. So a model that was saved after its biases moved
# routes otherwise once it is loaded again.
# Seen: built [0.0, 0.0, 0.0, 0.0, 2.0], file [0.0, 0.0, 0.0, 0.0, 2.0], loaded [0.0, 0.0, 0.0, 0.0, -1.0], and the share of tokens
# that skip the block falls from 1.0 to 0.0. With 0.25 as every entry: loaded [0.25, 0.25, 0.25, 0.25, -1.0].
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
from safetensors.torch import load_file
from transformers import ZayaConfig, ZayaForCausalLM


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


def skipped(model):
    """The share of tokens that the first layer's router sends to the last class: their weight is 0."""
    weights = []
    hook = model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, output: weights.append(output[1]))
    model(torch.arange(1, 9)[None])
    hook.remove()
    return (weights[0] == 0).float().mean().item()


torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
config = ZayaConfig(**sizes, num_experts=4, moe_intermediate_size=16, router_hidden_size=8, eos_token_id=2)
for index, biases in enumerate(([0.0, 0.0, 0.0, 0.0, 2.0], [0.25] * 5)):
    built = ZayaForCausalLM(config).eval()
    for layer in built.model.layers:
        layer.mlp.gate.balancing_biases.copy_(torch.tensor(biases))
    path = f"{sys.argv[1]}/{index}"
    built.save_pretrained(path)
    file = load_file(f"{path}/model.safetensors")["model.layers.0.mlp.gate.balancing_biases"].tolist()
    loaded, report = ZayaForCausalLM.from_pretrained(path, output_loading_info=True)
    now = loaded.model.layers[0].mlp.gate.balancing_biases.tolist()
    print("built", biases, "file", file, "loaded", now, "skipped", skipped(built), "then", skipped(loaded.eval()))
    check(not any(report.values()), f"loading reports {report}")
    check(file == biases, "the file holds other biases than the model")
    check(now == [*biases[:-1], -1.0], "the last bias is no longer overwritten with -1.0")
    check(index or (skipped(built), skipped(loaded)) == (1.0, 0.0), "tokens skip as before saving")
print("as described")
EOF
