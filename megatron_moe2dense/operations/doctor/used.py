"""What a run on this machine would use, from the same functions that choose it in a run. Imports Megatron-Core, starts nothing."""

from __future__ import annotations

from megatron_moe2dense.operations.doctor.packages import Finding
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.runtime import upstream


def used(config: DistillConfig | None) -> list[Finding]:
    """Lines of the report. config: None for what does not depend on one."""
    chosen = runtime.expected()
    kernels = chosen.transformer_engine
    fused = [name for name, on in models.device_fields(chosen).items() if on and name.endswith("_fusion")]
    rows = [
        Finding("device", chosen.device.type),
        Finding("backend", chosen.backend),
        Finding("kernels", "Transformer Engine" if kernels else "plain PyTorch (torch's scaled_dot_product_attention)"),
        Finding("optimizer", f"{upstream.adam()} (Megatron-Core's own choice)"),
        Finding("experts", "grouped GEMM" if kernels else "one after another"),
        Finding("dispatcher", "alltoall"),
        Finding("fused", ", ".join(fused) or "none"),
        Finding("CUDA graphs", "off"),
    ]
    if config is not None:
        fp8 = config.fp8
        rows.append(Finding("fp8", f"{fp8.format}, {fp8.recipe}: the student's matrices" if fp8 is not None else "off"))
    return rows
