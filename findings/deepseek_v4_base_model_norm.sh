#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, safetensors 0.8.0: DeepseekV4Model does not find its last norm in what DeepseekV4ForCausalLM saved.
# The base class reads a checkpoint of the class with the head but for one tensor: `model.norm.weight` is renamed on the way to
# `model.kv_norm.weight` (a rename of the attention's norms fits that name as well) and reported as unexpected; the model
# keeps a norm of ones. What the base class itself saved, it reads whole; so does the class with the head.
# Seen: DeepseekV4ForCausalLM nothing missing; DeepseekV4Model missing ['norm.weight'], unexpected ['lm_head.weight',
# 'model.kv_norm.weight'], norm 1.0 where 3.0 was saved; Qwen3MoeModel from a Qwen3MoeForCausalLM, beside it: nothing missing, norm 3.0.
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
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DeepseekV4Model, Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


def reread(model, name, *classes):
    """Saves a model whose last norm is 3.0; for each class what is missing and unexpected in that file, and the norm it has then."""
    torch.nn.init.constant_(getattr(model, "model", model).norm.weight, 3.0)
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    for read in classes:
        again, report = read.from_pretrained(f"{sys.argv[1]}/{name}", output_loading_info=True)
        norm = getattr(again, "model", again).norm.weight
        result = sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), norm.unique().tolist()
        print(type(model).__name__, "->", read.__name__, *result)
        yield result


torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "moe_intermediate_size": 16}
sizes |= {"head_dim": 16, "num_experts_per_tok": 2, "max_position_embeddings": 64}
lora = {"q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
kinds = {"layer_types": ["compressed_sparse_attention"], "mlp_layer_types": ["moe"], "partial_rotary_factor": 0.5}
config = DeepseekV4Config(**sizes, **lora, **kinds, num_key_value_heads=1, n_routed_experts=4, hc_mult=2)
whole, base = reread(DeepseekV4ForCausalLM(config), "deepseek", DeepseekV4ForCausalLM, DeepseekV4Model)
(own,) = reread(DeepseekV4Model(config), "deepseek base", DeepseekV4Model)
qwen_config = Qwen3MoeConfig(**sizes, num_key_value_heads=2, num_experts=4)
(qwen,) = reread(Qwen3MoeForCausalLM(qwen_config), "qwen", Qwen3MoeModel)
check(whole == own == ([], [], [3.0]), "a class does not read back what it saved")
check(base == (["norm.weight"], ["lm_head.weight", "model.kv_norm.weight"], [1.0]), "the base class reads the norm, or loses more")
check(qwen == ([], ["lm_head.weight"], [3.0]), "Qwen3MoeModel reads another norm")
print("as described")
EOF
