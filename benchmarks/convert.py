"""`moe2dense convert` and `calibrate` on synthetic checkpoints with the layer shapes of Qwen3-30B-A3B, in bfloat16 and in FP8 blocks: bytes
a second over a plain loop that reads and writes as many, neither from the page cache, and peak memory. Prints `name value unit goal`.
MOE2DENSE_BENCH_BYTES shrinks it."""

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
from megatron_moe2dense.tokens.indexed import write_token_file

SPEED_GOAL, MEMORY_GOAL, FP8_GOAL = 0.6, 1.0, 0.8
KINDS, STAGES = ("bf16", "fp8"), ("convert", "calibrate")
BLOCK = 128
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
TOKENS = 64  # so few that reading, not arithmetic, takes the time of a calibration
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


def specs(layers: int, kind: str) -> list[TensorSpec]:
    """All tensors of a model of so many layers; fp8: its linear layers in blocks, each with a scale."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], 2048), "model.norm.weight": (2048,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}_layernorm.weight": (2048,) for norm in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{name}.weight": shape for name, shape in ATTENTION.items()}
        shapes[f"{layer}mlp.gate.weight"] = (128, 2048)
        shapes |= {f"{layer}mlp.experts.{e}.{name}.weight": shape for e in range(128) for name, shape in EXPERT.items()}
    found = []
    for name, shape in shapes.items():
        plain = kind == "bf16" or len(shape) < 2 or "embed" in name or ".mlp.gate." in name
        found += [TensorSpec(name, "BF16" if plain else "F8_E4M3", shape)]
        found += [] if plain else [TensorSpec(f"{name}_scale_inv", "F32", (shape[0] // BLOCK, shape[1] // BLOCK))]
    return found


def make_source(directory: Path, layers: int, kind: str) -> None:
    """Random finite weights, tensor by tensor."""
    directory.mkdir()
    write_json(
        directory / "config.json", {**CONFIG, "num_hidden_layers": layers, **({"quantization_config": FP8} if kind == "fp8" else {})}
    )
    rng = np.random.default_rng(0)
    with ShardWriter(directory, shards_of(specs(layers, kind)), 64 * CHUNK) as writer:
        for spec in specs(layers, kind):
            for start in range(0, spec.nbytes, 16 * CHUNK):
                writer.write_bytes(spec.name, start, _numbers(rng, spec.dtype, min(16 * CHUNK, spec.nbytes - start)).view(np.uint8))
        writer.finish()


def _numbers(rng: np.random.Generator, dtype: str, nbytes: int) -> np.ndarray:
    """Sign and mantissa are random, the exponent is that of values around 0.02; FP8: of codes around 1, with scales that make them so."""
    if dtype == "F32":
        return np.full(nbytes // 4, 0.015, np.float32)
    if dtype == "F8_E4M3":
        return (rng.integers(0, 2**8, nbytes, np.uint8) & 0x87) | 0x38
    return (rng.integers(0, 2**16, nbytes // 2, np.uint16) & 0x807F) | 0x3C80


def make_plan(source: MoeSource, path: Path) -> None:
    """Eight experts of each layer, pure pruning."""
    layers = tuple(LayerPlan(i, tuple(range(i, 128, 16)), tuple(range(8)), (1.0,) * 8, (0.125,) * 8) for i in source.layers)
    blocks = {"score": {"method": "sf"}, "group": None, "scale": {"method": "uniform"}}
    ConversionPlan({"path": "", "fingerprint": source.fingerprint}, source.family, 8, 8, **blocks, layers=layers).write(path)


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


def stage(name: str, files: list[Path], folder: Path) -> tuple[float, int]:
    """Seconds of a command on the checkpoint in `folder`, and peak resident bytes of the process it runs in."""
    drop_from_cache(files)
    command = [sys.executable, __file__, name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    spent, peak = json.loads(done.stdout.splitlines()[-1])
    return spent, peak


def child(name: str, folder: Path) -> None:
    """A command, in a process of its own; what it imports is not timed."""
    from megatron_moe2dense.surgery import calibrate, convert
    from megatron_moe2dense.surgery.config import CalibrateConfig, ConvertConfig
    from megatron_moe2dense.tokens.config import TokensConfig

    source, data = str(folder / "moe"), TokensConfig(path=str(folder / "tokens"), sequence_length=TOKENS, sequences=1)
    if name == "convert":
        config = ConvertConfig(source=source, output=str(folder / "dense"), plan=str(folder / "plan.json"), overwrite=True)
    else:
        config = CalibrateConfig(source=source, output=str(folder / "stats"), data=data, overwrite=True)
    start = time.perf_counter()
    convert.run(config) if isinstance(config, ConvertConfig) else calibrate.run(config)
    print(json.dumps([time.perf_counter() - start, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))


def measured(folder: Path, layers: int, kind: str) -> dict[str, tuple[float, float, int]]:
    """By stage: bytes read and written a second, the time of a plain copy over its own, peak bytes. Each runs before and after the copy."""
    folder.mkdir()
    make_source(folder / "moe", layers, kind)
    make_plan(MoeSource.open(folder / "moe"), folder / "plan.json")
    write_token_file(str(folder / "tokens"), [np.arange(TOKENS)], CONFIG["vocab_size"])
    files = sorted((folder / "moe").glob("*.safetensors"))
    read, found = sum(path.stat().st_size for path in files), {}
    for name in STAGES:
        spent, peak = stage(name, files, folder)
        written = sum(path.stat().st_size for path in (folder / ("dense" if name == "convert" else "stats")).glob("*.safetensors"))
        plain = plain_copy(files, written, folder / "copy")
        spent = (spent + stage(name, files, folder)[0]) / 2
        found[name] = ((read + written) / spent, plain / spent, peak)
    shutil.rmtree(folder)
    return found


def main() -> None:
    """Both kinds, one after the other on the same disk."""
    layers = max(1, (BYTES - 2 * CONFIG["vocab_size"] * 2048) // (LAYER_BYTES + 38 * 10**6))
    needed = sum(spec.nbytes for spec in specs(layers, "bf16")) * 5 // 4
    with tempfile.TemporaryDirectory() as name:
        free = shutil.disk_usage(name).free
        if free < 2 * needed:
            sys.exit(f"{free} bytes free in {Path(name).parent}, twice {needed} wanted: set TMPDIR or MOE2DENSE_BENCH_BYTES")
        found = {kind: measured(Path(name) / kind, layers, kind) for kind in KINDS}
    for name in STAGES:
        for kind in KINDS:
            speed, ratio, peak = found[kind][name]
            print(f"{name}_{kind}_{layers}_layers {speed / 1e9:.2f} GB/s -")
            print(f"{name}_{kind}_over_file_copy {ratio:.3f} ratio {SPEED_GOAL if (name, kind) == ('convert', 'bf16') else '-'}")
            goal = MEMORY_GOAL if name == "convert" else "-"
            print(f"{name}_{kind}_peak_memory_over_2_layers_and_1GB {peak / (2 * LAYER_BYTES + 10**9):.3f} ratio {goal}")
        print(f"{name}_fp8_over_bf16 {found['fp8'][name][1] / found['bf16'][name][1]:.3f} ratio {FP8_GOAL}")


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) > 2 else main()
