"""What every tensor of a checkpoint is to its stock class, from headers alone: used, left out by a rule that has a name, or refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_moe2dense.checkpoint.index import CheckpointIndex, TensorInfo
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.schemes.settings import Settings
from megatron_moe2dense.checkpoint.values import DECODED, Values
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.disk import Disk
from megatron_moe2dense.families.stock import Shape, Stock

_PLAIN = ("BF16", "F16", "F32", "F64")
_INTEGERS = ("I64", "I32", "I16", "I8", "U8")
# What reads or mends weights that this reader does not decode, by quant_method.
_DO = {
    "bitsandbytes": "use the original weights; or load it with transformers, call model.dequantize() and save_pretrained",
}
_DO_ELSE = "use the original weights, or dequantise the checkpoint with the library that wrote it"
# Ends of names that stand beside quantised numbers: FP8 and compressed-tensors, AWQ and GPTQ, bitsandbytes, ModelOpt.
_OF_QUANTISED = re.compile(
    r"(weight_(global_)?scale(_inv|_2)?|input_(global_)?scale|weight_(packed|shape|zero_point|g_idx)|qweight|qzeros|g_idx|\.scales|(nested_)?absmax"
    r"|(nested_)?quant_map|quant_state\.\w+|\.SCB|activation_scale(_inv)?|\.compressed|\.bitmask)$"
)
# Of those, the numbers themselves: AWQ and GPTQ, compressed-tensors, and what keeps the name of a weight.
_PACKED = re.compile(r"(qweight|weight_packed|weight|\.compressed)$")
# What stock classes run without: heads of multi-token prediction, and scales of a key-value cache in FP8.
_NOT_RUN = re.compile(r"^(model\.)?(language_model\.)?mtp\.|\.(k|v|kv|q|prob)(_proj)?(\.output)?_scale$")


@dataclass(frozen=True, eq=False)
class Account:
    """An opened checkpoint whose tensors are all accounted for. values, disk: by name in the files and in the class."""

    index: CheckpointIndex
    stock: Stock
    values: Values
    disk: Disk

    @classmethod
    def of(cls, index: CheckpointIndex, stock: Stock) -> Account:
        """Compare headers with what the class holds.

        Raises:
            UserError: a tensor that is quantised, absent, there twice, of another shape, or that the class neither holds nor leaves out.
        """
        values = Values(index)
        account = cls(index, stock, values, Disk(stock, values.shapes))
        account._require_integers()
        account._require_plain()
        account._require_once()
        account._require_shapes()
        account._require_known()
        return account

    @classmethod
    def open(cls, directory: str | Path) -> Account:
        """As `of`, of a directory. UserError also for damaged files, and for a class that transformers does not have."""
        index = CheckpointIndex.open(directory)
        return cls.of(index, Stock.read(index.directory))

    @cached_property
    def left_out(self) -> list[str]:
        """Tensors in the files that the stock model does not run: those that its class says it leaves out, heads of
        multi-token prediction (layers beyond the last, mostly), and scales of a quantised key-value cache."""
        names = {name: self.disk.where(name)[0] for name in self.disk.unknown}
        ignored = self.stock.ignored(names.values())
        out = [name for name, target in names.items() if target in ignored or self._is_beyond(name) or _NOT_RUN.search(name)]
        return [part for name in out for part in self.values.stored(name)]

    def untied(self) -> list[str]:
        """Tensors that config.json ties to another, as an output head to the embedding, and that the files hold with other values: stock
        transformers keeps both. Reads them as far as they are equal."""
        pairs = [(self.disk.names_of(name), self.disk.names_of(of)) for name, of in self.stock.model.all_tied_weights_keys.items()]
        with CheckpointReader(self.index) as reader:
            return [own[0] for own, of in pairs if own and of and not self._equal(reader, own[0], of[0])]

    def _equal(self, reader: CheckpointReader, name: str, other: str) -> bool:
        mine, its = self.values.stored(name), self.values.stored(other)
        return len(mine) == len(its) and all(reader.equal(*pair) for pair in zip(mine, its, strict=True))

    @property
    def config(self) -> dict[str, Any]:
        """config.json with the type of the numbers as they are read, which are not quantised any more."""
        plain = {name: value for name, value in self.index.config.items() if name != "quantization_config"}
        if "quantization_config" in (inner := plain.get("text_config") or {}):
            plain["text_config"] = {name: value for name, value in inner.items() if name != "quantization_config"}
        return {**plain, **({"dtype": str(DECODED).removeprefix("torch.")} if self.values.encoded else {})}

    def left_out_facts(self) -> dict[str, Any]:
        """How many tensors are left out, and which: experts' numbers as *."""
        short = dict.fromkeys(re.sub(r"(?<=experts\.)\d+(?=\.)", "*", name) for name in self.left_out)
        return {"tensors": len(self.left_out), "names": list(short)}

    def _is_beyond(self, name: str) -> bool:
        head, _, rest = name.partition(f"{self.stock.prefix.rpartition('.')[2]}.")
        number = rest.partition(".")[0]
        return bool(head) and number.isdigit() and int(number) >= len(self.stock.layers)

    def _require_plain(self) -> None:
        """Nothing that needs scales or tables to be numbers and has no reader; a packed weight is named before what stands beside it."""
        encoded = {part for found in self.values.encoded.values() for part in found.parts}
        left_out, method = set(self.left_out), Settings.of(self.index).method
        plain = "weights in bfloat16, float16 or float32, or quantised in a way that docs/method.md lists"
        found = [
            name
            for name, info in self.index.tensors.items()
            if name not in encoded and name not in left_out and (self._is_encoded(info) or self._stands_beside(name))
        ]
        for name in sorted(found, key=lambda name: _PACKED.search(name) is None)[:1]:
            kind = f"{self.index.tensors[name].dtype}{'' if method is None else f', {method}'}"
            more = f"; {len(found)} such tensors" if len(found) > 1 else ""
            raise UserError(f"{self.index.directory}: {name} is quantised ({kind}{more})", plain, _DO.get(method or "", _DO_ELSE))
        if method not in (None, "mxfp4") and not encoded:
            raise UserError(
                f"{self.index.directory}/config.json: quantization_config of {method}, and weights that are not quantised",
                "quantised weights, or no quantization_config beside others",
                "remove quantization_config from config.json if the weights were dequantised",
            )

    def _is_encoded(self, info: TensorInfo) -> bool:
        return info.dtype not in _PLAIN and self.disk.where(info.name)[0] not in self.stock.integers

    def _stands_beside(self, name: str) -> bool:
        return _OF_QUANTISED.search(name) is not None and name in self._unknown

    @cached_property
    def _unknown(self) -> set[str]:
        return set(self.disk.unknown)

    def _require_integers(self) -> None:
        """Nothing but whole numbers where the class looks something up with them."""
        for stored in (stored for name in self.stock.integers for stored in self.disk.names_of(name)):
            dtype = self.index.tensors[stored].dtype
            if dtype not in _INTEGERS:
                raise UserError(
                    f"{self.index.directory}: {stored} is {dtype}", f"one of {', '.join(_INTEGERS)}", "download the checkpoint again"
                )

    def _require_once(self) -> None:
        """No tensor of the class under two names, of which stock transformers would take one and say nothing of the other."""
        for name in self.stock.shapes:
            stored = self.disk.names_of(name) if self.disk.is_plain(name) else []
            if len(stored) > 1:
                raise UserError(
                    f"{self.index.directory}: {stored[0]} and {stored[1]}, each of which is {name} of {type(self.stock.model).__name__}",
                    "every tensor once",
                    "find out which of them is the right one, and save the checkpoint without the other",
                )

    def _require_shapes(self) -> None:
        for name, shape in self.stock.shapes.items():
            if self.disk.names_of(name) and self.disk.shape(name) != shape:
                self._refuse(name, shape)
        missing = self.disk.missing
        self.index.require(stored for name in missing for stored in self._expected(name, self.stock.shapes[name]))
        if missing:  # what should hold it is there, and was taken for another: one that decides how names are read is absent
            self.index.require(self.disk.saved(*(self.stock.shapes.keys() - self.stock.model.all_tied_weights_keys.keys())))
            raise UserError(
                f"{self.index.directory}: nothing that is {missing[0]} of {type(self.stock.model).__name__} ({len(missing)} such tensors)",
                "every tensor that config.json calls for",
                "save the checkpoint with transformers' save_pretrained first",
            )

    def _refuse(self, name: str, shape: Shape) -> None:
        """UserError for what does not become a tensor of the class: the first part that is absent, of another shape or too many."""
        wanted = self._expected(name, shape)
        for stored, expected in wanted.items():
            if stored in self.values.encoded:
                self._require_decoded(stored, expected)
            else:
                self.index.require_shape(stored, expected)
        more = [stored for stored in self.disk.names_of(name) if stored not in wanted]
        raise UserError(
            f"{self.index.directory}: {(more or self.disk.names_of(name))[0]} ({len(more)} such tensors)",
            f"{name} of {type(self.stock.model).__name__} as {list(shape)}, from {len(wanted)} tensors such as {next(iter(wanted))}",
            "check that config.json and the weights are of the same model",
        )

    def _require_decoded(self, name: str, shape: Shape) -> None:
        encoded = self.values.encoded[name]
        if encoded.shape != shape:
            raise UserError(
                f"{self.index.directory}: {encoded.parts[0]} ({encoded.scheme}) decodes to {list(encoded.shape)}",
                f"{list(shape)} by config.json",
                "check that config.json and the weights are of the same model",
            )

    def _expected(self, name: str, shape: Shape) -> dict[str, Shape]:
        """What the files should have for a tensor of the class: under the class's name, or as the class saves it."""
        if self.disk.is_plain(name):
            return {self.disk.names_of(name)[0]: shape}
        return self.disk.saved(name)

    def _require_known(self) -> None:
        left_out = set(self.left_out)
        unknown = [name for name in self.disk.unknown if not left_out.issuperset(self.values.stored(name))]
        if unknown:
            cls = type(self.stock.model).__name__
            raise UserError(
                f"{self.index.directory}: {unknown[0]}, which {cls} does not know ({len(unknown)} such tensors)",
                f"the tensors of {cls}, and those that it says it leaves out",
                "check that config.json and the weights are of the same model, or save it with transformers' save_pretrained first",
            )
