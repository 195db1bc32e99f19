"""Where gated FFNs and MoE blocks stand in a Hugging Face checkpoint: tensor names, their shapes, how they are packed."""

from __future__ import annotations

from dataclasses import dataclass


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

    def parameters(self, hidden: int, width: int) -> int:
        """Of one FFN of width `width`."""
        biases = 2 * width * (self.gate_up_bias is not None) + hidden * (self.down_bias is not None)
        return 3 * hidden * width + biases

    @property
    def packing(self) -> Packing:
        """Of the matrices; biases are stacked and interleaved as these are."""
        return Packing(self.stacked, self.transposed, self.interleaved, self.mxfp4)

    def stored(self, *templates: str) -> tuple[str, ...]:
        """Templates of the tensors that hold these matrices."""
        return tuple(f"{name}_{part}" for name in templates for part in ("blocks", "scales")) if self.mxfp4 else templates


@dataclass(frozen=True)
class MoeTensors:
    """Name templates of one layer's MoE block.

    router: the router matrix [E, D]. router_bias: added to its logits [E]. correction: added to the scores when experts are
    selected, not to the gates [E]. shared: the shared experts as one FFN. shared_gate: [1, D], its sigmoid multiplies them.
    """

    router: str
    experts: FfnTensors
    router_bias: str | None = None
    correction: str | None = None
    shared: FfnTensors | None = None
    shared_gate: str | None = None


def mlp(prefix: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> FfnTensors:
    """The usual layout: a gate, an up and a down matrix under `prefix`, no biases."""
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return FfnTensors((gate, up), down)


def fused(prefix: str) -> FfnTensors:
    """All experts of a layer in two tensors [E, 2I, D] and [E, D, I], as transformers 5 holds them in memory."""
    return FfnTensors((f"{prefix}gate_up_proj",), f"{prefix}down_proj", stacked=True)
