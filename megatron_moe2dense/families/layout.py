"""Where gated FFNs and MoE blocks stand in a Hugging Face checkpoint: tensor names, their shapes, how they are packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
MXFP4_BLOCK = 32


@dataclass(frozen=True)
class Packing:
    """How the stored tensors of one matrix, or of a gate and an up matrix, differ from [outputs, inputs] matrices of their own.

    stacked: axis 0 numbers the experts. transposed: stored [inputs, outputs]. interleaved: in one tensor, gate and up rows alternate;
    else gate rows, then up rows. mxfp4: blocks and scales (checkpoint/mxfp4.py) in place of a tensor.
    """

    stacked: bool = False
    transposed: bool = False
    interleaved: bool = False
    mxfp4: bool = False


@dataclass(frozen=True)
class FfnTensors:
    """Name templates of gated FFNs, with `{layer}`, and `{expert}` where every expert has tensors of its own.

    gate_up: the gate and the up matrix [I, D], or one tensor with the rows of both. down: [D, I].
    gate_up_bias, down_bias: None without biases; packed as the matrices are.
    stacked: axis 0 numbers the experts. transposed: matrices are stored [inputs, outputs].
    interleaved: gate and up rows alternate; else gate rows, then up rows.
    mxfp4: a matrix is stored as `<name>_blocks` and `<name>_scales` (checkpoint/mxfp4.py).
    """

    gate_up: tuple[str, ...]
    down: str
    gate_up_bias: str | None = None
    down_bias: str | None = None
    stacked: bool = False
    transposed: bool = False
    interleaved: bool = False
    mxfp4: bool = False

    def matrices(self, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
        """(template, shape) of the weights of one FFN as stored, before blocks and stacking."""
        for template in self.gate_up:
            rows = 2 * width // len(self.gate_up)
            yield template, (hidden, rows) if self.transposed else (rows, hidden)
        yield self.down, (width, hidden) if self.transposed else (hidden, width)

    def shapes(self, layer: int, hidden: int, width: int, experts: int = 1) -> dict[str, Shape]:
        """Names and shapes of all tensors of one layer's `experts` FFNs of width `width`."""
        stored: dict[str, Shape] = {}
        for template, (rows, columns) in self.matrices(hidden, width):
            if self.mxfp4:
                blocks = columns // MXFP4_BLOCK
                stored |= {f"{template}_blocks": (rows, blocks, MXFP4_BLOCK // 2), f"{template}_scales": (rows, blocks)}
            else:
                stored[template] = (rows, columns)
        if self.gate_up_bias is not None:
            stored[self.gate_up_bias] = (2 * width,)
        if self.down_bias is not None:
            stored[self.down_bias] = (hidden,)
        if self.stacked:
            return {template.format(layer=layer): (experts, *shape) for template, shape in stored.items()}
        return {template.format(layer=layer, expert=e): shape for e in range(experts) for template, shape in stored.items()}

    @property
    def packing(self) -> Packing:
        """Of the matrices; biases are stacked and interleaved as these are."""
        return Packing(self.stacked, self.transposed, self.interleaved, self.mxfp4)

    def stored(self, *templates: str) -> tuple[str, ...]:
        """Templates of the tensors that hold these matrices."""
        return tuple(f"{name}_{part}" for name in templates for part in ("blocks", "scales")) if self.mxfp4 else templates

    def names(self, layer: int, expert: int = 0) -> list[str]:
        """The tensors that hold one FFN (stacked: they hold the others of the layer too)."""
        templates = list(self.stored(*self.gate_up, self.down))
        templates += [bias for bias in (self.gate_up_bias, self.down_bias) if bias is not None]
        return [template.format(layer=layer, expert=expert) for template in templates]


@dataclass(frozen=True)
class MoeTensors:
    """Name templates of one layer's MoE block. block: what all of them begin with.

    router: the router matrix [E, D]. router_bias: added to its logits [E]. correction: added to the scores when experts are
    selected, not to the gates [E]. shared: the shared experts as one FFN. shared_gate: [1, D], its sigmoid multiplies them.
    """

    block: str
    router: str
    experts: FfnTensors
    router_bias: str | None = None
    correction: str | None = None
    shared: FfnTensors | None = None
    shared_gate: str | None = None

    def router_shapes(self, layer: int, hidden: int, experts: int) -> dict[str, Shape]:
        """Names and shapes of the tensors that route."""
        found = {self.router: (experts, hidden), self.router_bias: (experts,), self.correction: (experts,)}
        return {name.format(layer=layer): shape for name, shape in found.items() if name is not None}

    def shared_shapes(self, layer: int, hidden: int, width: int) -> dict[str, Shape]:
        """Names and shapes of the shared experts, of `width` neurons together, and their gate; empty without any."""
        if self.shared is None:
            return {}
        gate = {} if self.shared_gate is None else {self.shared_gate.format(layer=layer): (1, hidden)}
        return {**self.shared.shapes(layer, hidden, width), **gate}


def mlp(prefix: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> FfnTensors:
    """The usual layout: a gate, an up and a down matrix under `prefix`, no biases."""
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return FfnTensors((gate, up), down)


def fused(prefix: str) -> FfnTensors:
    """All experts of a layer in two tensors [E, 2I, D] and [E, D, I], as transformers 5 holds them in memory."""
    return FfnTensors((f"{prefix}gate_up_proj",), f"{prefix}down_proj", stacked=True)
