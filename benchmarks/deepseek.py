"""`moe2dense calibrate` and `convert` on a DeepSeek-V3 of its own widths, few layers and few experts, in FP8 blocks of 128 x 128: peak
memory of each over two of its layers as they compute, which is what streaming holds. Prints `name value unit goal`."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_moe2dense.checkpoint.shards import ShardWriter, TensorSpec, shards_of
from megatron_moe2dense.common.outputs import write_json
from megatron_moe2dense.tokens.indexed import write_token_file

GOAL = 1.0
LAYERS, EXPERTS, VOCABULARY, TOKENS = 4, 8, 4096, 64
BLOCK, CHUNK, OUTSIDE = 128, 16 * 1024**2, 10**9
HIDDEN, WIDTH, DENSE_WIDTH, HEADS = 7168, 2048, 18432, 128
CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE_WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]},
}
ATTENTION = {
    "q_a_proj": (1536, HIDDEN),
    "q_b_proj": (HEADS * 192, 1536),
    "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (HEADS * 256, 512),
    "o_proj": (HIDDEN, HEADS * 128),
}
# Of the two kinds of layers the larger one, in float32.
LAYER_BYTES = 4 * (sum(a * b for a, b in ATTENTION.values()) + 3 * HIDDEN * max(DENSE_WIDTH, (EXPERTS + 1) * WIDTH))


def specs() -> list[TensorSpec]:
    """All tensors, linear layers with a scale a block; 576 rows are four blocks and a half."""
    plain: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    plain |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, HIDDEN))
    linear: dict[str, tuple[int, int]] = {}
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        plain |= {f"{layer}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        plain |= {f"{layer}self_attn.q_a_layernorm.weight": (1536,), f"{layer}self_attn.kv_a_layernorm.weight": (512,)}
        linear |= {f"{layer}self_attn.{name}": shape for name, shape in ATTENTION.items()}
        ffns = {"mlp": DENSE_WIDTH}
        if number:
            plain |= {f"{layer}mlp.gate.weight": (EXPERTS, HIDDEN), f"{layer}mlp.gate.e_score_correction_bias": (EXPERTS,)}
            ffns = {f"mlp.experts.{expert}": WIDTH for expert in range(EXPERTS)} | {"mlp.shared_experts": WIDTH}
        for place, width in ffns.items():
            linear |= {f"{layer}{place}.{name}_proj": (width, HIDDEN) for name in ("gate", "up")}
            linear[f"{layer}{place}.down_proj"] = (HIDDEN, width)
    found = [TensorSpec(name, "F32" if name.endswith("bias") else "BF16", shape) for name, shape in plain.items()]
    for name, (rows, columns) in linear.items():
        found.append(TensorSpec(f"{name}.weight", "F8_E4M3", (rows, columns)))
        found.append(TensorSpec(f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))))
    return found


def make_source(directory: Path) -> None:
    """Random signs and mantissas of numbers around 0.01."""
    directory.mkdir()
    write_json(directory / "config.json", CONFIG)
    rng = np.random.default_rng(0)
    with ShardWriter(directory, shards_of(specs()), 8 * CHUNK) as writer:
        for spec in specs():
            for start in range(0, spec.nbytes, CHUNK):
                count = min(CHUNK, spec.nbytes - start)
                if spec.dtype == "F8_E4M3":
                    data = (rng.integers(0, 2**8, count, np.uint8) & 0x87) | 0x38
                elif spec.dtype == "F32":
                    data = np.full(count // 4, 0.01, np.float32)
                else:
                    data = (rng.integers(0, 2**16, count // 2, np.uint16) & 0x807F) | 0x3C00
                writer.write_bytes(spec.name, start, data.view(np.uint8))
        writer.finish()


def child(name: str, folder: Path) -> None:
    """A command, in a process of its own."""
    from megatron_moe2dense.cli import main as run

    source, output = f"source={folder / 'moe'}", folder / name
    data = [f"data.path={folder / 'tokens'}", f"data.sequence_length={TOKENS}", "data.sequences=1"]
    start = time.perf_counter()
    run([name, source, f"output={output}", *(data if name == "calibrate" else [f"statistics={folder / 'calibrate'}"])])
    print(json.dumps([time.perf_counter() - start, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))


def main() -> None:
    """Make the checkpoint, then one command after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_source(folder / "moe")
        write_token_file(str(folder / "tokens"), [np.arange(TOKENS)], VOCABULARY)
        print(f"deepseek_v3_layer_in_float32 {LAYER_BYTES / 1e9:.2f} GB -")
        for command in ("calibrate", "convert"):
            done = subprocess.run(
                [sys.executable, __file__, command, name],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            spent, peak = json.loads(done.stdout.splitlines()[-1])
            print(f"deepseek_v3_{command} {spent:.1f} s -")
            print(f"deepseek_v3_{command}_peak_memory {peak / 1e9:.2f} GB -")
            print(f"deepseek_v3_{command}_peak_memory_over_2_layers_and_1GB {peak / (2 * LAYER_BYTES + OUTSIDE):.3f} ratio {GOAL}")


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) > 2 else main()
