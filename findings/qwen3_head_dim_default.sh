#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: the same values mean other attention shapes in Qwen3MoeConfig and in Qwen3Config.
# Qwen3MoeConfig has no head_dim (given, it is taken): heads are hidden_size / num_attention_heads wide. Qwen3Config's default is 128,
# whatever the other sizes. So a dense config made from a MoE config's values has attention tensors of other shapes, and the MoE's do not fit.
# Seen for hidden_size 64, 4 heads, 2 of them for keys: q_proj (64, 64) and k_proj (32, 64) in Qwen3MoeForCausalLM, (512, 64) and (256, 64)
# in Qwen3ForCausalLM; load_state_dict of the attention raises RuntimeError "size mismatch". With head_dim=16 given: equal, and it loads.
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

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


def attention(model):
    return model.model.layers[0].self_attn


def shapes(model):
    return [tuple(getattr(attention(model), name).weight.shape) for name in ("q_proj", "k_proj")]


values = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
moe_config = Qwen3MoeConfig(**values, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
kept = {name: value for name, value in moe_config.to_dict().items() if name in values}
check(kept == values, "the MoE config changes its values")
moe, dense = Qwen3MoeForCausalLM(moe_config), Qwen3ForCausalLM(Qwen3Config(**kept, intermediate_size=32))
given = Qwen3ForCausalLM(Qwen3Config(**kept, intermediate_size=32, head_dim=16))
print("q_proj, k_proj: MoE", shapes(moe), "dense", shapes(dense), "dense with head_dim", shapes(given))
check("head_dim" not in moe_config.to_dict(), "Qwen3MoeConfig has a head_dim")
check(shapes(moe) == shapes(given) == [(64, 64), (32, 64)], "the MoE's heads are not hidden_size / num_attention_heads wide")
check(shapes(dense) == [(512, 64), (256, 64)], "Qwen3Config's heads are not 128 wide")
attention(given).load_state_dict(attention(moe).state_dict())
try:
    attention(dense).load_state_dict(attention(moe).state_dict())
    sys.exit("the behaviour changed: the MoE's attention loads")
except RuntimeError as error:
    print(str(error).splitlines()[1].strip())
    check("size mismatch" in str(error), "another error")
print("as described")
EOF
