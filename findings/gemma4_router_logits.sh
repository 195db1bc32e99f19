#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: what Gemma 4's MoE returns as router_logits are probabilities.
# With output_router_logits=True other classes (here Qwen3-MoE) return what the router's linear layer gives. Gemma4ForCausalLM returns
# the softmax of it, under the same name and shape. Who takes the softmax again flattens it: so does the library's own load balancing
# loss, by which a fully collapsed router then looks less than half as bad as it is.
# Seen: every row of Gemma 4's router_logits is >= 0, sums to 1.0 and is the softmax of the projection; Qwen3-MoE's are the projection
# itself. The loss of a router that sends all tokens to 1 of 4 experts: 4.0 from the projection, 1.9015 from router_logits.
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
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


def routed(model, tokens, projection):
    """What the layer's router projects, and what the model returns as its logits."""
    seen = []
    hook = projection.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0] @ projection.weight.T))
    returned = model(tokens, output_router_logits=True).router_logits
    hook.remove()
    return seen[0].float(), returned[0].float()


torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
experts = {"num_hidden_layers": 1, "num_experts": 4, "moe_intermediate_size": 16}
own = {"enable_moe_block": True, "top_k_experts": 1, "hidden_size_per_layer_input": 0, "global_head_dim": 16}
gemma = Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **experts, **own, layer_types=["full_attention"])).eval()
qwen = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, num_experts_per_tok=1)).eval()
projection = gemma.model.layers[0].router.proj
tokens = torch.arange(1, 9)[None]
projected, returned = routed(gemma, tokens, projection)
print("gemma4 row:", returned[0].tolist(), "sum", returned.sum(-1).tolist())
check(torch.allclose(returned, projected.softmax(-1)) and not torch.allclose(returned, projected), "Gemma 4 returns no probabilities")
projected, returned = routed(qwen, tokens, qwen.model.layers[0].mlp.gate)
print("qwen3_moe row:", returned[0].tolist())
check(torch.allclose(returned, projected), "Qwen3-MoE does not return the projection")
with torch.no_grad():
    projection.weight.mul_(1000)  # one token, again and again, and a router that is sure of itself
projected, returned = routed(gemma, torch.ones(1, 8, dtype=torch.long), projection)
losses = [round(load_balancing_loss_func((logits,), 4, 1).item(), 4) for logits in (projected, returned)]
print("balancing loss from the projection and from router_logits:", losses)
check(losses == [4.0, 1.9015], "the loss is another")
print("as described")
EOF
