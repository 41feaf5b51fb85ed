"""Running a program of which TensorRT runs parts: those with torch-tensorrt's runtime, the others with PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import torch
from torch.export.passes import move_to_device_pass

from ...exporting import quiet
from ...programs.program import read_bytes
from ..pytorch.graph import writes_inputs
from ..pytorch.session import _GPU_LOCK, TorchSession, _forward
from ..target import Target
from . import bindings as torch_trt_bindings
from .program import with_engines


class TorchTrtSession(TorchSession):
    """A program with TensorRT engines ready to run, on a GPU.

    Calls behave as those of :class:`TorchSession` on a GPU: any thread, one at a time. Nothing of the file is
    unpickled: it is vetted as any program, and its engines are made from their plans.

    Raises:
        ArtifactError: anything but a program of PyTorch's own operators and engines, or of a newer PyTorch.
        EngineError: it does not fit the GPU, or TensorRT does not take a plan.
        MissingDependencyError: no torch-tensorrt that loads.
    """

    def __init__(
        self, data: bytes, target: Target, inputs: Sequence[str], outputs: Sequence[str], *, where: str, rebuild: str
    ) -> None:
        program = read_bytes(data, where, remake=rebuild)
        self._target, self._inputs, self._outputs, self._rebuild = target, tuple(inputs), tuple(outputs), rebuild
        self._on_gpu = torch_trt_bindings.DEVICE == "cuda"
        self._lock = _GPU_LOCK if self._on_gpu else threading.Lock()
        self._stream = torch.cuda.Stream() if self._on_gpu else None  # type: ignore[no-untyped-call]
        with self._explained("loading"), quiet():
            program = move_to_device_pass(program, torch_trt_bindings.DEVICE)
            self._module = with_engines(
                program, partial(torch_trt_bindings.engine_module, target=target)
            ).requires_grad_(False)
            if self._on_gpu:
                torch.cuda.synchronize()  # what follows runs on the session's own stream
        self.blocks = ()
        self._forward = _forward(self._module, copies=writes_inputs(self._module.graph))
        self._own = {x.untyped_storage().data_ptr() for x in (*self._module.parameters(), *self._module.buffers())}

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor on the GPU; TensorRT reads contiguous ones, and chooses other orders within an engine itself."""
        return x.to(torch_trt_bindings.DEVICE).contiguous()
