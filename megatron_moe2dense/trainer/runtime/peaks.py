"""Peak rates of GPUs, for the share of them that a run reaches (MFU)."""

from __future__ import annotations

# Dense bfloat16 tensor-core FLOP/s from NVIDIA's data sheets (half of the figures quoted with sparsity). The first name that is part
# of the device's own name counts.
_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def bf16_peak(device_name: str) -> float | None:
    """FLOP/s of a device by the name that torch.cuda.get_device_name gives; None for a CPU or one that is not listed."""
    return next((peak for name, peak in _BF16.items() if name in device_name), None)
