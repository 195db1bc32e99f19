"""Ways to choose the neurons of a dense FFN out of all experts of a layer, one file each, found by name (`select: {method: NAME}`). All of
it is (ours): the paper chooses whole experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moe2dense.common.registry import Method, Registry

if TYPE_CHECKING:
    import torch

    from megatron_moe2dense.surgery.refit.normal import Sums


class NeuronSelector(Method):
    """Chooses F of a layer's E * I neurons. All are ranked by their energy first: sum over tokens of (gate times activation)^2, times
    ||down column||^2, which is what the MoE's output would lose of its square without them if they were orthogonal."""

    def candidates(self, width: int) -> int:
        """How many of the ranking's first it looks at to choose `width`; as many: the ranking is the choice, and no text is needed."""
        return width

    @property
    def reads_text(self) -> bool:
        """Whether it looks beyond the ranking, at activations."""
        return self.candidates(1000) > 1000

    def choose(self, sums: Sums, width: int, free: int) -> torch.Tensor:  # noqa: ARG002 - for methods that look further
        """`width` of the candidates, best first, as places in the ranking; the ranking's first, unless a method knows better.

        Args:
            sums: normal equations of the routed experts' output on the activations of the candidates, and of `free` constants behind
                them.
        """
        import torch

        return torch.arange(width, device=sums.gram_FF.device)


selectors: Registry[NeuronSelector] = Registry("select", __name__)
