"""Block-wise reconstruction: gate, up and down projections of one dense FFN trained together by gradient on its layer's inputs and targets
(ours; layer by layer like the reconstruction of AdaRound, Nagel et al. 2020, arXiv:2004.10568, of whole FFNs here)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.families.ffn import Ffn
from megatron_moe2dense.surgery.config import ReconstructConfig
from megatron_moe2dense.surgery.dense_block import neurons
from megatron_moe2dense.surgery.experts import Gating
from megatron_moe2dense.surgery.hidden import HiddenStates
from megatron_moe2dense.surgery.refit.layer import LayerFit

_WARMUP = 0.1  # share of the updates


@dataclass(frozen=True)
class LayerText:
    """What one layer is trained on, this rank's part.

    Attributes:
        inputs, targets: of the FFN, [N, S, D]. held_out_N: which windows only judge.
    """

    inputs: HiddenStates
    targets: HiddenStates
    held_out_N: torch.Tensor

    def put(self, batch: int, x_BSD: torch.Tensor, target_BSD: torch.Tensor) -> None:
        """A batch of it."""
        self.inputs.put(batch, x_BSD)
        self.targets.put(batch, target_BSD)

    def complete(self) -> None:
        """Every batch is put."""
        self.inputs.advance(1)
        self.targets.advance(1)


@dataclass(frozen=True)
class Reconstruction:
    """Of one layer.

    Attributes:
        ffn: as planned, on the compute device, float32. fixed: its last so many neurons stay as they are; targets are without them.
    """

    gating: Gating
    ffn: Ffn
    fixed: int
    settings: ReconstructConfig
    ranks: Ranks

    @torch.enable_grad()
    def train(self, start: LayerFit, text: LayerText, seed: int) -> LayerFit | None:
        """From a solution that has not seen the held-out text; every rank returns the same, None where nothing was better there.

        Raises:
            UserError: on every rank, where one has no window to train on.
        """
        width = len(self.ffn.up_FD) - self.fixed
        free = {name: nn.Parameter(tensor.detach().float().clone()) for name, tensor in _free(start.applied(self.ffn), width).items()}
        windows = torch.nonzero(~text.held_out_N)[:, 0]
        own = max(1, self.settings.batch_tokens // text.inputs.length // self.ranks.world)
        fewest = self.ranks.least(len(windows))
        if not fewest:
            problem = "refit.reconstruct with a process that has no window to train on"
            raise UserError(problem, "at least one of each, beside the tenth that judges", "use more data.sequences or fewer processes")
        updates = max(1, fewest // own)
        unit = self._mean_square(text)
        adamw = torch.optim.AdamW(free.values(), lr=self.settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            adamw, self.settings.lr, total_steps=self.settings.epochs * updates + 1, pct_start=_WARMUP, cycle_momentum=False
        )
        least = self._error(free, text)
        kept, epochs = {name: tensor.detach().clone() for name, tensor in free.items()}, 0
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(1, self.settings.epochs + 1):
            order = windows[torch.randperm(len(windows), generator=generator)]
            for update in range(updates):
                adamw.zero_grad()
                (self._loss(free, text, order[update * own : (update + 1) * own]) / unit).backward()
                self.ranks.average([parameter.grad for parameter in free.values() if parameter.grad is not None])
                adamw.step()
                schedule.step()
            if (error := self._error(free, text)) < least:
                least, epochs = error, epoch
                kept = {name: tensor.detach().clone() for name, tensor in free.items()}
        if not epochs:
            return None
        return LayerFit(self._whole(kept, start), replace(start.report, reconstructed=least, epochs=epochs))

    def _loss(self, free: dict[str, nn.Parameter], text: LayerText, windows: torch.Tensor) -> torch.Tensor:
        x_BSD, target_BSD = self._batch(text, windows)
        return (self._output(free, x_BSD) - target_BSD).square().mean()

    def _batch(self, text: LayerText, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.ffn.up_FD.device
        return text.inputs.windows(windows).to(device).float(), text.targets.windows(windows).to(device).float()

    def _mean_square(self, text: LayerText) -> float:
        """Of all ranks' targets, so that the learning rate means the same in every layer."""
        sums = torch.tensor([0.0, 0.0], dtype=torch.float64)
        for target_BSD in text.targets:
            sums += torch.tensor([float(target_BSD.double().square().sum()), float(target_BSD.numel())], dtype=torch.float64)
        self.ranks.average([sums])
        return max(float(sums[0] / sums[1]), 1e-30)

    def _output(self, free: dict[str, nn.Parameter], x_BSD: torch.Tensor) -> torch.Tensor:
        ffn = Ffn(**{"gate_FD": None, **free})
        return nn.functional.linear(neurons(self.gating, ffn, x_BSD), ffn.down_DF, ffn.down_bias_D)

    @torch.no_grad()
    def _error(self, free: dict[str, nn.Parameter], text: LayerText) -> float:
        """Of all ranks' held-out windows, as in FitReport."""
        sums = torch.zeros(2, dtype=torch.float64)
        for windows in torch.nonzero(text.held_out_N)[:, 0].split(text.inputs.batch):
            x_BSD, target_BSD = self._batch(text, windows)
            off = (self._output(free, x_BSD) - target_BSD).double().square().sum()
            sums += torch.stack((off, target_BSD.double().square().sum())).cpu()
        self.ranks.average([sums])
        return float(sums[0] / sums[1]) if sums[1] > 0 else 0.0

    def _whole(self, kept: dict[str, torch.Tensor], start: LayerFit) -> dict[str, torch.Tensor]:
        """With the fixed neurons behind the trained ones, in the type of the start."""
        dtype = start.tensors["down_DF"].dtype
        found = {}
        for name, tensor in kept.items():
            rest = _rest(name, getattr(self.ffn, name), self.fixed)
            found[name] = (torch.cat((tensor, rest.float()), dim=_axis(name)) if rest is not None else tensor).to(dtype)
        return found


def _axis(name: str) -> int:
    """Of the neurons."""
    return 1 if name == "down_DF" else 0


def _present(ffn: Ffn) -> Iterator[tuple[str, torch.Tensor]]:
    for item in fields(Ffn):
        tensor = getattr(ffn, item.name)
        if tensor is not None:
            yield item.name, tensor


def _free(ffn: Ffn, width: int) -> dict[str, torch.Tensor]:
    """The first `width` neurons of all tensors."""
    return {name: tensor if name == "down_bias_D" else tensor.narrow(_axis(name), 0, width) for name, tensor in _present(ffn)}


def _rest(name: str, tensor: torch.Tensor, fixed: int) -> torch.Tensor | None:
    if name == "down_bias_D" or not fixed:
        return None
    return tensor.narrow(_axis(name), tensor.shape[_axis(name)] - fixed, fixed)
