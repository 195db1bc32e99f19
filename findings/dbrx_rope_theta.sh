#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: a DBRX config's attn_config needs a rope_theta, and it has no effect.
# 1. DbrxConfig() with its defaults builds no model: the attention reads attn_config.rope_theta, which DbrxAttentionConfig does not have.
# 2. Given there, as that error asks for, the value stays in attn_config; the rotary embedding reads config.rope_parameters, whose base is
#    10000.0 all the same. A model made for 500000 then runs with another base, and nothing says so.
# 3. rope_theta beside attn_config, at the top of the config, does reach the rotary embedding.
# Seen: AttributeError "'DbrxAttentionConfig' object has no attribute 'rope_theta'"; attn_config 500000.0 gives the frequencies
# [1.0, 0.1, 0.01, 0.001], those of base 10000.0; top level 500000.0 gives [1.0, 0.037606, 0.001414, 5.3e-05].
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

from transformers import DbrxConfig, DbrxForCausalLM


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


def built(**more):
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "vocab_size": 32}
    return DbrxForCausalLM(DbrxConfig(**sizes, ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}, **more))


def frequencies(model):
    return [round(value, 6) for value in model.transformer.rotary_emb.inv_freq.tolist()]


try:
    built()
    sys.exit("the behaviour changed: the default attn_config builds a model")
except AttributeError as error:
    print("default:", error)
    check("rope_theta" in str(error), "another attribute is missing")
inner = built(attn_config={"kv_n_heads": 2, "rope_theta": 500000.0})
outer = built(attn_config={"kv_n_heads": 2, "rope_theta": 10000.0}, rope_theta=500000.0)
base = [round(10000.0 ** (-index / 4), 6) for index in range(4)]
meant = [round(500000.0 ** (-index / 4), 6) for index in range(4)]
print("attn_config:", inner.config.attn_config.rope_theta, inner.config.rope_parameters, frequencies(inner))
print("top level:", outer.config.rope_parameters, frequencies(outer))
check(inner.config.attn_config.rope_theta == 500000.0, "attn_config no longer keeps rope_theta")
check(frequencies(inner) == base, "attn_config's rope_theta reaches the rotary embedding")
check(frequencies(outer) == meant, "the top level's rope_theta no longer reaches the rotary embedding")
print("as described")
EOF
