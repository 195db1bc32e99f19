"""Tokenizers from disk: an HF directory, a tokenizer.json or a sentencepiece model, all behind one small class.
Text is encoded as it is: no special token is added around it, as in the pretraining streams of the model families."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError, did_you_mean
from megatron_moe2dense.common.outputs import read_json

_EXPECTED = "an HF directory with tokenizer.json or tokenizer.model, a tokenizer.json, or a sentencepiece .model file"


@dataclass(frozen=True)
class TextTokenizer:
    """An opened tokenizer.

    Attributes:
        file: what was opened. sha256: its content. vocab_size: one more than the largest token id, added tokens included.
        eos: id of its end-of-sequence token, None where it names none.
        encode: a text to its token ids. decode: ids to their text, special tokens included.
        token_id: a token's text to its id or None. known: texts of its special tokens.
    """

    file: Path
    sha256: str
    vocab_size: int
    eos: int | None
    encode: Callable[[str], np.ndarray]
    decode: Callable[[list[int]], str]
    token_id: Callable[[str], int | None]
    known: tuple[str, ...]

    def end_of_document(self, token: str | None) -> int:
        """Id of `token`, or of the tokenizer's own end-of-sequence token; UserError where there is none."""
        if token is not None:
            found = self.token_id(token)
            if found is None:
                hint = did_you_mean(token, self.known) or "set eod_token to one of its special tokens"
                raise UserError(f"eod_token={token!r}", f"a token of {self.file}", hint)
            return found
        if self.eos is None:
            raise UserError(
                f"{self.file} names no end-of-sequence token",
                "a tokenizer with one (`eos_token` in the tokenizer_config.json beside it)",
                f"set eod_token (special tokens: {', '.join(self.known) or 'none'}) or append_eod=false",
            )
        return self.eos


def open_tokenizer(path: str) -> TextTokenizer:
    """Open the tokenizer at `path`, or of a model in the Hugging Face cache; UserError when there is none or it is damaged."""
    place = hub.located(path)
    if place.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (place / name).exists():
                return open_tokenizer(str(place / name))
        raise UserError(
            f"{place}: neither tokenizer.json nor tokenizer.model"
            + (", only tiktoken.model, which needs the model's own code" if (place / "tiktoken.model").exists() else ""),
            _EXPECTED,
            "point to a model directory; a slow tokenizer becomes a tokenizer.json by AutoTokenizer...save_pretrained",
        )
    if not place.is_file():
        raise UserError(f"no tokenizer at {place}", _EXPECTED, "check the path")
    if place.suffix not in (".json", ".model"):
        raise UserError(f"{place}: a {place.suffix or 'suffix-less'} file", _EXPECTED, "check the path")
    try:
        return _open_json(place) if place.suffix == ".json" else _open_sentencepiece(place)
    except UserError:
        raise
    except Exception as error:  # both libraries raise plain Exception and RuntimeError for a damaged file
        raise UserError(f"{place}: {error}", _EXPECTED, "check the file; was it downloaded completely?") from None


# Worker processes open the tokenizer once, not for each batch.
cached_tokenizer = functools.lru_cache(maxsize=1)(open_tokenizer)


def _open_json(place: Path) -> TextTokenizer:
    model = tokenizers.Tokenizer.from_file(str(place))
    model.no_truncation()
    model.no_padding()
    eos = _named_eos(place.parent)
    return TextTokenizer(
        file=place,
        sha256=_sha256(place),
        vocab_size=max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        eos=None if eos is None else model.token_to_id(eos),
        encode=lambda text: np.asarray(model.encode(text, add_special_tokens=False).ids, np.int64),
        decode=lambda ids: model.decode(ids, skip_special_tokens=False),
        token_id=model.token_to_id,
        known=tuple(token.content for token in model.get_added_tokens_decoder().values() if token.special),
    )


def _named_eos(directory: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).exists():
            token = read_json(directory / name, "a tokenizer's JSON file").get("eos_token")
            if token is not None:
                return token["content"] if isinstance(token, dict) else token
    return None


def ends_of_model(directory: Path) -> list[int]:
    """Ids after which the model beside a tokenizer stops, by its config.json; none where there is no such file, or it does not say."""
    if not (directory / "config.json").exists():
        return []
    config = read_json(directory / "config.json", "the model's config.json beside its tokenizer")
    named = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    return [each for each in (named if isinstance(named, list) else [named]) if isinstance(each, int)]


def _open_sentencepiece(place: Path) -> TextTokenizer:
    model = sentencepiece.SentencePieceProcessor(model_file=str(place))

    def token_id(token: str) -> int | None:
        found = model.piece_to_id(token)
        return found if model.id_to_piece(found) == token else None

    return TextTokenizer(
        file=place,
        sha256=_sha256(place),
        vocab_size=model.vocab_size(),
        eos=model.eos_id() if model.eos_id() >= 0 else None,
        encode=lambda text: np.asarray(model.encode(text), np.int64),
        decode=model.decode,
        token_id=token_id,
        known=tuple(model.id_to_piece(index) for index in range(model.vocab_size()) if model.is_control(index)),
    )


def _sha256(place: Path) -> str:
    return hashlib.sha256(place.read_bytes()).hexdigest()
