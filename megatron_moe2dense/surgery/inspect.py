"""`moe2dense inspect`: what a checkpoint holds and what its dense result would be, from headers alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import Any

from megatron_moe2dense.checkpoint.assets import tokenizer_of
from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.table import render
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.dense import has_experts
from megatron_moe2dense.families.engines import said_of_engines
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.surgery.config import InspectConfig
from megatron_moe2dense.surgery.layout import Padding, dense_of, dense_size, padding
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.types import check_keep

# Memory of common GPUs [GB]; weights may take this share of it, the rest is for the KV cache and activations.
_GPUS, _SHARE = (16, 24, 48, 80, 141, 192), 0.8
_LEFT_OUT = "left out"
# Part of a tensor outside the MoE blocks by what its name holds, in every family.
_PARTS = {".self_attn.": "attention", "embed_tokens.": "embeddings", "lm_head.": "embeddings"}


def run(config: InspectConfig) -> None:
    """Print family, sizes, parameters and bytes by part, and the dense result.

    Raises:
        UserError: no supported or a damaged checkpoint; a tensor that the class does not take (Account); keep out of range or given for a
            dense model.
    """
    facts = inspect(config)
    print(json.dumps(facts, indent=2) if config.json else _readable(facts))


def dry_run(config: InspectConfig) -> dict[str, Any]:
    """Inspecting writes nothing: the facts themselves."""
    return inspect(config)


def inspect(config: InspectConfig) -> dict[str, Any]:
    """All facts. Parameters are counts, bytes as stored."""
    index = CheckpointIndex.open_headers(config.source) if config.download else CheckpointIndex.open(config.source)
    stock = Stock.read(index.directory)
    source = MoeSource.of(index, stock, config.text_only, config.pad_to) if has_experts(stock) else None
    account = Account.of(index, stock) if source is None else source.account
    untied = account.untied() if index.is_here else []
    parameters, nbytes = _parts(account, source)
    facts = {
        "source": str(index.directory),
        **hub.revision_of(index.directory),
        "family": stock.name,
        "dims": dataclasses.asdict(stock.dims if source is None else source.dims) | ({"tied_embeddings": False} if untied else {}),
        "untied": untied,
        "left_out": account.left_out_facts(),
        "tokenizer": tokenizer_of(index.directory),
        "parameters": {"total": stock.parameters, **parameters},
        "bytes": {"total": index.nbytes, **nbytes},
        "fingerprint": index.fingerprint() if index.is_here else None,
    }
    if source is None:
        for name in {"keep", "pad_to"} & config.model_fields_set:
            found = f"{name}={getattr(config, name)} for a dense {stock.name} model"
            raise UserError(found, "a MoE model", "drop --keep" if name == "keep" else "drop pad_to")
        engines = said_of_engines(stock.model.config.to_dict())
        return {**facts, "engines": engines, "gpus_for_weights": {"this model": gpus_for_weights(index.nbytes)}}
    moe = _moe_facts(config, source)
    fits = {"this model": gpus_for_weights(index.nbytes), "dense": gpus_for_weights(moe["dense"]["bytes"])}
    return {**facts, **moe, "gpus_for_weights": fits}


def gpus_for_weights(nbytes: int) -> dict[str, int]:
    """How many GPUs of each common memory size hold weights of `nbytes` for inference, split evenly."""
    return {f"{memory} GB": max(1, math.ceil(nbytes / (memory * 1e9 * _SHARE))) for memory in _GPUS}


def _moe_facts(config: InspectConfig, source: MoeSource) -> dict[str, Any]:
    dims = source.dims
    keep = config.keep or dims.active
    check_keep(keep, dims.experts)
    (dense_parameters, dense_bytes), width = dense_size(source, keep), padding(source, keep)
    return {
        "moe_layers": list(source.layers),
        "engines": said_of_engines(dense_of(source, keep).stock.model.config.to_dict()),
        "active_parameters": source.stock.active_parameters(dims.active),
        "dense": {
            "family": dense_of(source, keep).stock.name,
            "form": source.form.kind,
            "keep": keep,
            "intermediate_size": width.width,
            "padding": dataclasses.asdict(width),
            "parameters": dense_parameters,
            "bytes": dense_bytes,
        },
    }


def _parts(account: Account, source: MoeSource | None) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters and bytes by part: experts, shared experts, attention, embeddings, router, other, and what is left out. Buffers have bytes
    alone."""
    order = ("experts", "shared experts", "attention", "embeddings", "router", "other", _LEFT_OUT)
    parameters: Counter[str] = Counter(dict.fromkeys(order, 0))
    nbytes: Counter[str] = Counter(dict.fromkeys(order, 0))
    in_blocks = dict.fromkeys(account.left_out, _LEFT_OUT) | ({} if source is None else _block_parts(source))
    buffers = {stored for name in account.stock.buffers for stored in account.disk.names_of(name)}
    for name, info in account.index.tensors.items():
        part = in_blocks.get(name) or next((part for text, part in _PARTS.items() if text in name), "other")
        parameters[part] += 0 if name in buffers else account.values.parameters(name)
        nbytes[part] += info.nbytes
    return dict(parameters), dict(nbytes)


def _block_parts(source: MoeSource) -> dict[str, str]:
    parts: dict[str, str] = {}
    for layer in source.layers:
        parts |= dict.fromkeys(source.router_names(layer), "router")
        parts |= dict.fromkeys(source.shared_names(layer), "shared experts")
        parts |= dict.fromkeys(source.expert_names(layer), "experts")
    return parts


def left_out_line(left_out: dict[str, Any], family: str) -> str:
    """For people: what of a checkpoint is no part of the dense result."""
    return f"left out, as stock {family} does not run them: {left_out['tensors']} tensors ({', '.join(left_out['names'])})"


def _readable(facts: dict[str, Any]) -> str:
    names = [name for name in facts["parameters"] if facts["parameters"][name] or name == "total"]
    rows = [[name, f"{facts['parameters'][name]:,}", f"{facts['bytes'][name] / 1e6:,.1f}"] for name in names]
    sizes = "  ".join(f"{name} {value}" for name, value in facts["dims"].items())
    lines = [f"{facts['source']}: {facts['family']}", "", sizes, "", render(["part", "parameters", "MB"], rows)]
    if facts["left_out"]["tensors"]:
        lines += ["", left_out_line(facts["left_out"], facts["family"])]
    if facts["tokenizer"].startswith("no "):
        lines += ["", facts["tokenizer"]]
    for name in facts["untied"]:
        lines += ["", f"config.json ties {name} to the embedding, the files hold another one: stock transformers keeps both"]
    if "dense" in facts:
        dense = facts["dense"]
        lines += [
            "",
            f"active per token: {facts['active_parameters']:,} parameters",
            f"dense with K = {dense['keep']}: {dense['family']}, intermediate_size {dense['intermediate_size']}, "
            f"{dense['parameters']:,} parameters, {dense['bytes'] / 1e6:,.1f} MB",
        ]
        if said := Padding(**dense["padding"]).said:
            lines.append(f"of it {said}")
    of = "the dense result" if "dense" in facts else "this model"
    for said in facts["engines"]:
        lines += ["", f"{of} in {said}"]
    fits = facts["gpus_for_weights"]
    table = [[name, *counts.values()] for name, counts in fits.items()]
    lines += ["", render([f"GPUs whose memory holds the weights in {_SHARE:.0%}", *fits["this model"]], table)]
    return "\n".join(lines)
