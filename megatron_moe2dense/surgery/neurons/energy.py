"""Neurons by their energy alone: from statistics, without another pass over text."""

from megatron_moe2dense.surgery.neurons import NeuronSelector, selectors


@selectors.register("energy")
class Energy(NeuronSelector):
    """The neurons of the largest gated activation energy times squared norm of their down column (ours)."""
