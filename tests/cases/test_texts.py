"""Text as people have it, for `moe2dense data`."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.tokens.indexed import TokenFile
from megatron_moe2dense.tokens.tokenizers import open_tokenizer
from tests.helpers.tiny_models import tiny_qwen3, write_tokens

Refused = Callable[..., str]
TEXTS = ["To be, or not to be", "In the beginning"]


@pytest.fixture
def texts(tokenizer_directory: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Runs `data` on sources with more settings; the texts that it wrote."""

    def run(*sources: Path, **settings: Any) -> list[str]:
        more = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
        named = json.dumps([str(source) for source in sources])
        main(["data", f"source={named}", f"tokenizer={tokenizer_directory}", f"output={tmp_path}/out", "overwrite=true", *more])
        file, decode = TokenFile.open(f"{tmp_path}/out"), open_tokenizer(str(tokenizer_directory)).decode
        documents = np.split(file.tokens, file.document_ends[:-1])
        return [decode(document[:-1].tolist()) for document in documents]

    return run


def rows(key: str = "text") -> bytes:
    return b"".join(json.dumps({key: text}).encode() + b"\n" for text in TEXTS)


def test_half_of_a_surrogate_pair_in_jsonl(texts: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """a lone surrogate in jsonl: it becomes U+FFFD, a whole pair its character, and the document is counted"""
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud83d y"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl") == ["x\ufffd y", "\U0001f600"]
    assert "2 documents" in (said := capsys.readouterr().out)
    assert "1 with characters that are none" in said


@pytest.mark.parametrize("workers", [1, 2])
def test_compressed_and_json_files(workers: int, texts: Callable[..., list[str]], tmp_path: Path):
    """.jsonl.gz, .jsonl.zst (in several frames) and .json (a list, one object, rows): read"""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows()))
    frames = [pyarrow.compress(part, codec="zstd", asbytes=True) for part in rows().splitlines(keepends=True)]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (tmp_path / "d.json").write_text(json.dumps({"text": TEXTS[0]}, indent=1))
    (tmp_path / "e.json").write_bytes(rows())
    files = [tmp_path / name for name in ("a.jsonl.gz", "b.jsonl.zst", "c.json", "d.json", "e.json")]
    assert texts(*files, workers=workers) == [*TEXTS, *TEXTS, *TEXTS, TEXTS[0], *TEXTS]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json"])
def test_a_file_that_was_cut_short(name: str, tokenizer_directory: Path, tmp_path: Path, user_error: Refused):
    """a compressed or JSON file that was not downloaded completely: refused by name"""
    whole = {"gz": gzip.compress(rows()), "zst": pyarrow.compress(rows(), codec="zstd", asbytes=True), "json": b'[{"text": "a"}, {'}
    (tmp_path / name).write_bytes(whole[name.rpartition(".")[2]][: None if name == "a.json" else -9])
    assert name in user_error("data", f"source={tmp_path / name}", f"tokenizer={tokenizer_directory}", f"output={tmp_path}/out")
    assert not list(tmp_path.glob("out*"))


