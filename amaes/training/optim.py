"""The optimizer, and the learning rates as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict], lr: float, weight_decay: float, amsgrad: bool
) -> torch.optim.AdamW:
    """AdamW, betas (0.9, 0.999), eps 1e-8; one group: the published runs decay norms and biases too."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, amsgrad=amsgrad, fused=True)


def warmup_cosine(step: int, base: float, warmup_steps: int, total_steps: int) -> float:
    """Pretraining's learning rate: linear warm-up from 0.001 base, then cosine to 0 at `total_steps`, 0 after it."""
    if step < warmup_steps:
        return base * (0.001 + 0.999 * step / warmup_steps)
    decay = max(1, total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * min(step - warmup_steps, decay) / decay))


def stretched_cosine(step: int, base: float, total_steps: int, stretch: float = 1.15, floor: float = 1e-9) -> float:
    """Fine-tuning's learning rate: a cosine over 1.15 times the run, so that it ends at about 4 % of `base`."""
    return floor + 0.5 * (base - floor) * (1 + math.cos(math.pi * step / (stretch * total_steps)))


@dataclass(frozen=True)
class FinetuneRates:
    """Fine-tuning's learning rates: one for all weights, or one for the encoder and one for the decoder.

    Each is a `stretched_cosine` of the run's steps, and rises linearly from 0.001 of it over the first `warmup` steps
    that its weights are trained in. An encoder that is frozen for a while has the rate 0, with which `optimizer_step`
    leaves its weights and their moments as they are; its gradients are computed all the same, since DDP asks for the
    same set of them in every step. One that is frozen for good takes no gradients at all.

    Attributes:
        base: largest rate of the decoder.
        steps: of the run.
        warmup: steps.
        decoder_warmup: first steps, in which the encoder is frozen.
        encoder: largest rate of the encoder, None = `base`.
        freeze: "encoder" freezes it for good.
    """

    base: float
    steps: int
    warmup: int = 0
    decoder_warmup: int = 0
    encoder: float | None = None
    freeze: str | None = None

    def groups(self, network: torch.nn.Module) -> list[dict]:
        """What the optimizer trains, to be called before the network is wrapped: one group, or encoder and decoder."""
        if self.freeze == "encoder":
            network.encoder.requires_grad_(False)
        if self.encoder is None and not self.decoder_warmup:
            trained = network.decoder if self.freeze == "encoder" else network
            return [{"params": list(trained.parameters())}]  # all of them, as in runs of earlier versions
        named = dict(network.named_parameters())
        encoder = [p for name, p in named.items() if name.startswith("encoder.")]
        decoder = [p for name, p in named.items() if not name.startswith("encoder.")]
        return [{"params": decoder}, {"params": encoder}]

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Give the groups of `groups` their rates for a step, counted from 0; returns that of the decoder."""
        rates = [self._rate(step, self.base, 0), self._rate(step, self.encoder or self.base, self.decoder_warmup)]
        for group, rate in zip(optimizer.param_groups, rates, strict=False):  # one group: the decoder's rate for all
            group["lr"] = rate
        return rates[0]

    def remark(self) -> str:
        """What is not trained, to end a line of the log with."""
        if self.freeze:
            return f", {self.freeze} frozen"
        return f", encoder frozen for the first {self.decoder_warmup} steps" if self.decoder_warmup else ""

    def _rate(self, step: int, base: float, begin: int) -> float:
        if step < begin:
            return 0.0
        rising = min(1.0, 0.001 + 0.999 * (step - begin) / self.warmup) if self.warmup else 1.0
        return rising * stretched_cosine(step, base, self.steps)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_step(optimizer: torch.optim.Optimizer, network: torch.nn.Module, on_nan: str) -> torch.Tensor | None:
    """Update the weights; with `on_nan` "skip" not where a gradient is NaN or infinite, without waiting for the device.

    The fused optimizers read the flag on the device, as they do for loss scaling. A group whose learning rate is 0 is
    left as it is, its moments too.

    Returns:
        The flag of "skip", a scalar: 1 where the step was left out, else 0. None with `on_nan` "stop".
    """
    for group in optimizer.param_groups:
        if group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None
    skipped = None
    if on_nan == "skip":
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        skipped = (~torch.nn.utils.get_total_norm(gradients).isfinite()).float()
        optimizer.found_inf = skipped
    optimizer.step()
    return skipped
