"""Is held-out text held out? By the content of token files, whatever they are called."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_moe2dense.common.log import logger
from megatron_moe2dense.tokens.indexed import TokenFile

ADVICE = "hold documents out of the training text: moe2dense data ... validation_fraction=0.01"


def not_held_out(prefix: str, read: Mapping[str, str]) -> str | None:
    """What to say of a held-out token file that has the content of one that is learned from, None when it has not.

    Args:
        prefix: of the held-out file. read: prefixes of the files that are learned from, by their keys in the config.
    """
    found = TokenFile.open(prefix).fingerprint()
    same = [f"{name}={path}" for name, path in read.items() if TokenFile.open(path).fingerprint() == found]
    return f"held-out text {prefix} is that of {', '.join(same)}: figures on it are figures on training text" if same else None


def warn_unless_held_out(prefix: str, read: Mapping[str, str]) -> None:
    """Log what `not_held_out` says."""
    said = not_held_out(prefix, read)
    if said is not None:
        logger.warning("%s; %s", said, ADVICE)
