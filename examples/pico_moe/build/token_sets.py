"""Choose and mix documents for the pico MoE's token sets; `moe2dense data` then tokenises each file.

    python token_sets.py CORPORA TOKENIZER OUTPUT

writes OUTPUT/train.jsonl (all training text, shuffled), distill.jsonl (training documents, equal tokens of every kind),
heldout.jsonl (held-out documents, equal tokens of every kind) and heldout_<kind>.jsonl (all held-out text of a kind).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

DISTILL_TOKENS = 1_900_000
HELDOUT_TOKENS = 130_000

Documents = list[tuple[str, int]]  # a .jsonl line and its tokens, the end token included


def documents(file: Path, tokenizer: Tokenizer) -> Documents:
    """The lines of a corpus file with their token counts, in a fixed random order."""
    lines = file.read_text(encoding="utf-8").splitlines()
    random.Random(file.stem).shuffle(lines)
    return [(line, len(tokenizer.encode(json.loads(line)["text"]).ids) + 1) for line in lines]


def even(kinds: Iterable[Documents], total: int) -> list[str]:
    """Whole documents, about `total` tokens, the same share of every kind."""
    kinds, chosen = list(kinds), []
    share = total // len(kinds)
    for kind in kinds:
        left = share
        for line, tokens in kind:
            if tokens <= left:
                chosen.append(line)
                left -= tokens
    return chosen


def write(path: Path, lines: list[str]) -> None:
    """Write the lines in a fixed random order, so that neighbours in the token stream are of different kinds."""
    shuffled = list(lines)
    random.Random(0).shuffle(shuffled)
    path.write_text("\n".join(shuffled) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("corpora", "tokenizer", "output"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    train, heldout = (
        {file.stem: documents(file, tokenizer) for file in sorted((options.corpora / part).glob("*.jsonl"))}
        for part in ("train", "heldout")
    )
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "train.jsonl", [line for kind in train.values() for line, _ in kind])
    write(options.output / "distill.jsonl", even(train.values(), DISTILL_TOKENS))
    write(options.output / "heldout.jsonl", even(heldout.values(), HELDOUT_TOKENS))
    for kind, chosen in heldout.items():
        write(options.output / f"heldout_{kind}.jsonl", [line for line, _ in chosen])
    counts = {
        part: {kind: sum(tokens for _, tokens in chosen) for kind, chosen in kinds.items()}
        for part, kinds in (("train", train), ("heldout", heldout))
    }
    (options.output / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
