#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: an FP8 checkpoint (quant_method fp8, blocks) loaded on a CPU in another type than that of its plain
# tensors. from_pretrained(..., dtype=X) dequantises the FP8 weights to X, but leaves embeddings, norms and head in the type that they have in
# the file: the model has two types, and its forward pass raises. The same model without FP8 comes in X as a whole.
# Seen for a Qwen3 of one layer: file in bfloat16 and dtype=float32, file in float32 and dtype=bfloat16, by itself or with dequantize=True:
# "expected m1 and m2 to have the same dtype". With dtype that of the file's plain tensors it runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install -q torch==2.13.0 numpy==2.4.6 huggingface_hub==2.4.0 tokenizers==0.23.3 \
    regex==2026.11.19 pyyaml==6.0.4 packaging==26.4 tqdm==4.70.1 psutil
"$python" -m pip install -q --no-deps transformers==5.23.0 safetensors==0.8.0 accelerate==1.15.0
export HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
cat > "$folder/check.py" << 'END'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3Config, Qwen3ForCausalLM

BLOCK = 32
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def checkpoint(folder: Path, dtype: torch.dtype, fp8: bool) -> Path:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32)).to(dtype).save_pretrained(folder)
    if not fp8:
        return folder
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if name.endswith("proj.weight"):
            blocks = weight.float().view(weight.shape[0] // BLOCK, BLOCK, -1, BLOCK)
            scales = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scales[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def outcome(folder: Path, dtype: torch.dtype, **options: object) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    types = "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.state_dict().values()}))
    try:
        model(torch.arange(8)[None])
    except RuntimeError as error:
        return f"{types}: {error}"
    return f"{types}: runs"


root, asked = Path(sys.argv[1]), FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
wrong = []
for stored in (torch.bfloat16, torch.float32):
    plain, fp8 = (checkpoint(root / f"{kind} {stored}", stored, kind == "fp8") for kind in ("plain", "fp8"))
    for wanted in (torch.bfloat16, torch.float32):
        found = [outcome(plain, wanted), outcome(fp8, wanted), outcome(fp8, wanted, quantization_config=asked)]
        print(f"plain tensors in {stored}, dtype={wanted}: without FP8 {found[0]}; FP8 {found[1]}; dequantize=True {found[2]}")
        expected = "runs" if stored == wanted else "bfloat16+float32: expected m1 and m2 to have the same dtype"
        wrong += [] if found[0].endswith("runs") and all(expected in each for each in found[1:]) else [found]
if wrong:
    sys.exit(f"the behaviour changed: {wrong}")
END
"$python" -W ignore "$folder/check.py" "$folder/models"
echo "as described"
