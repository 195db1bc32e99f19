"""Generation through stock transformers: the example's MoE against the dense model that convert makes of it; lines `name value unit goal`.

One process, the same prompts, in turns: ratios of tokens/s (dense over MoE) and of peak memory (MoE over dense).
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_moe2dense.cli import main as moe2dense
from megatron_moe2dense.evals.generation import greedy, peak_memory, rates
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.indexed import Limits, windows

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/pico_moe"
PROMPT, NEW, BATCHES, ROUNDS = 256, 16, (1, 8), 5


def dense_student(folder: str) -> str:
    """The example's MoE as a dense model: as many expert parameters as it activates for a token."""
    source = f"source={EXAMPLE / 'model'}"
    text = [f"data.path={EXAMPLE / 'tokens/distill'}", "data.sequence_length=256", "data.sequences=8"]
    moe2dense(["calibrate", source, f"output={folder}/statistics", *text])
    moe2dense(["convert", source, f"statistics={folder}/statistics", f"output={folder}/dense", "score.method=sf", "scale.method=uniform"])
    return f"{folder}/dense"


def compare(moe: PreTrainedModel, dense: PreTrainedModel, prompts_BS: torch.Tensor) -> None:
    """Print the lines of one batch size."""
    batch, runs = len(prompts_BS), {"moe": [], "dense": []}
    peaks = {name: peak_memory(model, prompts_BS, NEW) for name, model in (("moe", moe), ("dense", dense))}  # also the warm-up
    for _ in range(ROUNDS):
        for name, model in (("moe", moe), ("dense", dense)):
            runs[name].append(greedy(model, prompts_BS, NEW))
    for name, found in runs.items():
        for key, value in rates(found, prompts_BS).items():
            print(f"generate_{name}_{key.removesuffix('_tokens_per_second')}_batch_{batch} {value:.0f} tokens/s -")
        print(f"generate_{name}_peak_memory_batch_{batch} {peaks[name]['peak_memory_bytes'] / 1e6:.2f} MB -")
    for phase in ("prefill", "decode"):
        ratios = [
            getattr(slow, f"{phase}_seconds") / getattr(fast, f"{phase}_seconds")
            for slow, fast in zip(runs["moe"], runs["dense"], strict=True)
        ]
        print(f"generate_{phase}_dense_over_moe_batch_{batch} {statistics.median(ratios):.2f} ratio >=1.0")
    ratio = peaks["moe"]["peak_memory_bytes"] / peaks["dense"]["peak_memory_bytes"]
    print(f"generate_peak_memory_moe_over_dense_batch_{batch} {ratio:.2f} ratio >=1.0")


def main() -> None:
    """Convert, then compare at each batch size."""
    with tempfile.TemporaryDirectory() as folder:
        paths = (str(EXAMPLE / "model"), dense_student(folder))
        moe, dense = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in paths)
        prompts = TokensConfig(path=str(EXAMPLE / "tokens/heldout"), sequence_length=PROMPT, sequences=max(BATCHES))
        prompts_BS = torch.from_numpy(windows(prompts, Limits(moe.config.vocab_size)))
        for batch in BATCHES:
            compare(moe, dense, prompts_BS[:batch])


if __name__ == "__main__":
    main()
