"""docs/families.md: what becomes of every mixture-of-experts type of the installed transformers, asked of tiny checkpoints.

python -m tests.families.document > docs/families.md
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.families.dense import DenseForm
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stream import Compute, StreamedModel
from tests.families.every import moe_types, tiny_checkpoint, tiny_config, wrapper_types
from tests.families.facts import MODELS
from tests.serving.document import records, served, table

COLUMNS = ("`model_type`", "models", "dense class", "form", "lost", "runs", "trainer", "engines")
PAGE = """\
# Model families

Every mixture-of-experts type of transformers {version} that is a causal language model, and what `moe2dense convert` makes of it. A type
is supported when stock transformers has a class in which a dense FFN in the place of the experts is exact.

**Exact** means: where every token gets the same experts with the same gates, MoE and dense result have the same logits, but for at most
1e-5 of the largest one (float32). So the change of class loses nothing but the routing, and what the column *lost* says; what the routing
did is for calibration to choose and for distillation to learn again. `tests/families` proves it for every type of the table, on tiny
random models with the features of the type switched on. Published models have not been converted here.

How to read the table:

- *models*: some that are published, by name; nothing of them was downloaded. `moe2dense inspect DIRECTORY` says what becomes of yours.
  Weights are read in bfloat16, float16 or float32, and [quantised](method.md#quantised-sources) in FP8, INT4 and more. *Inside* another
  type: the language model is a [part of it](#inside-models-for-images-and-sound).
- *form*: how the dense class holds the FFN. *Dense sibling*: a class without experts that is otherwise the same. *Itself, all layers
  dense*: the MoE's class, by its own switch for dense layers. *Itself, one expert* (or *two*): its class with an expert whose gate is
  constant; it serves like a MoE with nothing to choose (so does a `nemotron_h` with `moe_latent_size`: with two experts, between its
  projections). *Itself, no experts*: the neurons stand in an FFN that the class has beside the
  experts.
- *lost*: what the dense result can not have of the MoE, beyond the routing. A gate of shared experts that depends on the token becomes
  the constant that is nearest on the calibration text ([method.md](method.md)). Layers that predict later tokens (MTP), and what else
  the stock class says it leaves out of a checkpoint, are not converted: `inspect` and `convert` name them. Any other tensor that the class
  does not know is refused by name.
- *runs*: *layer by layer*, one decoder layer in memory at a time. *In lockstep*: as little memory, but all windows go through the model
  together, as its layers hand more to each other than hidden states. `sweep`, `auto` and a refit in sequential mode (the default) are
  refused then; `refit.mode=parallel` works. Sequential mode is refused too, and left out by `auto`, where a layer does more with the
  FFN's output than add it to the residual stream: a norm, a factor or a projection behind it (AXK1, Gemma-4, Granite among others).
- *trainer*: whether `distill` knows MoE and dense result in Megatron-Core. Without it the result is a checkpoint for another trainer.
- *engines*: where a dense result gave the logits of transformers ([docs/serving.md](serving.md#what-was-measured)).

{table}

## Refused

These have no exact dense form in stock transformers; a command that opens one says why:

{refused}

## Inside models for images and sound

What is around the language model is carried over bit for bit where a stock class holds it beside the dense one; `convert text_only=true`
writes the language model alone, with the names of its own class. Calibration and everything else is of text: what the experts do with
images or sound is not looked at. `tests/families/test_every_wrapper.py` proves both results of every type.

{wrappers}

These are refused:

{refused_wrappers}

[docs/serving.md](serving.md) has the engines in which dense results of these types were run, and the figures.

This page is written by `python -m tests.families.document > docs/families.md`; edit that.
"""


def page() -> str:
    """The document."""
    rows, refused = [], []
    for model_type in moe_types():
        try:
            rows.append(_row(model_type))
        except UserError as error:
            refused.append((f"`{model_type}`", _models(model_type), error.found.removeprefix(f"{model_type}: ")))
    wrappers, refused_wrappers = [], []
    for model_type, text_type in _text_types().items():
        row = (f"`{model_type}`", MODELS.get(model_type, ""), f"`{text_type}`")
        try:
            wrappers.append((*row, *_dense_classes(model_type)))
        except UserError as error:
            refused_wrappers.append((*row, error.found.removeprefix(f"{text_type}: ")))
    return PAGE.format(
        version=transformers.__version__,
        table=table(COLUMNS, rows),
        refused=table(("`model_type`", "models", "why"), refused),
        wrappers=table(("`model_type`", "models", "language model", "dense class", "language model alone"), wrappers),
        refused_wrappers=table(("`model_type`", "models", "language model", "why"), refused_wrappers),
    )


@contextmanager
def _tiny_source(model_type: str) -> Iterator[MoeSource]:
    with TemporaryDirectory() as folder:
        yield MoeSource.open(tiny_checkpoint(Path(folder) / "model", model_type))


def _row(model_type: str) -> tuple[str, ...]:
    """Of a type that can be converted; UserError where it is refused."""
    with _tiny_source(model_type) as source:
        trainer = "yes" if model_type in FAMILIES else "no"
        engines = ", ".join(served(model_type)) or ("no" if model_type in records() else "not tried")
        return (
            f"`{model_type}`",
            _models(model_type),
            _class_of(source.form),
            _form(source),
            _lost(source),
            _runs(source),
            trainer,
            engines,
        )


@cache
def _text_types() -> dict[str, str]:
    """Of each wrapper."""
    return {model_type: tiny_config(model_type).text_config.model_type for model_type in wrapper_types()}


def _models(model_type: str) -> str:
    """Published models, those around it too."""
    around = [f"{MODELS[name]} (inside `{name}`)" for name, text_type in _text_types().items() if text_type == model_type]
    return "; ".join(filter(None, [MODELS.get(model_type, ""), *around]))


def _form(source: MoeSource) -> str:
    exception = source.form.exception
    if exception.sibling is not None:
        return "dense sibling"
    return source.form.kind if exception.into is None else f"{source.form.kind} (neurons in `{exception.into}`)"


def _lost(source: MoeSource) -> str:
    gate = next(iter(source.stock.moe.values())).shared_gate
    constant = "the gate of the shared experts (a constant)" if gate is not None and source.seam == "block" else ""
    return ", ".join(filter(None, (source.form.exception.lost, constant))) or "-"


def _runs(source: MoeSource) -> str:
    with CheckpointReader(source.index) as reader:
        model = StreamedModel(source, reader, Compute(torch.device("cpu"), torch.float32, batch=1))
        model._load_outside()
        return "in lockstep" if model._hand_more(np.arange(3, 27)[None]) else "layer by layer"


def _dense_classes(model_type: str) -> tuple[str, str]:
    """With what is around it, and of the language model alone; UserError where it is refused."""
    with _tiny_source(model_type) as source:
        whole = source.form
        assert not whole.alone, f"a dense {model_type} loses what is around"
        try:
            alone = _class_of(DenseForm(source.stock, alone=True))
        except UserError:
            alone = "no class for it"
        return _class_of(whole), alone


def _class_of(form: DenseForm) -> str:
    return f"`{type(form.of(64).stock.model).__name__}`"


if __name__ == "__main__":
    print(page(), end="")
