"""`moe2dense data`: text files and a tokenizer to Megatron token files `<output>.bin/.idx` with the manifest `<output>.json`."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import disk_errors, manifest, write_json
from megatron_moe2dense.common.progress import Progress
from megatron_moe2dense.tokens.config import DataConfig
from megatron_moe2dense.tokens.documents import Document, find, read
from megatron_moe2dense.tokens.indexed import TokenFileWriter
from megatron_moe2dense.tokens.tokenizers import TextTokenizer, cached_tokenizer, open_tokenizer

_BATCH = 64  # documents a worker takes at once
_SAMPLE = 100  # documents a dry run tokenises to estimate the output


def run(config: DataConfig) -> None:
    """Tokenise `config.source`; prints the counts.

    Raises:
        UserError: output in the way, unreadable source, no tokenizer, no end token, or not one document.
    """
    outputs = _outputs(config)
    _refuse_existing(config, outputs)
    files, (tokenizer, eod) = find(config.source), _tokenizer(config)
    with contextlib.ExitStack() as cleanup:
        writers = {}
        for prefix in outputs:
            writers[prefix] = TokenFileWriter(prefix, tokenizer.vocab_size)
            cleanup.callback(writers[prefix].discard)
        empty = _fill(config, files, list(writers.values()), tokenizer, eod)
        _check_documents(config, writers)
        with disk_errors(Path(config.output)):
            Path(config.output + ".json").unlink(missing_ok=True)  # a manifest never stands beside files it does not describe
        for writer in writers.values():
            writer.publish()
    facts = {
        "source": {str(path): path.stat().st_size for path in files},
        "tokenizer": {"file": str(tokenizer.file), "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "eod": eod,
        "empty_documents": empty,
        "outputs": {prefix: {"documents": writer.documents, "tokens": writer.tokens} for prefix, writer in writers.items()},
    }
    write_json(Path(config.output + ".json"), manifest("finished", "data", config.model_dump(mode="json"), **facts))
    if empty:
        logger.info("%d empty documents are left out", empty)
    for prefix, writer in writers.items():
        print(f"{prefix}: {writer.documents} documents, {writer.tokens} tokens ({writer.dtype})")


def dry_run(config: DataConfig) -> dict[str, Any]:
    """What would be read and written; tokens and bytes are estimated from the first documents."""
    outputs = _outputs(config)
    _refuse_existing(config, outputs)
    files, (tokenizer, eod) = find(config.source), _tokenizer(config)
    sample = list(itertools.islice(read(files, config.text_key), _SAMPLE))
    total, seen = sum(path.stat().st_size for path in files), sum(document.bytes for document in sample)
    tokens = sum(len(tokenizer.encode(document.text)) + config.append_eod for document in sample)
    estimate = round(tokens * total / seen) if seen else 0
    return {
        "reads": {"files": len(files), "bytes": total},
        "tokenizer": {"file": str(tokenizer.file), "vocab_size": tokenizer.vocab_size, "eod": eod},
        "writes": [prefix + suffix for prefix in outputs for suffix in (".bin", ".idx")] + [config.output + ".json"],
        "estimated_tokens": estimate,
        "estimated_bytes": estimate * (2 if tokenizer.vocab_size < 65_500 else 4),
    }


def _outputs(config: DataConfig) -> list[str]:
    return [config.output] + [config.output + "_validation"] * (config.validation_fraction > 0)


def _refuse_existing(config: DataConfig, outputs: list[str]) -> None:
    paths = [Path(prefix + suffix) for prefix in outputs for suffix in (".bin", ".idx", ".json")]
    there = [str(path) for path in paths if path.exists()]
    if there and not config.overwrite:
        raise UserError(f"existing {', '.join(there)}", "an unused output prefix", "choose another output or add overwrite=true")


def _tokenizer(config: DataConfig) -> tuple[TextTokenizer, int | None]:
    tokenizer = open_tokenizer(config.tokenizer)
    return tokenizer, tokenizer.end_of_document(config.eod_token) if config.append_eod else None


def _fill(config: DataConfig, files: list[Path], writers: list[TokenFileWriter], tokenizer: TextTokenizer, eod: int | None) -> int:
    """Tokenise all documents into the writers (training, validation); returns how many were empty and left out."""
    empty = 0
    end = np.asarray([] if eod is None else [eod], np.int64)
    total = sum(path.stat().st_size for path in files)
    with Progress("tokenise", "MB", total / 1e6) as shown:
        for document, ids in _encoded(config, tokenizer, read(files, config.text_key)):
            shown.update(document.bytes / 1e6, len(ids))
            if not len(ids):
                empty += 1
                continue
            validation = config.validation_fraction > 0 and _place(document, config.seed) < config.validation_fraction
            writers[validation].add(np.concatenate([ids, end]))
    return empty


def _place(document: Document, seed: int) -> float:
    """From 0 to 1, by the text and the seed: the same document twice never stands on both sides of a split."""
    digest = hashlib.sha256(f"{seed} {document.text}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def _encoded(config: DataConfig, tokenizer: TextTokenizer, documents: Iterable[Document]) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document and its token ids, in order, whatever the number of workers."""
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


def _check_documents(config: DataConfig, writers: dict[str, TokenFileWriter]) -> None:
    for prefix, writer in writers.items():
        if not writer.documents:
            raise UserError(
                f"no document for {prefix} in {config.source}",
                "at least one document that is not empty",
                "check the source and text_key" + (", or change validation_fraction" if len(writers) > 1 else ""),
            )