def test_linked_folders_and_loops(texts: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """linked sub-folders: followed; a loop, a folder that is linked twice and a link to nothing are left out and named"""
    for folder, text in (("texts", TEXTS[0]), ("elsewhere", TEXTS[1])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    (tmp_path / "texts/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts/d").symlink_to(tmp_path / "texts")
    (tmp_path / "texts/e.txt").symlink_to(tmp_path / "nothing.txt")
    assert texts(tmp_path / "texts") == TEXTS
    said = capsys.readouterr().err
    assert f"{tmp_path}/texts/c: the same folder, already read as {tmp_path}/texts/b" in said
    assert f"{tmp_path}/texts/d: a loop of links, already read as {tmp_path}/texts" in said
    assert f"{tmp_path}/texts/e.txt: a link to nothing" in said


def test_hidden_files(texts: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """hidden files and .ipynb_checkpoints in a folder: left out, and said"""
    folder = tmp_path / "texts"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.txt", ".b.txt", ".ipynb_checkpoints/a-checkpoint.txt"):
        (folder / name).write_text(TEXTS[0])
    assert texts(folder) == TEXTS[:1]
    assert "2 hidden files and folders such as .b.txt are left out" in capsys.readouterr().err


def test_json_that_is_no_text(
    texts: Callable[..., list[str]], tokenizer_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], user_error: Refused
):
    """a .json with settings beside the texts of a folder: left out and said; named itself, it is refused"""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXTS[0])
    (folder / "info.json").write_text('{"license": "free"}')
    assert texts(folder) == TEXTS[:1]
    assert "info.json: no 'text' in it" in capsys.readouterr().err
    named = ("data", f"source={folder}/info.json", f"tokenizer={tokenizer_directory}", f"output={tmp_path}/other")
    assert "no 'text' among license" in user_error(*named)


@pytest.mark.parametrize("kind", [pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.string_view()], ids=str)
def test_other_kinds_of_strings_in_parquet(kind: Any, texts: Callable[..., list[str]], tmp_path: Path):
    """parquet columns of dictionary or string_view type: read like strings"""
    column = pyarrow.array(TEXTS, pyarrow.string()).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == TEXTS


def test_sources_with_other_fields(texts: Callable[..., list[str]], tmp_path: Path, tokenizer_directory: Path, user_error: Refused):
    """sources whose text stands in different fields: text_key by source, text in the others; a key for no source is refused"""
    (tmp_path / "a.jsonl").write_bytes(rows("content"))
    (tmp_path / "b.jsonl").write_bytes(rows())
    files = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert texts(*files, text_key={str(files[0]): "content"}) == [*TEXTS, *TEXTS]
    said = user_error("data", f"source={files[0]}", f"tokenizer={tokenizer_directory}", "output=x", 'text_key={"c.jsonl": "content"}')
    assert "text_key of 'c.jsonl'" in said


def test_what_each_source_gave(texts: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """several sources: documents, tokens and skipped rows of each in the last lines and in the manifest"""
    (tmp_path / "a.jsonl").write_bytes(rows() + b'{"text": ""}\n')
    (tmp_path / "b.txt").write_text(TEXTS[0])
    texts(tmp_path / "a.jsonl", tmp_path / "b.txt")
    printed, sources = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())["sources"]
    assert [(one["documents"], one["skipped"]) for one in sources.values()] == [(2, 1), (1, 0)]
    assert sum(one["tokens"] for one in sources.values()) == len(TokenFile.open(f"{tmp_path}/out").tokens)
    tokens = sources[str(tmp_path / "a.jsonl")]["tokens"]
    assert f"{tmp_path}/a.jsonl: 1 files, 2 documents, {tokens} tokens, 1 empty ones skipped" in printed
    assert "documents end with token 0 (" in printed


def test_a_source_that_gives_nothing(tokenizer_directory: Path, tmp_path: Path, user_error: Refused):
    """a named source without a document that is not empty: an error with its name, however much the others have"""
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    named = json.dumps([f"{tmp_path}/a.txt", f"{tmp_path}/b.jsonl"])
    said = user_error("data", f"source={named}", f"tokenizer={tokenizer_directory}", f"output={tmp_path}/out")
    assert f"{tmp_path}/b.jsonl: no document in 1 files (1 empty ones)" in said
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_stops_at_another_token(tokenizer_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """the tokenizer's end token is not config.json's eos_token_id: data warns with both and names the token that ends documents"""
    model = tmp_path / "model"
    shutil.copytree(tokenizer_directory, model)
    (tmp_path / "a.txt").write_text(TEXTS[0])
    for ends, warned in ((0, False), ([5, 0], False), (5, True)):
        (model / "config.json").write_text(json.dumps({"eos_token_id": ends}))
        main(["data", f"source={tmp_path}/a.txt", f"tokenizer={model}", f"output={tmp_path}/out", "overwrite=true"])
        printed = capsys.readouterr()
        assert ("documents end with token 0" in printed.err) == ("set data.end_of_document=0" in printed.err) == warned
        assert "documents end with token 0 (" in printed.out


def test_a_tokenizer_that_needs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str], user_error: Refused):
    """a source with only tiktoken.model and remote code: inspect, prune-dense and data say that its tokenizer does not open"""
    model, text = tiny_qwen3(tmp_path / "model"), write_tokens(tmp_path / "text", 32 * 20)
    (model / "tiktoken.model").write_text("IQ== 0\n")
    (model / "tokenization_kimi.py").write_text("")
    main(["inspect", str(model)])
    assert "no tokenizer that stock transformers can open: tiktoken.model and tokenization_kimi.py" in capsys.readouterr().out
    where = (f"source={model}", f"output={tmp_path}/out", f"data.path={text}")
    main(["prune-dense", *where, "data.sequence_length=32", "target.num_hidden_layers=2"])
    assert "so the result has no tokenizer" in capsys.readouterr().err
    assert "only tiktoken.model" in user_error("data", f"source={tmp_path}", f"tokenizer={model}", "output=x")
