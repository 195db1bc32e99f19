"""lm-eval as quiet as the rest: its bars as lines of ours, without what it says of the way it is called."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from megatron_moe2dense.common.progress import Progress, progress


class _Bar:
    """What lm-eval uses of `tqdm`: over an iterable, or by hand."""

    def __init__(self, items: Iterable[Any] | None = None, desc: str = "prepare a task", total: int | None = None, **_: Any):
        self._items, self._doing = items, desc.lower()
        self._total = total if total is not None else len(items) if hasattr(items, "__len__") else 0  # type: ignore[arg-type]
        self._shown = Progress(self._doing, "request", self._total)

    def __iter__(self) -> Iterator[Any]:
        assert self._items is not None
        return progress(self._items, self._doing, "request", self._total)

    def update(self, amount: int = 1) -> None:
        """So many more."""
        self._shown.update(amount)

    def close(self) -> None:
        """The end."""
        self._shown.close()

    @classmethod
    async def gather(cls, *tasks: Awaitable[Any], desc: str) -> list[Any]:
        """What all give, in their order."""
        shown = cls(desc=desc, total=len(tasks))

        async def counted(task: Awaitable[Any]) -> Any:
            found = await task
            shown.update()
            return found

        found = await asyncio.gather(*map(counted, tasks))
        shown.close()
        return found


@contextlib.contextmanager
def bars_as_lines(*more: ModuleType, level: int = logging.ERROR) -> Iterator[None]:
    """more: modules of lm-eval whose bars are lines too. level: below it, what lm-eval logs is left out.

    lm-eval 0.4.13: modules take `tqdm` by name, `simple_evaluate` asks git for the commit of the working directory, whose refusal
    goes to stderr, and HFLM warns that the model it was given is no string
    (https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/evaluator.py)."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface

    theirs = logging.getLogger("lm_eval")
    before = theirs.level
    with contextlib.ExitStack() as undo:
        for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface, *more):
            for name in {"tqdm", "tqdm_asyncio"} & vars(module).keys():
                undo.enter_context(mock.patch.object(module, name, _Bar))
        undo.enter_context(mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", return_value=None))
        undo.callback(theirs.setLevel, before)
        theirs.setLevel(max(level, before))
        yield
