"""The offline teacher: what the cache holds, against stock transformers; training on it, against training on the live teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import distill
from megatron_moe2dense.trainer.cache.files import CacheReader
from megatron_moe2dense.trainer.config import DistillConfig, ParallelConfig
from megatron_moe2dense.trainer.groups import require_sequence
from megatron_moe2dense.trainer.losses.targets import TopKTarget
from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.trainer.cache_cases import write_all

LENGTH, SAMPLES, K, STEPS = 32, 12, 8, 3
CAN_HOLD = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "EP2 DP2": {"expert": 2},
}
READ_IN = ["TP2 SP", "PP2", "CP2", "DP2"]
UNTRAINED = {"loss_bound": None, "stock_forward": "never"}

pytestmark = pytest.mark.distributed


def cache(root: Path, name: str, **settings: Any) -> dict[str, Any]:
    base = {
        "teacher": str(root / "teacher"),
        "output": str(root / "caches" / name),
        "data": {"path": str(root / "tokens"), "sequence_length": LENGTH},
        "seed": 3,
        "k": K,
        "store": "float32",
        "shard_samples": 5,
        "teacher_check": UNTRAINED,
        "dtype": "float32",
    }
    return {**base, **settings}


def run(root: Path, name: str, **settings: Any) -> dict[str, Any]:
    base = {
        "student": str(root / "student"),
        "teacher": None,
        "teacher_cache": str(root / "caches/float32"),
        "output": str(root / "runs" / name),
        "data": {"path": str(root / "tokens"), "sequence_length": LENGTH},
        "loss": {"method": "top_k_kl", "k": 5},
        "optim": {"lr": 1e-2},
        "schedule": {"style": "constant", "warmup": 0.0},
        "batch": {"micro": 2, "global": 4},
        "train": {"steps": STEPS, "seed": 3},
        "dtype": "float32",
    }
    return {**base, **settings}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    tiny_qwen3_moe(root / "teacher", seed=1)
    tiny_qwen3(root / "student", seed=2)
    for model in ("teacher", "student"):
        (root / model / "tokenizer.json").write_text("{}")
    write_tokens(root / "tokens", LENGTH * SAMPLES + 1)
    write_all([cache(root, store, store=store) for store in CAN_HOLD])
    distilled(run(root, "live", teacher=str(root / "teacher"), teacher_cache=None, teacher_check=UNTRAINED))
    return root


def distilled(config: dict[str, Any]) -> list[dict[str, Any]]:
    distill.run(build(DistillConfig, config, "the test"))
    return records.read(Path(config["output"]) / "metrics.jsonl")


def whole(directory: Path) -> TopKTarget:
    """All that a cache holds, samples in order."""
    return CacheReader(directory).read(range(SAMPLES), torch.arange(LENGTH).expand(SAMPLES, -1))


def tokens_in_order(root: Path) -> torch.Tensor:
    """The samples of the stream [SAMPLES, LENGTH], through the reading that a run does."""
    from megatron_moe2dense.trainer import groups, runtime
    from megatron_moe2dense.trainer.data.samples import training_stream

    config = build(DistillConfig, run(root, "order"), "the test")
    with runtime.session("cpu") as device, groups.initialized(config.parallel, 3) as layout:
        stream = training_stream(config, layout, device.device, 256)
        return torch.cat([batch.tokens for batch in stream.micro_batches(0, SAMPLES)])


@pytest.mark.parametrize("store", CAN_HOLD)
def test_a_cache_holds_the_stock_models_top_k_by_sample_number(store: str, root: Path):
    found = whole(root / "caches" / store)
    stock = AutoModelForCausalLM.from_pretrained(root / "teacher", dtype=torch.float32)
    with torch.no_grad():
        log_p_TV = stock(input_ids=tokens_in_order(root)).logits.double().log_softmax(-1).transpose(0, 1).flatten(0, 1)
    expected = log_p_TV.topk(K)
    error = (found.log_p_TK - log_p_TV.gather(-1, found.indices_TK)).abs()
    # renormalising moves all of a token's values by the mean of their errors
    assert (error <= 2 * CAN_HOLD[store] * expected.values.abs().amax(-1, keepdim=True) + 1e-5).all()
    assert (expected.values - log_p_TV.gather(-1, found.indices_TK)).abs().max() < 1e-5, "not the best k"
    tail_T = log_p_TV.scatter(-1, expected.indices, -torch.inf).exp().sum(-1)
    assert (found.tail_T - tail_T).abs().max() < 10 * CAN_HOLD[store] + 1e-5
    assert (found.log_p_TK.exp().sum(-1) + found.tail_T - 1).abs().max() < 1e-5


@pytest.fixture(scope="module")
def layouts(root: Path) -> Path:
    """Caches written in every layout, and runs in every layout on a cache written by one process."""
    caches = [cache(root, name, parallel=parallel, micro_batch=2) for name, parallel in LAYOUTS.items()]
    runs = [run(root, f"cached {name}", parallel=LAYOUTS.get(name, {})) for name in READ_IN]
    launch(2, "tests.trainer.cache_cases:write_and_distill", caches, runs)
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_writes_the_same_cache(name: str, layouts: Path):
    found, expected = whole(layouts / "caches" / name), whole(layouts / "caches/float32")
    assert (found.log_p_TK - expected.log_p_TK).abs().max() < 1e-5
    assert (found.tail_T - expected.tail_T).abs().max() < 1e-6
    assert (found.indices_TK == expected.indices_TK).float().mean() > 0.99, "neighbours may change places where they almost tie"


def assert_same_curve(found: list[dict[str, Any]], root: Path, tolerance: float = 1e-5) -> None:
    expected = records.read(root / "runs/live/metrics.jsonl")
    assert len(found) == len(expected) == STEPS
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=tolerance)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * tolerance)


def test_training_on_the_cache_equals_training_on_the_live_teacher(root: Path):
    assert_same_curve(distilled(run(root, "cached")), root)
    beside = run(root, "beside the teacher it is of", teacher=str(root / "teacher"), batch={"micro": 4, "global": 4})
    assert_same_curve(distilled(beside), root)


@pytest.mark.parametrize("name", READ_IN)
def test_every_layout_reads_the_same_cache(name: str, layouts: Path):
    assert_same_curve(records.read(layouts / "runs" / f"cached {name}" / "metrics.jsonl"), layouts)


def test_a_half_precision_cache_trains_almost_alike(root: Path):
    rows = distilled(run(root, "cached in float16", teacher_cache=str(root / "caches/float16")))
    assert_same_curve(rows, root, tolerance=1e-3)


def test_a_cached_teacher_says_nothing_about_held_out_text(root: Path):
    data = {"path": str(root / "tokens"), "sequence_length": LENGTH, "validation": str(root / "tokens"), "validation_sequences": 2}
    loss = {"method": "mixture", "terms": [{"weight": 0.5, "loss": {"method": name, **o}} for name, o in MIXED.items()]}
    row = distilled(run(root, "evaluated", data=data, loss=loss))[-1]
    assert row["eval_loss"] > 0
    assert row["eval_kl"] is None


MIXED: dict[str, dict[str, Any]] = {"top_k_kl": {"k": 5}, "cross_entropy": {}}


def test_a_blend_longer_than_the_run_serves_it(root: Path):
    """The first samples of a longer stream are those of a shorter one."""
    write_tokens(root / "more", LENGTH * 20 + 1, seed=9)
    blend = [{"path": str(root / "tokens"), "weight": 1.0}, {"path": str(root / "more"), "weight": 2.0}]
    data = {"blend": blend, "sequence_length": LENGTH}
    write_all([cache(root, "blend", data=data, samples=24)])
    found = distilled(run(root, "cached blend", data=data, teacher_cache=str(root / "caches/blend")))
    live = distilled(run(root, "live blend", data=data, teacher=str(root / "teacher"), teacher_cache=None, teacher_check=UNTRAINED))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in live], rel=1e-5)


def refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        distill.run(build(DistillConfig, config, "the test"))


def changed(root: Path, **data: Any) -> dict[str, Any]:
    return {"data": {"path": str(root / "tokens"), "sequence_length": LENGTH, **data}}


def test_a_cache_of_something_else_is_refused(root: Path):
    tiny_qwen3(root / "wider", vocab_size=300)
    shutil.copytree(root / "student", root / "retokenised")
    (root / "retokenised/tokenizer.json").write_text('{"another": 1}')
    tiny_qwen3_moe(root / "another teacher", seed=7)
    write_tokens(root / "another text", LENGTH * SAMPLES + 1, seed=8)
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "seed": (r"seed 3\n.*seed 4, as in", {"train": {"steps": STEPS, "seed": 4}}),
        "length": (r"sequence_length 32\n.*sequence_length 16", changed(root, sequence_length=16)),
        "passes": (r"epochs 1\n.*epochs 2", changed(root, epochs=2)),
        "text": (r"text [0-9a-f]{12} x 1\n", changed(root, path=str(root / "another text"))),
        "vocabulary": (r"vocabulary 256\n.*vocabulary 300", {"student": str(root / "wider")}),
        "tokenizer": (r"tokenizer [0-9a-f]+\n", {"student": str(root / "retokenised")}),
        "teacher": (r"teacher [0-9a-f]+\n.*that of .*another teacher", {"teacher": str(root / "another teacher")}),
        "k": (r"k 8\n.*k 9 or more", {"loss": {"method": "top_k_kl", "k": 9}}),
        "no cache": (r"moe2dense.json", {"teacher_cache": str(root / "nothing")}),
        "a run": (r"is finished output of `distill`", {"teacher_cache": str(root / "runs/live")}),
        "default loss": (r"the default loss needs all", {"loss": None}),
        "full KL": (r"forward_kl needs all", {"loss": {"method": "forward_kl"}}),
        "hidden states": (r"hidden_state needs all", {"loss": {"method": "hidden_state"}}),
        "no need of a teacher": (r"does not use the teacher", {"loss": {"method": "cross_entropy"}}),
        "a check": (r"teacher.check has no effect with teacher.cache", {"teacher": str(root / "teacher"), "teacher_check": UNTRAINED}),
        "routing": (
            r"teacher.routing has no effect with teacher.cache: it was applied when the cache was written",
            {"teacher_routing": {"active": 4}},
        ),
    }
    for name, (message, settings) in cases.items():
        refused(run(root, f"refused {name}", **settings), message)


def test_a_cache_with_too_few_samples_or_of_another_format_or_damaged_is_refused(root: Path):
    write_all([cache(root, "short", samples=7)])
    refused(run(root, "short", teacher_cache=str(root / "caches/short")), r"samples 7\n.*12 or more")
    other = Path(shutil.copytree(root / "caches/float32", root / "caches/other format"))
    manifest = json.loads((other / "moe2dense.json").read_text())
    manifest["cache"]["format"] = 0
    (other / "moe2dense.json").write_text(json.dumps(manifest))
    refused(run(root, "format", teacher_cache=str(other)), "format 0")
    cut = Path(shutil.copytree(root / "caches/float32", root / "caches/cut"))
    (cut / "shard_00001.safetensors").write_bytes((cut / "shard_00001.safetensors").read_bytes()[:-9])
    refused(run(root, "cut", teacher_cache=str(cut)), "shard_00001.safetensors")
    (cut / "shard_00001.safetensors").unlink()
    refused(run(root, "gone", teacher_cache=str(cut)), "shard_00001.safetensors")


def test_the_writer_refuses_what_it_can_not_do(root: Path):
    def no(message: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=message):
            write_all([cache(root, "never", **settings)])

    no("at most the vocabulary of 256", k=257)
    no(r"13 samples, its share", samples=13)
    blend = [{"path": str(root / name), "weight": 1.0} for name in ("tokens", "more")]
    no("a blend has no end of its own", data={"blend": blend, "sequence_length": LENGTH})
    no("distributed_optimizer has no effect", parallel={"distributed_optimizer": False})
    no("a uniform guess has", teacher_check={"stock_forward": "never"})
    no("is a finished output", output=str(root / "caches/float32"))


def test_a_cache_begun_with_other_text_is_not_continued(root: Path, tmp_path: Path):
    text = write_tokens(tmp_path / "text", LENGTH * 2 + 1, seed=1)
    settings = cache(root, "begun", output=str(tmp_path / "begun"), data={"path": text, "sequence_length": LENGTH})
    write_all([settings])
    (tmp_path / "begun").rename(tmp_path / "begun.tmp")
    write_tokens(text, LENGTH * 2 + 1, seed=2)
    with pytest.raises(UserError, match="was begun with other text or another teacher: data"):
        write_all([settings])


def test_a_sequence_that_does_not_divide_over_its_ranks_is_refused():
    with pytest.raises(UserError, match="a multiple of 4"):
        require_sequence(ParallelConfig(context=2), 30)
    require_sequence(ParallelConfig(context=2), 32)
