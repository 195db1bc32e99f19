"""Configs of runs that can not start, and what they stand on: for the tests of the check before a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer.cache import write
from megatron_moe2dense.trainer.cache.config import CacheTeacherConfig
from megatron_moe2dense.trainer.config import DistillConfig
from tests.helpers.tiny_models import tiny, write_tokens

LENGTH = 16


def write_inputs(root: Path) -> Path:
    """Models, text and caches, right and wrong ones, in `root`."""
    tiny("qwen3", root / "student")
    tiny("qwen3", root / "narrow", hidden_size=32)
    tiny("qwen3", root / "three", num_key_value_heads=3, num_attention_heads=6, num_hidden_layers=3)
    tiny("qwen3", root / "other vocabulary", vocab_size=300)
    tiny("qwen3_moe", root / "teacher")
    tiny("gpt_oss", root / "gpt_oss")
    tiny("deepseek_v3", root / "deepseek_v3")
    tiny("deepseek_v3", root / "not renormalised", norm_topk_prob=False)
    write_tokens(root / "tokens", LENGTH * 64 + 1)
    write_tokens(root / "short", LENGTH)
    write_tokens(root / "other tokenizer", np.arange(400), vocab=400)
    file = tiny("qwen3", root / "two tables", tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    cache = {"teacher": "{root}/teacher", "output": "{root}/cache", "data": {"path": "{root}/tokens", "sequence_length": LENGTH}, "k": 8}
    cache |= {"samples": 16, "teacher_check": {"loss_bound": None, "stock_forward": "never"}, "dtype": "float32"}
    write.run(build(CacheTeacherConfig, _placed(cache, root), "the test"))
    shutil.copytree(root / "cache", root / "other cache")
    manifest = root / "other cache/moe2dense.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 0'))
    return root


def config(root: Path, **changes: Any) -> DistillConfig:
    """`{root}` in any text is the folder of models and tokens."""
    settings: dict[str, Any] = {
        "student": "{root}/student",
        "teacher": "{root}/teacher",
        "output": "{root}/run",
        "data": {"path": "{root}/tokens", "sequence_length": LENGTH},
        "batch": {"micro": 1, "global": 8},
        "train": {"steps": 2},
        "teacher_check": {"loss_bound": None, "stock_forward": "never"},
        "dtype": "float32",
    }
    merged = {**settings, **{name: {**settings.get(name, {}), **value} if name == "data" else value for name, value in changes.items()}}
    if merged["teacher"] is None:
        del merged["teacher_check"]
    return build(DistillConfig, _placed(merged, root), "the test")


def _placed(value: Any, root: Path) -> Any:
    if isinstance(value, dict):
        return {name: _placed(item, root) for name, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, root) for item in value]
    return value.replace("{root}", str(root)) if isinstance(value, str) else value


# What is changed, the processes, and where the error comes from: by file and function of the trainer, or of the tokens it reads.
CASES: dict[str, tuple[dict[str, Any], int, str]] = {
    "two tables of embeddings": ({"student": "{root}/two tables"}, 1, "weights.py require_one_table"),
    "another vocabulary": ({"student": "{root}/other vocabulary"}, 1, "teacher.py require_same_vocabulary"),
    "processes that make no groups": ({"parallel": {"tensor": 2}}, 3, "groups.py require_world"),
    "a sequence that does not divide": ({"parallel": {"context": 2}, "data": {"sequence_length": 18}}, 2, "groups.py require_sequence"),
    "a batch that does not divide": ({"batch": {"micro": 3, "global": 8}}, 1, "groups.py require_rounds"),
    "half a round of the pipeline": (
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "batch": {"micro": 1, "global": 3}},
        2,
        "groups.py require_rounds",
    ),
    "KV heads that do not divide": ({"student": "{root}/three", "parallel": {"tensor": 2}}, 2, "model.py require_kv_heads"),
    "experts that do not divide": ({"parallel": {"expert": 3}, "batch": {"micro": 1, "global": 9}}, 3, "model.py require_division"),
    "an FFN that does not divide": (
        {"student": "{root}/three", "teacher": None, "parallel": {"tensor": 3}},
        3,
        "model.py require_division",
    ),
    "experts with biases, split": (
        {"student": "{root}/gpt_oss", "teacher": None, "parallel": {"tensor": 2, "sequence": True}},
        2,
        "model.py require_whole_biases",
    ),
    "windows over context-parallel ranks": (
        {"student": "{root}/gpt_oss", "teacher": None, "parallel": {"context": 4}, "data": {"sequence_length": 32}},
        4,
        "layout.py _require_attention",
    ),
    "a MoE student without sequence parallelism": (
        {"student": "{root}/teacher", "teacher": None, "parallel": {"tensor": 2}},
        2,
        "model.py require_sequence_for_experts",
    ),
    "layers that do not divide": ({"parallel": {"pipeline": 3}}, 3, "pipeline.py PipelineLayout._of"),
    "layers that do not add up": ({"parallel": {"pipeline": 2, "layers_per_stage": [2, 1]}}, 2, "pipeline.py PipelineLayout._of"),
    "a pattern of parts that fits nothing": ({"train": {"steps": 1, "parts": ["nothing.*"]}}, 1, "parts.py Parts._require"),
    "more active experts than there are": ({"teacher_routing": {"active": 9}}, 1, "teacher.py active_experts"),
    "more active experts than the groups have": (
        {"teacher": "{root}/deepseek_v3", "teacher_routing": {"active": 6}},
        1,
        "runtime/routers.py require_router",
    ),
    "a router without renormalisation": ({"teacher": "{root}/not renormalised"}, 1, "runtime/routers.py require_router"),
    "wider routing of a dense teacher": (
        {"teacher": "{root}/student", "teacher_routing": {"active": 2}},
        1,
        "layout.py _require_routing",
    ),
    "Muon for a MoE": (
        {
            "student": "{root}/teacher",
            "teacher": None,
            "optim": {"muon": {}},
            "parallel": {"distributed_optimizer": False},
        },
        1,
        "muon.py require_dense",
    ),
    "hidden states of another size": (
        {"student": "{root}/narrow", "loss": {"method": "hidden_state"}},
        1,
        "losses/hidden_state.py HiddenState.require_models",
    ),
    "a top k beyond the vocabulary": ({"loss": {"method": "top_k_kl", "k": 257}}, 1, "losses/top_k_kl.py TopKKl.require_models"),
    "balancing of a dense student": ({"teacher": None, "moe": {}}, 1, "balancing.py require"),
    "padding beyond the vocabulary": ({"data": {"pad_token": 256}}, 1, "data/datasets.py Reading.masked"),
    "no token that ends documents": ({"data": {"mask_end_of_document": True}}, 1, "data/datasets.py _end_of_document"),
    "documents that end otherwise": (
        {"data": {"mask_end_of_document": True, "end_of_document": 255}},
        1,
        "data/datasets.py _require_ends",
    ),
    "100 times more tokens than there are": ({"train": {"tokens": 100 * 64 * LENGTH}}, 1, "data/datasets.py _require"),
    "text shorter than a sample": ({"data": {"path": "{root}/short"}}, 1, "data/datasets.py require_file"),
    "text of another tokenizer": ({"data": {"path": "{root}/other tokenizer"}}, 1, "tokens/indexed.py require_vocabulary"),
    "too little held-out text": (
        {"data": {"validation": "{root}/tokens", "validation_sequences": 65}},
        1,
        "data/samples.py require_validation",
    ),
    "a cache of other text": (
        {"teacher": None, "teacher_cache": "{root}/cache", "loss": {"method": "top_k_kl", "k": 4}, "data": {"sequence_length": 8}},
        1,
        "cache/teacher.py require_cache",
    ),
    "a cache of another format": (
        {"teacher": None, "teacher_cache": "{root}/other cache", "loss": {"method": "top_k_kl", "k": 4}},
        1,
        "cache/files.py CacheFacts.of_manifest",
    ),
    "an output that is no run": ({"output": "{root}/gpt_oss"}, 1, "identity.py claimable"),
    "an output that is read": ({"output": "{root}/student"}, 1, "common/outputs.py require_apart"),
    "loggers that are not there": ({"logging": {"wandb": {"project": "p"}}}, 1, "metrics.py require_loggers"),
    "a GPU that is not there": ({"device": "cuda"}, 1, "runtime/__init__.py require_device"),
    "FP8 without its kernels": ({"dtype": "bfloat16", "fp8": {}}, 1, "runtime/fp8.py require"),
}
# What no header says, and what is not of the start-up of `distill`.
OTHERS = {
    "agreement.py raise_on_all_ranks": "another rank's error",
    "cache/files.py CacheReader._sample": "read in a step: bytes of a shard",
    "cache/write.py _require_k": "cache-teacher's own: see test_cache_teacher_asks_before_it_claims_its_output",
    "cache/write.py _claim": "cache-teacher's own: its unfinished output",
    "checkpoints/checkpointer.py Checkpointer._check_layout": "of a checkpoint, whose checksums are read first",
    "checkpoints/checkpointer.py verify": "every byte of a checkpoint, each rank its share",
    "checkpoints/checkpointer.py _common": "of a checkpoint, whose checksums are read first",
    "checkpoints/checkpointer.py check_shapes": "of a checkpoint, whose checksums are read first",
    "checkpoints/pickles.py require_data": "of a checkpoint, whose checksums are read first",
    "checkpoints/pickles.py as_data": "of a checkpoint, whose checksums are read first",
    "checkpoints/writer.py step_of": "export's argument",
    "checkpoints/writer.py _not_written": "a disk that fills up later",
    "layout.py refuse": "all of them together",
    "loop.py Trainer._give_up_on": "steps that stay NaN",
    "state.py TrainState.restored": "of a checkpoint, whose checksums are read first",
    "verification/fingerprint.py verify": "every value, in the model and in the files",
    "verification/stock.py logits": "a forward pass",
    "verification/verify.py verify_teacher": "every value",
    "verification/verify.py _judge": "a forward pass",
    "watchdog.py late": "ranks that hang",
    "watchdog.py _no_store": "ranks that hang",
    "weights.py _checked": "every value: NaN; shapes are those of the account",
}
