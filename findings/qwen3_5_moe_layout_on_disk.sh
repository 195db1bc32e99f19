#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, safetensors 0.8.0: one Qwen3.5-MoE text model, two layouts on disk, by where it came from.
# In memory the experts of a layer are 2 stacked tensors (gate_up_proj, down_proj). save_pretrained of a model that was built from a config
# writes 3 tensors for each expert. A file with the 2 stacked ones loads too, to the same values, nothing missing or unexpected; and
# a model that was loaded from such a file writes 2 again. A reader of these checkpoints has to know both.
# Seen, with 4 experts in 1 layer: built -> 12 tensors (mlp.experts.0.gate_proj.weight ...); loaded from the 12 -> 12;
# loaded from the stacked 2 -> 2 (mlp.experts.gate_up_proj, mlp.experts.down_proj); logits equal in every case.
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
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


def written(model, name):
    """Saves the model and names the experts' tensors in the file."""
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    return sorted(key for key in load_file(f"{sys.argv[1]}/{name}/model.safetensors") if ".experts." in key)


def loaded(name):
    model, report = Qwen3_5MoeForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", output_loading_info=True)
    check(not any(report.values()), f"loading {name} reports {report}")
    check(torch.equal(model.eval()(tokens).logits, built(tokens).logits), f"{name} loads to another model")
    return model


torch.manual_seed(0)
tokens = torch.arange(8)[None]
sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
config = Qwen3_5MoeTextConfig(**sizes, **experts, layer_types=["full_attention"])
built = Qwen3_5MoeForCausalLM(config).eval()
first = written(built, "built")
config.save_pretrained(f"{sys.argv[1]}/stacked")
own_names = {name: tensor.clone() for name, tensor in built.state_dict().items()}
save_file(own_names, f"{sys.argv[1]}/stacked/model.safetensors", metadata={"format": "pt"})
again, stacked = written(loaded("built"), "again"), written(loaded("stacked"), "stacked again")
print(f"built -> {len(first)}, loaded from these -> {len(again)}, loaded from stacked -> {stacked}")
check(len(first) == 12 and "model.layers.0.mlp.experts.0.gate_proj.weight" in first, "a built model writes other tensors")
check(again == first, "a model loaded from one tensor an expert writes other tensors")
check(stacked == [f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")], "a stacked file is not written back so")
print("as described")
EOF
