"""GPUs, and how fast a message goes between those of a group, by where Megatron-Core places its ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe2dense.operations.plan.communication import Traffic
from megatron_moe2dense.operations.plan.config import HardwareConfig
from megatron_moe2dense.operations.plan.job import Job
from megatron_moe2dense.trainer.runtime.peaks import bf16_peak


@dataclass(frozen=True)
class DataSheet:
    """Of a kind of GPU.

    memory: bytes. nvlink, network: bytes/s of one GPU in one direction, inside a node and between nodes. price: USD per GPU-hour.
    """

    memory: float
    nvlink: float
    network: float
    price: float


# Memory and NVLink (half of the two-way figure) from NVIDIA's data sheets of the SXM parts; the network is that of the DGX of the kind:
# ConnectX-7 of 400 Gb/s for each GPU, 200 Gb/s in the DGX A100. Prices are round figures of 2026 (assumed).
DATA_SHEETS = {
    "H100": DataSheet(80e9, 450e9, 50e9, 2.5),
    "H200": DataSheet(141e9, 450e9, 50e9, 3.0),
    "B200": DataSheet(180e9, 900e9, 50e9, 5.0),
    "A100": DataSheet(80e9, 300e9, 25e9, 1.5),
}


@dataclass(frozen=True)
class Machine:
    """The hardware block with its defaults filled in; rates are those of the data sheet times `efficiency`."""

    config: HardwareConfig

    @property
    def gpu(self) -> DataSheet:
        """The kind."""
        return DATA_SHEETS[self.config.gpu]

    @property
    def flops(self) -> float:
        """bfloat16 FLOP/s that a GPU reaches."""
        return self.peak * self.config.efficiency

    @property
    def peak(self) -> float:
        """bfloat16 FLOP/s of the data sheet."""
        peak = bf16_peak(self.config.gpu)
        assert peak is not None, "every kind of the table has its peak"
        return peak

    @property
    def usable(self) -> float:
        """Bytes of a GPU without the reserve."""
        return self.gpu.memory * (1 - self.config.reserve)

    @property
    def price(self) -> float:
        """USD per GPU-hour."""
        return self.gpu.price if self.config.price is None else self.config.price

    @property
    def network(self) -> float:
        """bytes/s of a GPU between nodes, of the data sheet."""
        return self.gpu.network if self.config.network is None else self.config.network

    def seconds(self, job: Job, traffic: Traffic) -> float:
        """Time of the messages: bytes that leave a GPU over the bandwidth of its slowest link.

        Rings send (n - 1) / n of an all-gather's or reduce-scatter's payload, twice that of an all-reduce's (Thakur et al. 2005). A group
        with g GPUs on a node sends g rings through g network cards at once; an all-to-all sends each GPU's remote part through its own.
        """
        stride, ranks = _stride(job, traffic), traffic.ranks
        on_node = min(ranks, max(1, self.config.on_node() // stride))
        share = (ranks - 1) / ranks
        crosses = (ranks - 1) * stride >= self.config.on_node()
        rate = self.gpu.nvlink * self.config.efficiency
        between = self.network * self.config.efficiency
        if traffic.operation == "send":
            return traffic.payload / (between if stride * ranks > self.config.on_node() else rate)
        if traffic.operation == "all-to-all":
            remote = (ranks - on_node) / ranks if crosses else 0.0
            return traffic.payload * max(remote / between, (share - remote) / rate)
        sent = traffic.payload * share * (2 if traffic.operation == "all-reduce" else 1)
        return sent / (min(rate, between * on_node) if crosses else rate)


def _stride(job: Job, traffic: Traffic) -> int:
    """Distance of neighbours of a group in the order of ranks: Megatron-Core's tensor, context, expert, data, pipeline."""
    parallel = job.parallel
    return {
        "tp": 1,
        "etp": 1,
        "tp_ep": 1,
        "ep": job.expert_tensor,
        "cp": parallel.tensor,
        "dp_cp": parallel.tensor,
        "edp": job.expert_tensor * parallel.expert,
        "pp": job.world // parallel.pipeline,
        "embd": job.world // parallel.pipeline * (parallel.pipeline - 1),
    }[traffic.group]
