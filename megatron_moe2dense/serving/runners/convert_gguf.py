"""llama.cpp's own converter, told what splits the text of a tokenizer that it does not know. Run as a script:

convert_gguf.py LLAMA_CPP PRE_TOKENIZER ALWAYS [the converter's arguments]

LLAMA_CPP is its checkout. PRE_TOKENIZER answers for tokenizers whose hash is unknown ("": none does), with ALWAYS=1 for all.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main(checkout: str, pre_tokenizer: str, always: str, arguments: list[str]) -> None:
    """Convert; whatever the converter raises ends the process."""
    sys.path[:0] = [checkout, str(Path(checkout, "gguf-py"))]
    script = str(Path(checkout, "convert_hf_to_gguf.py"))
    base = _base(script)
    known = base.get_vocab_base_pre

    def answered(self: Any, tokenizer: Any) -> str:
        if pre_tokenizer and always == "1":
            return pre_tokenizer
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if not pre_tokenizer:
                raise
            return pre_tokenizer

    base.get_vocab_base_pre = answered
    # Layers that predict later tokens are no part of what is converted here; the converter takes some classes to have them always.
    base.no_mtp = True
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _base(script: str) -> Any:
    """The class whose method knows pre-tokenizers: in a package beside the script, or, in checkouts before it, in the script itself."""
    try:
        return import_module("conversion.base").TextModel
    except ImportError:
        raise SystemExit(f"{script}: no package `conversion` beside it, as in llama.cpp since b8900") from None


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
