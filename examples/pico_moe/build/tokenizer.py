"""Train the pico MoE's tokenizer: byte-level BPE of 2,048 tokens on an even sample of all kinds of text.

    python tokenizer.py CORPORA OUTPUT

reads CORPORA/train/*.jsonl, writes tokenizer.json and tokenizer_config.json for `AutoTokenizer.from_pretrained(OUTPUT)`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
VOCABULARY = 2048
SAMPLE = 2_000_000  # characters of each kind


def sample(file: Path, characters: int) -> list[str]:
    """Documents of a .jsonl file in a fixed random order, up to `characters`."""
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(texts)
    taken: list[str] = []
    for text in texts:
        if characters <= 0:
            break
        taken.append(text)
        characters -= len(text)
    return taken


def train(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer whose token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args(arguments)
    texts = [text for file in sorted((options.corpora / "train").glob("*.jsonl")) for text in sample(file, SAMPLE)]
    tokenizer = train(texts)
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.output / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (options.output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{tokenizer.get_vocab_size()} tokens, trained on {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
