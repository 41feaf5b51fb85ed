"""One optimizer step: forward, backward, the method's hooks, the moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from ..sparsify.method import Method
from .average import MovingAverage
from .distributed import world
from .optimizer import make_optimizer, masked_memory, set_memory_
from .runtime import Runtime
from .schedule import FitConfig


class TrainStep:
    """A network in training: what :meth:`__call__` changes is all there is to save.

    Args:
        model: trained in place; moved to the runtime's device and layout.
        method: started here; sees the model itself, never a wrapper.
        memory: what the optimizer remembers at the start, by ``"<slot>/<parameter>"``; empty for a fresh one.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FitConfig,
        method: Method,
        runtime: Runtime,
        memory: Mapping[str, torch.Tensor],
    ) -> None:
        self.model = runtime.place_(model)
        self.config, self.method, self.runtime = config, method, runtime
        self.optimizer = make_optimizer(model, config)
        method.start_(model)
        set_memory_(model, self.optimizer, masked_memory(memory, method.masks))
        self.average = MovingAverage(model, config.ema) if config.ema else None
        self.scaler = runtime.scaler()
        self.forward = runtime.forward(model)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average where there is one, else the model."""
        return self.model if self.average is None else self.average.module

    def settle_(self, image_shape: tuple[int, ...]) -> None:
        """One backward pass that changes nothing.

        After its first one, DistributedDataParallel sums gradients in another order. It must be the same at every step,
        or a resumed training of three or more processes would end with other bits than an undisturbed one.
        """
        self.model.train()
        before = [buffer.clone() for buffer in self.model.buffers()]
        share = self.config.batch_size // world().size
        (images, _), *_ = self.runtime.batches([(torch.zeros(share, *image_shape), torch.zeros(share))])
        with self.runtime.autocast():
            logits = self.forward(images)
        logits.sum().backward()
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, step: int, lr: float) -> torch.Tensor:
        """Take optimizer step ``step`` on images ``[n, C, H, W]`` and labels ``[n]``; returns the loss, on the device.

        With fp16 a step whose gradients overflow is left out by the scaler; the method's hooks are called all the same.
        """
        for options in self.optimizer.param_groups:
            options["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with self.runtime.autocast():
            logits = self.forward(images)  # [n, classes]
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        if self.scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            self.method.after_backward_(self.model, step)
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.scaler.unscale_(self.optimizer)
            self.method.after_backward_(self.model, step)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.method.after_step_(self.model, self.optimizer, step)
        if self.average is not None:
            self.average.update_(self.model)
        return loss.detach()
