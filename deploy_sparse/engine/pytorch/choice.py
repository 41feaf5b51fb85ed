"""Which convolutions of a torch program run in the block kernel: where it is faster on this GPU, or all that can."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from ...errors import MissingDependencyError
from ..blocks.kernel import MOST, triton_kernel
from ..target import Target
from .blocks import BlockLayer, Site, find_sites, replaced

_MARGIN = 0.02  # what the kernel must gain
_PASSES, _ROUNDS, _WARM_UP = 20, 15, 3
_SEED = 20220716
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest output
_TOLERANCE_TF32 = 5e-3

Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BlockChoice:
    """One convolution over blocks.

    Attributes:
        layer: its result's name in the program.
        kernel: whether the block kernel runs it.
        reason: why, in words.
        native_ms, kernel_ms: of one pass at the batch tuned for, where both were timed.
    """

    layer: str
    kernel: bool
    reason: str
    native_ms: float | None = None
    kernel_ms: float | None = None

    def __str__(self) -> str:
        return f"{self.layer}: {'block kernel' if self.kernel else 'native form'}, {self.reason}"


def with_block_kernels(module: GraphModule, target: Target) -> tuple[GraphModule, tuple[BlockChoice, ...]]:
    """The module with its blocks in the kernel where ``target.block_kernel`` says so, and the choices.

    ``"timed"`` compares both forms on random activations of the batch that the target tunes for, each kind of layer
    once, and takes the kernel where it is at least 2 % faster and computes the same; on the CPU it takes the native
    form. ``"always"`` takes the kernel, on the CPU in Triton's interpreter only.

    Args:
        module: on the target's device, with its BatchNorms folded. It may be changed.
        target: its options; settings of TF32 must be in force.

    Raises:
        MissingDependencyError: ``"always"`` on a GPU without Triton.
    """
    wanted, on_gpu = target.block_kernel, target.device == "cuda"
    if wanted == "never" or (wanted == "timed" and not on_gpu):
        return module, ()
    sites = find_sites(module)
    if not sites:
        return module, ()
    if (missing := _missing(on_gpu, wanted)) is not None:
        return module, tuple(BlockChoice(site.name, False, missing) for site in sites)
    chosen: list[tuple[Site, BlockLayer]] = []
    choices: list[BlockChoice] = []
    known: dict[Any, BlockChoice] = {}
    for site in sites:
        layer = BlockLayer(site.layout(), relu=site.relu, tf32=target.tf32)
        key = (layer.layout.shape, site.relu, site.weight.dtype, site.input_shape(target.batch.opt), len(site.nodes))
        if key not in known:
            known[key] = _choice(module, site, layer, target)
        found = known[key]
        choices.append(BlockChoice(site.name, found.kernel, found.reason, found.native_ms, found.kernel_ms))
        if found.kernel:
            chosen.append((site, layer))
    return (replaced(module, chosen) if chosen else module), tuple(choices)


def _missing(on_gpu: bool, wanted: str) -> str | None:
    """Why the kernel cannot run at all, or None."""
    try:
        interpreted = triton_kernel().INTERPRETED
    except MissingDependencyError as problem:
        if on_gpu and wanted == "always":
            raise
        return problem.given
    return None if on_gpu or interpreted else "the kernel runs on a GPU, or in Triton's interpreter"


def _choice(module: GraphModule, site: Site, layer: BlockLayer, target: Target) -> BlockChoice:
    _, _, height, width = site.input_shape(1)
    pixels = layer.layout.shape.scalars(target.batch.max, height, width)[0]
    if max(pixels, layer.layout.shape.in_channels * height * width) >= MOST:
        return BlockChoice(site.name, False, "the largest batch is too large for the kernel's indices")
    if target.block_kernel == "always":
        return BlockChoice(site.name, True, "as the target asks")
    try:
        return _timed(site, site.native(module), layer, target)
    except Exception as problem:  # a compiler's, or a launch that needs more than this GPU has
        lines = str(problem).strip().splitlines()
        reason = f"the kernel does not run here: {lines[0][:200] if lines else type(problem).__name__}"
        return BlockChoice(site.name, False, reason)


def _timed(site: Site, native: Call, layer: Call, target: Target) -> BlockChoice:
    device, dtype = site.weight.device, site.weight.dtype
    generator = torch.Generator(device).manual_seed(_SEED)
    x = torch.randn(site.input_shape(target.batch.opt), generator=generator, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected, actual = native(x).float(), layer(x).float()
        error = float((actual - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
        if not error <= (_TOLERANCE_TF32 if target.tf32 else _TOLERANCE[dtype]):
            return BlockChoice(site.name, False, f"the kernel is off by {error:.1e} of the largest output")
        native_ms, kernel_ms = _medians((native, layer), x, graphs=target.cuda_graph)
    faster = kernel_ms < native_ms * (1 - _MARGIN)
    reason = f"{kernel_ms:.4f} ms in the kernel, {native_ms:.4f} ms in the native form"
    return BlockChoice(site.name, faster, reason, native_ms, kernel_ms)


def _medians(calls: tuple[Call, ...], x: torch.Tensor, *, graphs: bool) -> list[float]:
    """ms of one pass of each, measured in turns on the current stream."""
    bursts = [_burst(call, x, graphs) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for burst, found in zip(bursts, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            burst()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / _PASSES)
    return [statistics.median(found) for found in times]


def _burst(call: Call, x: torch.Tensor, graphs: bool) -> Callable[[], None]:
    """Many passes at once, launched as the engine's own will be."""

    def passes() -> None:
        for _ in range(_PASSES):
            call(x)

    for _ in range(_WARM_UP):
        call(x)
    torch.cuda.current_stream().synchronize()
    if not graphs:
        return passes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        passes()
    return graph.replay
