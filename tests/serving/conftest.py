"""A tiny dense model with the tokenizer of the example, and what llama.cpp's own server says of a file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.forks import forks
from tests.helpers.tiny_models import tiny

PICO = Path("examples/pico_moe/model")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
INTERPRETER = sys.executable
# llama-server as xllamacpp runs it: what `serve-check` gives the program, and its answers.
_PROGRAM = f"""#!{INTERPRETER}
import sys, time, xllamacpp
named = dict(zip(sys.argv[1:], sys.argv[2:]))
assert named["--cache-type-k"] == "f32" and named["--flash-attn"] == "off"
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx = named["--model"], int(named["--port"]), int(named["--ctx-size"])
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if "--spec-draft-model" in named:
    assert named["--spec-type"] == "draft-simple"
    params.speculative.draft.mparams.path, params.speculative.draft.n_max = named["--spec-draft-model"], int(named["--spec-draft-n-max"])
    params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
server = xllamacpp.Server(params)
time.sleep(600)
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def llama_server(folder: Path) -> Path:
    return program(folder / "llama-server", _PROGRAM)


def with_tokenizer(folder: Path) -> Path:
    for name in TOKENIZER:
        shutil.copy(PICO / name, folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _quick_interpreter(programs: Path) -> Iterator[None]:
    """Scripts of `runners` run in processes that have imported what they need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(programs / "python"))
        yield


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    forks().commands(folder)
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 2 layers in bfloat16."""
    folder = tmp_path_factory.mktemp("serving") / "dense"
    return with_tokenizer(
        tiny("qwen3", folder, "bfloat16", vocab_size=2048, num_hidden_layers=2, head_dim=32, hidden_size=128, intermediate_size=256)
    )
