"""`moe2dense data`: text files and a tokenizer to Megatron token files `<output>.bin/.idx` with the manifest `<output>.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import disk_errors, manifest, write_json
from megatron_moe2dense.common.progress import Progress
from megatron_moe2dense.tokens.config import DataConfig
from megatron_moe2dense.tokens.documents import Document, SourceFile, find, read
from megatron_moe2dense.tokens.indexed import TokenFileWriter
from megatron_moe2dense.tokens.tokenizers import TextTokenizer, cached_tokenizer, ends_of_model, open_tokenizer

_BATCH = 64  # documents a worker takes at once
_SAMPLE = 100  # documents a dry run tokenises to estimate the output


def run(config: DataConfig) -> None:
    """Tokenise `config.source`; prints the counts.

    Raises:
        UserError: output in the way, unreadable source, no tokenizer, no end token, or not one document.
    """
    outputs = _outputs(config)
    _refuse_existing(config, outputs)
    files, (tokenizer, eod) = find(config.source, config.text_key), _tokenizer(config)
    with contextlib.ExitStack() as cleanup:
        writers = {}
        for prefix in outputs:
            writers[prefix] = TokenFileWriter(prefix, tokenizer.vocab_size)
            cleanup.callback(writers[prefix].discard)
        counts = _fill(config, files, list(writers.values()), tokenizer, eod)
        _check_documents(config, writers, counts)
        with disk_errors(Path(config.output)):
            Path(config.output + ".json").unlink(missing_ok=True)  # a manifest never stands beside files it does not describe
        for writer in writers.values():
            writer.publish()
    facts = {
        "source": {str(file.path): file.nbytes for file in files},
        "tokenizer": {"file": str(tokenizer.file), "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "eod": eod,
        "empty_documents": sum(count.skipped for count in counts.values()),
        "sources": {name: dataclasses.asdict(count) for name, count in counts.items()},
        "outputs": {prefix: {"documents": writer.documents, "tokens": writer.tokens} for prefix, writer in writers.items()},
    }
    write_json(Path(config.output + ".json"), manifest("finished", "data", config.model_dump(mode="json"), **facts))
    for name, count in counts.items():
        print(f"{name}: {count}")
    for prefix, writer in writers.items():
        print(f"{prefix}: {writer.documents} documents, {writer.tokens} tokens ({writer.dtype})")
    print("documents end without a token of their own" if eod is None else f"documents end with token {eod} ({tokenizer.decode([eod])!r})")


@dataclass
class Count:
    """What a source gave. skipped: documents without a token. mended: with characters that no UTF-8 has, replaced by U+FFFD."""

    files: int = 0
    documents: int = 0
    tokens: int = 0
    skipped: int = 0
    mended: int = 0

    def __str__(self) -> str:
        more = f", {self.mended} with characters that are none (U+FFFD in their place)" if self.mended else ""
        return f"{self.files} files, {self.documents} documents, {self.tokens} tokens, {self.skipped} empty ones skipped{more}"


def dry_run(config: DataConfig) -> dict[str, Any]:
    """What would be read and written; tokens and bytes are estimated from the first documents."""
    outputs = _outputs(config)
    _refuse_existing(config, outputs)
    files, (tokenizer, eod) = find(config.source, config.text_key), _tokenizer(config)
    estimate = _estimate(config, files, tokenizer)
    return {
        "reads": {"files": len(files), "bytes": sum(file.nbytes for file in files)},
        "tokenizer": {"file": str(tokenizer.file), "vocab_size": tokenizer.vocab_size, "eod": eod},
        "writes": [prefix + suffix for prefix in outputs for suffix in (".bin", ".idx")] + [config.output + ".json"],
        "estimated_tokens": estimate,
        "estimated_bytes": estimate * (2 if tokenizer.vocab_size < 65_500 else 4),
    }


def estimated_tokens(config: DataConfig) -> int:
    """Of the whole source, from its first documents; errors as `run`, whatever stands in the place of the output."""
    return _estimate(config, find(config.source, config.text_key), open_tokenizer(config.tokenizer))


def _estimate(config: DataConfig, files: list[SourceFile], tokenizer: TextTokenizer) -> int:
    sample = list(itertools.islice(read(files), _SAMPLE))
    total, seen = sum(file.nbytes for file in files), sum(document.bytes for document in sample)
    tokens = sum(len(tokenizer.encode(document.text)) + config.append_eod for document in sample)
    return round(tokens * total / seen) if seen else 0


def _outputs(config: DataConfig) -> list[str]:
    return [config.output] + [config.output + "_validation"] * (config.validation_fraction > 0)


def _refuse_existing(config: DataConfig, outputs: list[str]) -> None:
    paths = [Path(prefix + suffix) for prefix in outputs for suffix in (".bin", ".idx", ".json")]
    there = [str(path) for path in paths if path.exists()]
    if there and not config.overwrite:
        raise UserError(f"existing {', '.join(there)}", "an unused output prefix", "choose another output or add overwrite=true")


def _tokenizer(config: DataConfig) -> tuple[TextTokenizer, int | None]:
    tokenizer = open_tokenizer(config.tokenizer)
    eod = tokenizer.end_of_document(config.eod_token) if config.append_eod else None
    of_model = ends_of_model(tokenizer.file.parent)
    if eod is not None and of_model and eod not in of_model:
        logger.warning(
            "documents end with token %d (%r), the model's config.json says eos_token_id=%s: where distill masks ends of documents, set"
            " data.end_of_document=%d",
            eod,
            tokenizer.decode([eod]),
            of_model[0] if len(of_model) == 1 else of_model,
            eod,
        )
    return tokenizer, eod


def _fill(
    config: DataConfig, files: list[SourceFile], writers: list[TokenFileWriter], tokenizer: TextTokenizer, eod: int | None
) -> dict[str, Count]:
    """Tokenise all documents into the writers (training, validation); returns what each source gave."""
    counts = {name: Count() for name in _names(config)}
    for file in files:
        counts[file.source].files += 1
    end = np.asarray([] if eod is None else [eod], np.int64)
    total = sum(file.nbytes for file in files)
    with Progress("tokenise", "MB", total / 1e6) as shown:
        for document, ids in _encoded(config, tokenizer, read(files)):
            shown.update(document.bytes / 1e6, len(ids))
            count = counts[document.source]
            count.mended += document.mended
            if not len(ids):
                count.skipped += 1
                continue
            validation = config.validation_fraction > 0 and _place(document, config.seed) < config.validation_fraction
            writers[validation].add(np.concatenate([ids, end]))
            count.documents += 1
            count.tokens += len(ids) + len(end)
    return counts


def _place(document: Document, seed: int) -> float:
    """From 0 to 1, by the text and the seed: the same document twice never stands on both sides of a split."""
    digest = hashlib.sha256(f"{seed} {document.text}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def _names(config: DataConfig) -> list[str]:
    return [config.source] if isinstance(config.source, str) else config.source


def _encoded(config: DataConfig, tokenizer: TextTokenizer, documents: Iterable[Document]) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its token ids, in order, whatever the number of workers."""
    if config.workers == 1:
        for document in documents:
            yield document, tokenizer.encode(document.text)
        return
    waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
    batches, stream = True, iter(documents)
    # A bounded queue: Pool.imap would read the whole source into memory ahead of the workers.
    with _pool(config.workers) as pool:
        while batches or waiting:
            while batches and len(waiting) < 4 * config.workers:
                batch = list(itertools.islice(stream, _BATCH))
                batches = bool(batch)
                if batch:
                    waiting.append((batch, pool.submit(_encode_batch, config.tokenizer, [item.text for item in batch])))
            if waiting:
                batch, future = waiting.popleft()
                yield from zip(batch, future.result(), strict=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    try:
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    except OSError as error:
        raise UserError(
            f"no room for what {workers} processes share: {error.strerror or error}",
            "a shared memory (/dev/shm) that can be written, with some KB free",
            "make room there (in a container: --shm-size), or set workers=1",
        ) from error


def _encode_batch(tokenizer: str, texts: list[str]) -> list[np.ndarray]:
    encode = cached_tokenizer(tokenizer).encode
    return [encode(text) for text in texts]


def _check_documents(config: DataConfig, writers: dict[str, TokenFileWriter], counts: dict[str, Count]) -> None:
    for name, count in counts.items():
        if not count.documents:
            raise UserError(
                f"{name}: no document in {count.files} files ({count.skipped} empty ones)",
                "at least one document that is not empty from every source",
                "check the source and text_key, or leave the source out",
            )
    for prefix, writer in writers.items():
        if not writer.documents:
            raise UserError(
                f"no document for {prefix} in {config.source}",
                "at least one document that is not empty",
                "check the source and text_key, or change validation_fraction",
            )
