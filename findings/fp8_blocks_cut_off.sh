#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: FP8 weights in blocks that the edges of a matrix cut off, as DeepSeek-V3's are, loaded with dequantize=True.
# Fp8Dequantize takes the size of a block from the number of scales, not from weight_block_size (rows / scales): 192 rows in blocks of 128, so
# two scales, are read as two blocks of 96. kv_a_proj_with_mqa has kv_lora_rank + qk_rope_head_dim rows: 512 + 64 in DeepSeek-V3 itself.
# Seen for a model of one layer, blocks of 128 x 128, qk_rope_head_dim 64: kv_lora_rank 64 (128 rows): as quantised. 128 (192 rows): loads
# without a word, kv_a_proj_with_mqa off by 0.20 in norm, all else right. 512 (576 rows, 5 scales): ValueError "Weight shape (576, 256) not
# divisible by scale grid (5, 2)." in the report, from_pretrained raises RuntimeError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install -q torch==2.13.0 numpy==2.4.6 huggingface_hub==2.4.0 tokenizers==0.23.3 \
    regex==2026.11.19 pyyaml==6.0.4 packaging==26.4 tqdm==4.70.1 psutil
"$python" -m pip install -q --no-deps transformers==5.23.0 safetensors==0.8.0 accelerate==1.15.0
export HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
cat > "$folder/check.py" << 'EOF'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, FineGrainedFP8Config

BLOCK = 128


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In blocks of 128 x 128, the last ones cut off by the edges: as DeepSeek-V3's own checkpoints."""
    rows, columns = weight.shape
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scales[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def dequantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape
    return codes.float() * scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def outcome(folder: Path, rank: int) -> str:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=256, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=1, first_k_dense_replace=1,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        kv_lora_rank=rank, q_lora_rank=128, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64,
    )
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
    tensors, wanted = load_file(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if name.endswith("proj.weight") or name.endswith("mqa.weight"):
            weight = weight * torch.linspace(0.5, 2.0, len(weight))[:, None]  # so that blocks have scales of their own
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(weight)
            wanted[name] = dequantised(tensors[name], tensors[f"{name}_scale_inv"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps(content))
    try:
        model = DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = model.state_dict()
    wrong = []
    for name, want in wanted.items():
        off = ((found[name].float() - want).norm() / want.norm()).item()
        wrong += [f"{name.split('.')[-2]} {tuple(want.shape)} is off by {off:.2f}"] if off > 0.01 else []
    return "; ".join(wrong) or "as quantised"


folder, rank, expected = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
found = outcome(folder, rank)
print(f"kv_lora_rank {rank}: {found[:400]}")
if expected not in found:
    sys.exit(f"the behaviour changed: expected {expected}")
EOF
check() { # kv_lora_rank, what is seen
    "$python" -W ignore "$folder/check.py" "$folder/model $1" "$1" "$2"
}
check 64 "as quantised"
check 128 "kv_a_proj_with_mqa (192, 256) is off by 0.2"
check 512 "issues during automatic conversion"
echo "as described"
