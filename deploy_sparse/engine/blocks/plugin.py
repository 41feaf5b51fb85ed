"""The block kernel inside full TensorRT: an ahead-of-time quick-deploy plugin, whose PTX becomes part of the plan.

The plan then runs without Python and without this package. TensorRT times the plugin over several tiles (tactics) on
the GPU it builds for. The plugin is opaque to the compiler: nothing is fused across its border except the bias and ReLU
that the kernel does itself, and TensorRT reorders activations to channels-last around it. So it is a candidate to time
against the layer's native form (gathered and grouped convolutions), which stays the choice wherever this module raises.

Written to the interface of ``tensorrt.plugin`` in TensorRT 10.16 and 11.4 (experimental there; TensorRT-RTX 1.7 has
none). What is known: the registration passes the checks of 11.4's own Python sources, and the PTX is accepted by the
assembler for compute capabilities 8.0, 8.9 and 9.0. A plan with it has not been built or run by the authors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

import torch

from ...errors import BuildError, ConfigError
from ..trt import bindings as trt_bindings
from .kernel import triton_kernel
from .layout import BlockLayout, BlockShape

PLUGIN = "deploy_sparse::block_conv2d"
SHARED_BYTES = (48 << 10) - 512  # what a program gets without asking the driver for more, less the kernel's own
# By TensorRT's type: Triton's name, TensorRT's, and the channels-last format of that type.
FORMATS = {"HALF": ("fp16", "FP16", "HWC8"), "BF16": ("bf16", "BF16", "HWC8"), "FLOAT": ("fp32", "FP32", "HWC")}


def add_block_conv2d(
    network: Any, x: Any, layout: BlockLayout, *, relu: bool = False, tf32: bool = False, name: str = "block_conv2d"
) -> Any:
    """Add the convolution to a TensorRT network as a plugin layer; its output tensor.

    Args:
        network: a ``tensorrt.INetworkDefinition``.
        x: its tensor ``[batch, in_channels, height, width]``, of the layout's type; sizes may be dynamic.
        layout: on the CPU; must outlive the build, which reads its memory.
        relu: clamp the result below at zero.
        tf32: let tensor cores round float32 operands to TF32.
        name: of the layer.

    Raises:
        MissingDependencyError: TensorRT or Triton is not installed, or TensorRT has no quick-deploy plugins.
        BuildError: no NVIDIA GPU here.
        ConfigError: a layout on another device or without weights, or 16-bit channels that are no multiple of 8.
    """
    shape = layout.shape
    if layout.weight.device.type != "cpu":
        raise ConfigError(
            f"the layout is on {layout.weight.device}", expected="a layout on the CPU", fix="pass layout.to('cpu')"
        )
    if not layout.weight.numel():
        raise ConfigError(
            "no row reads anything", expected="at least one block", fix="run the layer in its native form"
        )
    if layout.weight.dtype != torch.float32 and (shape.in_channels % 8 or shape.out_channels % 8):
        raise ConfigError(
            f"{shape.in_channels} channels in and {shape.out_channels} out in a 16-bit format",
            expected="multiples of 8, which TensorRT's channels-last format pads to",
            fix="run this layer in its native form",
        )
    trt, trtp = trt_bindings.plugin_library()
    register(trt, trtp)
    if trt_bindings.local_gpu() is None:
        raise BuildError(
            "the block kernel's plugin is compiled for the GPU of this machine, which has none",
            expected="an NVIDIA GPU and its driver",
            fix="build on the machine that will run it, or run the layer in its native form",
        )
    constants = [network.add_constant(tuple(t.shape), _weights(trt, t)).get_output(0) for t in layout.tensors]
    text = json.dumps({"shape": asdict(shape), "relu": relu, "tf32": tf32}, separators=(",", ":"))
    layer = network.add_plugin(trtp.op.deploy_sparse.block_conv2d(x, *constants, settings=text), aot=True)
    layer.name = name
    return layer.get_output(0)


@cache
def register(trt: Any, trtp: Any) -> None:
    """Make ``deploy_sparse::block_conv2d`` known to TensorRT, once a process.

    Its inputs are the activations and :attr:`.BlockLayout.tensors`; its one attribute, ``settings``, is JSON.

    Args:
        trt, trtp: the modules ``tensorrt`` and ``tensorrt.plugin``.
    """
    inputs = ("x", "weight", "bias", "columns", "positions", "table")
    types = {**dict.fromkeys(inputs, trtp.TensorDesc), "settings": str}
    outputs = tuple[trtp.TensorDesc]

    def describe(x, weight, bias, columns, positions, table, settings):  # type: ignore[no-untyped-def]
        shape = _settings(settings)[0]
        batch, _, height, width = x.shape_expr
        return trtp.from_shape_expr((batch, shape.out_channels, *shape.out_size(height, width)), x.dtype)

    def tune(x, weight, bias, columns, positions, table, settings, outputs):  # type: ignore[no-untyped-def]
        shape = _settings(settings)[0]
        _, kind, form = FORMATS[x.dtype.name]
        kinds = ", ".join((kind, kind, "FP32", "INT32", "INT32", "INT32", kind))
        forms = ", ".join((form, *["LINEAR"] * 5, form))
        tactics = range(1, 1 + len(tiles(shape, x.dtype.name)))  # 0 is TensorRT's own
        return [trtp.AutoTuneCombination(kinds, forms, list(tactics))]

    def compile_kernel(x, weight, bias, columns, positions, table, settings, outputs, tactic):  # type: ignore[no-untyped-def]
        shape, options = _settings(settings)
        choices = tiles(shape, x.dtype.name)
        tile = choices[max(tactic, 1) - 1]
        element = FORMATS[x.dtype.name][0]
        ptx = triton_kernel().compile_ptx(tuple(shape.constants(**options).items()), element, tile, _capability())
        batch, _, height, width = x.shape_expr
        numbers = shape.scalars(batch, height, width)
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(numbers[0], tile.pixels) * shape.row_tiles(tile.rows)
        launch.block_x = ptx.threads
        launch.shared_mem = ptx.shared_bytes
        return ptx.name, ptx.text, launch, trtp.SymIntExprs.from_tuple([trtp.SymInt32(number) for number in numbers])

    compiled = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.register(PLUGIN)(_typed(describe, {**types, "return": trtp.TensorDesc}))
    trtp.autotune(PLUGIN)(_typed(tune, {**types, "outputs": outputs, "return": list[trtp.AutoTuneCombination]}))
    trtp.aot_impl(PLUGIN)(_typed(compile_kernel, {**types, "outputs": outputs, "tactic": int, "return": compiled}))


def tiles(shape: BlockShape, kind: str) -> tuple[Any, ...]:
    """The tiles TensorRT may time: those whose operands fit the shared memory every program gets.

    Args:
        kind: TensorRT's name of the activations' type: ``"HALF"``, ``"BF16"`` or ``"FLOAT"``.
    """
    size = 4 if kind == "FLOAT" else 2
    fitting = triton_kernel().fitting(shape.max_rows, shape.step, size)
    return tuple(tile for tile in fitting if tile.shared_bytes(size) <= SHARED_BYTES)


def _settings(text: str) -> tuple[BlockShape, dict[str, bool]]:
    values = json.loads(text)
    pairs = {name: tuple(value) for name, value in values["shape"].items() if isinstance(value, list)}
    return BlockShape(**{**values["shape"], **pairs}), {name: values[name] for name in ("relu", "tf32")}


def _capability() -> int:
    """Compute capability of this machine's GPU, for example 90."""
    gpu = trt_bindings.local_gpu()
    assert gpu is not None  # checked before the plugin enters a network
    return int(gpu.capability.removeprefix("SM"))


def _weights(trt: Any, tensor: torch.Tensor) -> Any:
    """The tensor's own memory: NumPy has no bfloat16."""
    kinds = {torch.float16: "HALF", torch.bfloat16: "BF16", torch.float32: "FLOAT", torch.int32: "INT32"}
    return trt.Weights(getattr(trt.DataType, kinds[tensor.dtype]), tensor.data_ptr(), tensor.numel())


def _typed(function: Callable[..., Any], types: dict[str, Any]) -> Callable[..., Any]:
    """TensorRT reads a plugin's interface from its annotations, which must be objects and not text."""
    function.__annotations__ = types
    return function
