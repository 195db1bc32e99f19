"""`moe2dense data` end to end, against transformers' own tokenizers and sentencepiece itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.tokens import prepare
from megatron_moe2dense.tokens.config import DataConfig
from megatron_moe2dense.tokens.indexed import TokenFile
from tests.helpers.semaphores import no_semaphores

TEXTS = ["To be, or not to be", "def f(x):\n    return x\n", "héllo — 世界", "a" * 300, "In the beginning"]
EOD = 0


def config(tmp_path: Path, source: object, tokenizer: object, **options) -> DataConfig:
    sources = [str(item) for item in source] if isinstance(source, list) else str(source)
    return DataConfig(**{"source": sources, "tokenizer": str(tokenizer), "output": str(tmp_path / "out"), **options})


def documents(prefix: Path) -> list[list[int]]:
    opened = TokenFile.open(str(prefix))
    return [list(map(int, part)) for part in np.split(opened.tokens, opened.document_ends[:-1])]


def expected(tokenizer_directory: Path, texts: list[str]) -> list[list[int]]:
    stock = AutoTokenizer.from_pretrained(tokenizer_directory)
    return [[*stock(text, add_special_tokens=False).input_ids, stock.eos_token_id] for text in texts]


def write_txt(folder: Path) -> list[Path]:
    files = [folder / f"{number}.txt" for number in range(len(TEXTS))]
    for file, text in zip(files, TEXTS, strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def write_jsonl(folder: Path, key: str = "text") -> list[Path]:
    lines = [json.dumps({key: text, "id": number}) for number, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    return [folder / "a.jsonl"]


def write_parquet(folder: Path, key: str = "text", kind: pyarrow.DataType | None = None) -> list[Path]:
    table = pyarrow.table({"id": list(range(len(TEXTS))), key: pyarrow.array(TEXTS, kind or pyarrow.string())})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    return [folder / "a.parquet"]


@pytest.mark.parametrize("writer", [write_txt, write_jsonl, write_parquet])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_format_gives_the_tokens_of_stock_transformers(tmp_path, tokenizer_directory, writer, workers, capsys):
    source = writer(tmp_path)
    prepare.run(config(tmp_path, source, tokenizer_directory, workers=workers))
    assert documents(tmp_path / "out") == expected(tokenizer_directory, TEXTS)
    tokens = sum(map(len, documents(tmp_path / "out")))
    assert f"5 documents, {tokens} tokens" in capsys.readouterr().out


def test_many_documents_keep_their_order_with_many_workers(tmp_path, tokenizer_directory):
    texts = [f"document {number} " * (number % 7 + 1) for number in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare.run(config(tmp_path, tmp_path / "a.jsonl", tokenizer_directory, workers=3))
    assert documents(tmp_path / "out") == expected(tokenizer_directory, texts)


def test_a_large_string_column_and_another_key_are_read(tmp_path, tokenizer_directory):
    source = write_parquet(tmp_path, "content", pyarrow.large_string())
    prepare.run(config(tmp_path, source, tokenizer_directory, text_key="content"))
    assert documents(tmp_path / "out") == expected(tokenizer_directory, TEXTS)


def test_a_folder_is_read_recursively_in_sorted_order_without_other_files(tmp_path, tokenizer_directory, caplog):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "c.txt").write_text("third")
    (folder / "b/x.jsonl").write_text('{"text": "second"}\n')
    (folder / "a.txt").write_text("first")
    (folder / "README.md").write_text("no text")
    with caplog.at_level("INFO", "megatron_moe2dense"):
        prepare.run(config(tmp_path, folder, tokenizer_directory))
    assert documents(tmp_path / "out") == expected(tokenizer_directory, ["first", "second", "third"])
    assert "1 files are no" in caplog.text


def test_a_bare_tokenizer_json_equals_its_directory(tmp_path, tokenizer_directory):
    shutil.copy(tokenizer_directory / "tokenizer.json", tmp_path / "tokenizer.json")
    source = write_jsonl(tmp_path)
    prepare.run(config(tmp_path, source, tmp_path / "tokenizer.json", eod_token="<|endoftext|>"))
    assert documents(tmp_path / "out") == expected(tokenizer_directory, TEXTS)


def test_a_sentencepiece_model_gives_sentencepieces_own_ids(tmp_path):
    model = sentencepiece_model(tmp_path)
    prepare.run(config(tmp_path, write_jsonl(tmp_path), model))
    own = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert documents(tmp_path / "out") == [[*own.encode(text), own.eos_id()] for text in TEXTS]


def sentencepiece_model(tmp_path: Path, **options) -> Path:
    (tmp_path / "corpus").write_text("\n".join(f"{text} {number}" for number in range(50) for text in TEXTS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus"), model_prefix=str(tmp_path / "sp"), vocab_size=100, hard_vocab_limit=False, minloglevel=2, **options
    )
    return tmp_path / "sp.model"


def test_append_eod_false_adds_nothing(tmp_path, tokenizer_directory):
    prepare.run(config(tmp_path, write_jsonl(tmp_path), tokenizer_directory, append_eod=False))
    assert documents(tmp_path / "out") == [ids[:-1] for ids in expected(tokenizer_directory, TEXTS)]


def test_workers_without_semaphores_are_refused_and_one_process_needs_none(tmp_path, tokenizer_directory, monkeypatch):
    no_semaphores(monkeypatch)
    source = write_txt(tmp_path)
    with pytest.raises(UserError, match="2 processes share: No space left") as refused:
        prepare.run(config(tmp_path, source, tokenizer_directory, workers=2))
    assert "--shm-size" in refused.value.do
    prepare.run(config(tmp_path, source, tokenizer_directory, workers=1))
    assert documents(tmp_path / "out") == expected(tokenizer_directory, TEXTS)


def test_empty_documents_are_left_out_and_said(tmp_path, tokenizer_directory, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    prepare.run(config(tmp_path, tmp_path / "a.jsonl", tokenizer_directory))
    assert documents(tmp_path / "out") == expected(tokenizer_directory, ["a", "b"])
    assert "1 empty ones skipped" in capsys.readouterr().out


def test_validation_is_a_seeded_share_of_whole_documents(tmp_path, tokenizer_directory):
    texts = [f"document number {number}" for number in range(500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    drawn = {}
    for name, seed, workers in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        output = str(tmp_path / name)
        options = {"output": output, "validation_fraction": 0.2, "seed": seed, "workers": workers}
        prepare.run(config(tmp_path, tmp_path / "a.jsonl", tokenizer_directory, **options))
        train, validation = documents(tmp_path / name), documents(tmp_path / f"{name}_validation")
        assert sorted(train + validation) == sorted(expected(tokenizer_directory, texts))
        assert 70 <= len(validation) <= 130
        drawn[name] = validation
    assert drawn["a"] == drawn["b"] != drawn["c"]


def test_the_manifest_says_what_was_read_and_with_what(tmp_path, tokenizer_directory):
    source = write_jsonl(tmp_path)
    settings = config(tmp_path, source, tokenizer_directory)
    prepare.run(settings)
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["config"] == settings.model_dump(mode="json")
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256((tokenizer_directory / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["tokenizer"]["vocab_size"] == 2048
    assert manifest["eod"] == EOD
    tokens = sum(map(len, documents(tmp_path / "out")))
    assert manifest["outputs"] == {str(tmp_path / "out"): {"documents": len(TEXTS), "tokens": tokens}}
    assert manifest["source"] == {str(source[0]): source[0].stat().st_size}


def test_the_same_input_gives_the_same_bytes(tmp_path, tokenizer_directory):
    source = write_jsonl(tmp_path)
    for name in ("a", "b"):
        prepare.run(config(tmp_path, source, tokenizer_directory, output=str(tmp_path / name)))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_an_existing_output_is_refused_unless_overwrite(tmp_path, tokenizer_directory):
    source = write_jsonl(tmp_path)
    prepare.run(config(tmp_path, source, tokenizer_directory))
    before = (tmp_path / "out.bin").read_bytes()
    source[0].write_text('{"text": "other"}\n')
    for command in (prepare.run, prepare.dry_run):
        with pytest.raises(UserError, match="add overwrite=true"):
            command(config(tmp_path, source, tokenizer_directory))
    assert (tmp_path / "out.bin").read_bytes() == before
    prepare.run(config(tmp_path, source, tokenizer_directory, overwrite=True))
    assert documents(tmp_path / "out") == expected(tokenizer_directory, ["other"])


def test_a_failed_run_leaves_the_old_output_and_no_partial_file(tmp_path, tokenizer_directory):
    source = write_jsonl(tmp_path)
    prepare.run(config(tmp_path, source, tokenizer_directory))
    before = {item.name: item.read_bytes() for item in tmp_path.glob("out*")}
    source[0].write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UserError, match="line 2"):
        prepare.run(config(tmp_path, source, tokenizer_directory, overwrite=True))
    assert {item.name: item.read_bytes() for item in tmp_path.glob("out*")} == before


def test_a_dry_run_estimates_and_writes_nothing(tmp_path, tokenizer_directory):
    source = write_jsonl(tmp_path)
    facts = prepare.dry_run(config(tmp_path, source, tokenizer_directory, validation_fraction=0.5))
    tokens = sum(map(len, expected(tokenizer_directory, TEXTS)))
    assert abs(facts["estimated_tokens"] - tokens) <= 2
    assert facts["estimated_bytes"] == 2 * facts["estimated_tokens"]
    assert facts["writes"] == [str(tmp_path / name) for name in WRITTEN]
    assert not list(tmp_path.glob("out*"))


WRITTEN = ["out.bin", "out.idx", "out_validation.bin", "out_validation.idx", "out.json"]


# What a user can get wrong


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2"),
        ("a.jsonl", b'{"text": "x"}\n\n{"txt": "x"}\n', r"(?s)line 3: no 'text' among txt.*did you mean 'txt'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: text is a int"),
        ("a.jsonl", b"[1]\n", "line 1: a list"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1"),
        ("a.txt", b"\xff\xfe", r"(?s)a\.txt.*UTF-8"),
        ("a.parquet", b"PAR1", r"(?s)a\.parquet.*readable"),
        ("a.txt", b"", "at least one document that is not empty"),
        ("a.jsonl", b"\n", "at least one document that is not empty"),
        ("a.csv", b"x", r"a \.csv file"),
        ("noending", b"x", "suffix-less"),
    ],
)
def test_a_broken_source_is_a_user_error(tmp_path, tokenizer_directory, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        prepare.run(config(tmp_path, tmp_path / name, tokenizer_directory))
    assert not list(tmp_path.glob("out*"))


def test_an_absent_source_an_empty_list_and_an_empty_folder_are_user_errors(tmp_path, tokenizer_directory):
    (tmp_path / "empty").mkdir()
    for source, words in ((tmp_path / "absent", "no file or folder"), ([], "empty list"), (tmp_path / "empty", "no file with text")):
        with pytest.raises(UserError, match=words):
            prepare.run(config(tmp_path, source, tokenizer_directory))


def test_a_parquet_column_that_is_absent_or_no_text_is_a_user_error(tmp_path, tokenizer_directory):
    source = write_parquet(tmp_path)
    for key, words in (("txt", "did you mean 'text'"), ("id", "column id holds int64")):
        with pytest.raises(UserError, match=words):
            prepare.run(config(tmp_path, source, tokenizer_directory, text_key=key))


def test_a_null_row_in_parquet_is_a_user_error_with_its_number(tmp_path, tokenizer_directory):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 2: text is null"):
        prepare.run(config(tmp_path, tmp_path / "a.parquet", tokenizer_directory))


def test_no_tokenizer_is_a_user_error(tmp_path):
    source = write_jsonl(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.json").write_text('{"version": "1.0"')
    (tmp_path / "damaged.model").write_bytes(b"nothing")
    (tmp_path / "vocab.bin").write_bytes(b"")
    for name, words in (
        ("absent", "no tokenizer at"),
        ("empty", "neither tokenizer.json nor tokenizer.model"),
        ("damaged.json", "downloaded completely"),
        ("damaged.model", "downloaded completely"),
        ("vocab.bin", r"a \.bin file"),
    ):
        with pytest.raises(UserError, match=words):
            prepare.run(config(tmp_path, source, tmp_path / name))


def test_a_tokenizer_without_an_end_token_is_a_user_error_while_append_eod(tmp_path, tokenizer_directory):
    source = write_jsonl(tmp_path)
    shutil.copy(tokenizer_directory / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"(?s)names no end-of-sequence token.*<\|endoftext\|>"):
        prepare.run(config(tmp_path, source, tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="names no end-of-sequence token"):
        prepare.run(config(tmp_path, source, sentencepiece_model(tmp_path, eos_id=-1)))
    prepare.run(config(tmp_path, source, tmp_path / "tokenizer.json", append_eod=False))


def test_an_unknown_eod_token_is_a_user_error_with_a_suggestion(tmp_path, tokenizer_directory):
    with pytest.raises(UserError, match=r"did you mean '<\|endoftext\|>'"):
        prepare.run(config(tmp_path, write_jsonl(tmp_path), tokenizer_directory, eod_token="<|endoftxt|>"))


@pytest.mark.parametrize("options", [{"eod_token": "x", "append_eod": False}, {"seed": 3}])
def test_a_setting_without_effect_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="has no effect"):
        config(tmp_path, "a.txt", "model", **options)


def test_no_validation_document_at_all_is_a_user_error(tmp_path, tokenizer_directory):
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(UserError, match="change validation_fraction"):
        prepare.run(config(tmp_path, tmp_path / "a.txt", tokenizer_directory, validation_fraction=0.01))
