"""`moe2dense convert` on a synthetic checkpoint with the layer shapes of Qwen3-30B-A3B: bytes a second over a plain loop that reads and
writes as many, neither from the page cache, and peak memory. Prints `name value unit goal`. MOE2DENSE_BENCH_BYTES shrinks it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_moe2dense.checkpoint.shards import ShardWriter, TensorSpec, shards_of
from megatron_moe2dense.common.outputs import write_json
from megatron_moe2dense.surgery.plan import ConversionPlan
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.types import LayerPlan

SPEED_GOAL, MEMORY_GOAL = 0.6, 1.0
BYTES = int(os.environ.get("MOE2DENSE_BENCH_BYTES", str(8 * 10**9)))
CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
EXPERT = {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}
ATTENTION = {
    "q_proj": (4096, 2048),
    "k_proj": (512, 2048),
    "v_proj": (512, 2048),
    "o_proj": (2048, 4096),
    "q_norm": (128,),
    "k_norm": (128,),
}
LAYER_BYTES = 2 * 128 * 3 * 768 * 2048
CHUNK = 1024**2


def specs(layers: int) -> list[TensorSpec]:
    """All tensors of a model of so many layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], 2048), "model.norm.weight": (2048,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}_layernorm.weight": (2048,) for norm in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{name}.weight": shape for name, shape in ATTENTION.items()}
        shapes[f"{layer}mlp.gate.weight"] = (128, 2048)
        shapes |= {f"{layer}mlp.experts.{e}.{name}.weight": shape for e in range(128) for name, shape in EXPERT.items()}
    return [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]


def make_source(directory: Path, layers: int) -> None:
    """Random finite bfloat16 weights, tensor by tensor."""
    directory.mkdir()
    write_json(directory / "config.json", {**CONFIG, "num_hidden_layers": layers})
    rng = np.random.default_rng(0)
    with ShardWriter(directory, shards_of(specs(layers)), 64 * CHUNK) as writer:
        for spec in specs(layers):
            for start in range(0, spec.nbytes, 16 * CHUNK):
                bits = rng.integers(0, 2**16, min(16 * CHUNK, spec.nbytes - start) // 2, np.uint16)
                # Sign and mantissa stay random, the exponent is that of values around 0.02.
                writer.write_bytes(spec.name, start, ((bits & 0x807F) | 0x3C80).view(np.uint8))
        writer.finish()


def make_plan(source: MoeSource, path: Path) -> None:
    """Eight experts of each layer, pure pruning."""
    layers = tuple(LayerPlan(i, tuple(range(i, 128, 16)), tuple(range(8)), (1.0,) * 8, (0.125,) * 8) for i in source.layers)
    blocks = {"score": {"method": "sf"}, "group": None, "scale": {"method": "uniform"}}
    ConversionPlan({"path": "", "fingerprint": source.fingerprint}, source.spec.name, 8, 8, **blocks, layers=layers).write(path)


def drop_from_cache(files: Iterable[Path]) -> None:
    """So that the next reader gets them from the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_copy(files: list[Path], written: int, target: Path) -> float:
    """Seconds of a loop that reads the files and writes so many bytes of them, to the disk."""
    drop_from_cache(files)
    buffer, left = bytearray(CHUNK), written
    start = time.perf_counter()
    with target.open("wb", buffering=0) as output:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    left -= output.write(memoryview(buffer)[: min(count, left)])
        os.fsync(output.fileno())
    spent = time.perf_counter() - start
    target.unlink()
    return spent


def convert(files: list[Path], folder: Path) -> tuple[float, int]:
    """Seconds of the conversion, and peak resident bytes of the process it runs in."""
    drop_from_cache(files)
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    spent, peak = json.loads(done.stdout.splitlines()[-1])
    return spent, peak


def child(folder: Path) -> None:
    """The conversion, in a process of its own."""
    from megatron_moe2dense.surgery import convert as command
    from megatron_moe2dense.surgery.config import ConvertConfig

    config = ConvertConfig(source=str(folder / "moe"), output=str(folder / "dense"), plan=str(folder / "plan.json"), overwrite=True)
    start = time.perf_counter()
    command.run(config)
    print(json.dumps([time.perf_counter() - start, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))


def main() -> None:
    """Make the checkpoint, then convert, copy, convert."""
    layers = max(1, (BYTES - 2 * CONFIG["vocab_size"] * 2048) // (LAYER_BYTES + 38 * 10**6))
    needed = sum(spec.nbytes for spec in specs(layers)) * 5 // 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < 2 * needed:
            sys.exit(f"{free} bytes free in {folder.parent}, twice {needed} wanted: set TMPDIR or MOE2DENSE_BENCH_BYTES")
        make_source(folder / "moe", layers)
        source = MoeSource.open(folder / "moe")
        make_plan(source, folder / "plan.json")
        files = sorted((folder / "moe").glob("*.safetensors"))
        read = sum(path.stat().st_size for path in files)
        spent, peak = convert(files, folder)
        written = sum(path.stat().st_size for path in (folder / "dense").glob("*.safetensors"))
        plain = plain_copy(files, written, folder / "copy")
        spent = (spent + convert(files, folder)[0]) / 2
    print(f"convert_{layers}_layers {(read + written) / spent / 1e9:.2f} GB/s -")
    print(f"convert_over_file_copy {plain / spent:.3f} ratio {SPEED_GOAL}")
    print(f"convert_peak_memory_over_2_layers_and_1GB {peak / (2 * LAYER_BYTES + 10**9):.3f} ratio {MEMORY_GOAL}")


if __name__ == "__main__":
    child(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
