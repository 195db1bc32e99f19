"""The end of whatever writes a checkpoint: a config.json for every reader, small files of its source, the proof that the stock class takes
it, and that its tokenizer is still the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe2dense.checkpoint.assets import copy_assets
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import write_json
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.engines import said_of_engines
from megatron_moe2dense.families.readers import as_json, contradictions, differences, for_all_readers, of_json
from megatron_moe2dense.families.tokenized import tokenized_otherwise


def finish(directory: Path, config: Mapping[str, Any], source: Path, processors: bool = False) -> None:
    """Write config.json and the small files beside the weights, and look at the whole as stock transformers does.

    Args:
        source: where tokenizer and other small files are from. processors: those of images and sound too.

    Raises:
        UserError: the stock class does not take every tensor; the directory is gone then.
    """
    write_json(directory / "config.json", as_json(for_all_readers(config)))
    copy_assets(source, directory, processors)
    try:
        account = Account.open(directory)
    except UserError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise UserError(
            f"what was written does not open: {error.found}", error.expected, "nothing was left there; please report config.json and this"
        ) from None
    called = directory.with_name(directory.name.removesuffix(".tmp"))  # once it is complete
    different = tokenized_otherwise(source, directory, called)
    known = said_of_engines(account.stock.model.config.to_dict())
    for said in [*believed_otherwise(account), *known, *([different] if different else [])]:
        logger.warning("%s: %s", called, said)


def believed_otherwise(account: Account) -> list[str]:
    """What to know of a config.json that stock transformers runs and other readers may not: what its class believes that no model can have,
    or that the file or the tensors say otherwise."""
    said, believed = of_json(account.index.config), json.loads(json.dumps(account.stock.model.config.to_dict()))
    meant = {name: _filled(value, believed[name]) for name, value in said.items() if name in believed}
    wrong = contradictions(believed) + differences(meant, believed)
    dtype = said.get("dtype") or said.get("torch_dtype")
    types = {str(each).removeprefix("torch.") for each in map(account.values.dtype, account.values.shapes) if each.is_floating_point}
    if dtype and types and dtype not in types:
        wrong.append(f"{dtype}, and the files hold {' and '.join(sorted(types))}")
    do = "correct it there, or convert the MoE again: keys that a config.json leaves out come back as the class's defaults"
    return [f"config.json says {each}; {do}" for each in wrong]


def _filled(said: Any, believed: Any) -> Any:
    """A block with what the class adds to it, as the type of rotary positions."""
    return {**believed, **said} if isinstance(said, dict) and isinstance(believed, dict) else said
