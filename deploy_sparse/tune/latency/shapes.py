"""The layers of a network whose channels can be counted, and what else decides how long one takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ...errors import ConfigError, SurgeryError

Kind = Literal["conv", "depthwise", "linear"]
Pair = tuple[int, int]


@dataclass(frozen=True)
class LayerShape:
    """Everything that decides a layer's latency but the target and the batch. Equal shapes take equally long.

    Attributes:
        kind: ``"depthwise"`` is a convolution with one input channel in each group.
        c_in, c_out: channels, or features of a linear layer.
        kernel, stride, padding, dilation: (height, width); a 1-D convolution has height 1. Of linear layers 1 and 0.
        groups: 1 of linear layers; the channels of a depthwise one.
        height, width: of the input; 1 for linear layers.
        tokens: positions of one sample that a linear layer is applied to; 1 for convolutions.
        bias: whether it adds one.
    """

    kind: Kind
    c_in: int
    c_out: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    height: int = 1
    width: int = 1
    tokens: int = 1
    bias: bool = True

    @property
    def output(self) -> Pair:
        """Height and width of the output."""
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        high, wide = ((size + 2 * pad - gap * (taps - 1) - 1) // step + 1 for size, taps, step, pad, gap in sizes)
        return high, wide

    @property
    def weights(self) -> int:
        """Numbers in its weight."""
        return self.c_out * (self.c_in // self.groups) * math.prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.weights * math.prod(self.output) * self.tokens

    @property
    def one_count(self) -> bool:
        """Whether one count says all: a depthwise layer's output channels follow its input channels."""
        return self.kind == "depthwise"

    def with_counts(self, c_in: int, c_out: int) -> LayerShape:
        """The same layer with other channel counts; of a depthwise one ``c_in`` decides."""
        if self.one_count:
            return replace(self, c_in=c_in, c_out=c_in * (self.c_out // self.c_in), groups=c_in)
        return replace(self, c_in=c_in, c_out=c_out)

    def as_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in _FIELDS}

    def __str__(self) -> str:
        """``conv 3x3 64->128 @56x56``."""
        counts = f"{self.c_in}->{self.c_out}"
        if self.kind == "linear":
            return f"linear {counts}" + (f" x{self.tokens}" if self.tokens > 1 else "")
        grouped = f" groups {self.groups}" if self.kind == "conv" and self.groups > 1 else ""
        stride = f" stride {_pair(self.stride)}" if self.stride != (1, 1) else ""
        dilation = f" dilation {_pair(self.dilation)}" if self.dilation != (1, 1) else ""
        taps = "x".join(map(str, self.kernel))
        return f"{self.kind} {taps} {counts} @{self.height}x{self.width}{stride}{dilation}{grouped}"


_FIELDS = tuple(LayerShape.__dataclass_fields__)


def shape_from_json(value: Mapping[str, Any]) -> LayerShape:
    """What :meth:`LayerShape.as_json` wrote.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    if value["kind"] not in get_args(Kind):
        raise ValueError(f"unknown kind of layer {value['kind']!r}")
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
    return LayerShape(**fields)


def shapes_of(network: nn.Module, example_inputs: Any) -> dict[str, LayerShape]:
    """The convolutions (1-D and 2-D) and linear layers that a network runs, by module path, in order of running.

    A layer that runs several times, or whose input is no batch of a fixed size, is left out: its time stays in the rest
    of the network.

    Args:
        network: left as it is.
        example_inputs: a tensor, or the tuple of positional inputs, batch first.

    Raises:
        SurgeryError: the network does not run on the inputs.
        ConfigError: it has no such layer.
    """
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    found: dict[str, LayerShape | None] = {}
    paths = {module: path for path, module in network.named_modules() if _counted(module)}
    batch = len(inputs[0])

    def note(module: nn.Module, given: tuple[Any, ...], _: Any) -> None:
        path = paths[module]
        found[path] = None if path in found else _shape(module, given[0], batch)

    hooks = [module.register_forward_hook(note) for module in paths]
    training = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()(*inputs)
    except Exception as problem:
        raise SurgeryError(
            f"{type(network).__name__} does not run on the example inputs ({str(problem).splitlines()[0]})",
            expected="inputs of the shape and type that the network takes, batch first",
            fix="give for example torch.randn(2, 3, 224, 224)",
        ) from problem
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    layers = {path: shape for path, shape in found.items() if shape is not None}
    if not layers:
        raise ConfigError(
            f"{type(network).__name__} runs no convolution or linear layer that could be timed alone",
            expected="a network with at least one Conv1d, Conv2d or Linear that runs once",
            fix="check that this is the network you mean",
        )
    return layers


def _counted(module: nn.Module) -> bool:
    """Layers of torch's own and their subclasses that compute the same."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)


def _shape(module: nn.Module, x: torch.Tensor, batch: int) -> LayerShape | None:
    if x.dim() < 2 or len(x) % batch:
        return None
    samples = len(x) // batch  # more than one where patches or frames were folded into the batch
    if isinstance(module, nn.Linear):
        tokens = samples * math.prod(x.shape[1:-1])
        return LayerShape(
            "linear", module.in_features, module.out_features, tokens=tokens, bias=module.bias is not None
        )
    layer = cast(_ConvNd, module)
    if samples != 1 or x.dim() != len(layer.kernel_size) + 2:
        return None
    padding = _padding(layer)
    height, width = _both(x.shape[2:], 1)
    if layer.padding_mode != "zeros":  # padded by an operator of its own
        (height, width), padding = (height + 2 * padding[0], width + 2 * padding[1]), (0, 0)
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels
    return LayerShape(
        "depthwise" if depthwise else "conv",
        layer.in_channels,
        layer.out_channels,
        _both(layer.kernel_size, 1),
        _both(layer.stride, 1),
        padding,
        _both(layer.dilation, 1),
        layer.groups,
        height,
        width,
        bias=True,  # a folded norm brings one
    )


def _padding(layer: _ConvNd) -> Pair:
    """Symmetric padding; of ``"same"`` with an even kernel half of what both sides have, rounded up."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        spans = (gap * (taps - 1) for gap, taps in zip(layer.dilation, layer.kernel_size, strict=True))
        return _both([(span + 1) // 2 for span in spans], 0)
    return _both(cast("tuple[int, ...]", layer.padding), 0)


def _both(values: Any, first: int) -> Pair:
    """(height, width); a 1-D layer has ``first`` for its height."""
    given = tuple(int(value) for value in values)
    return (first, given[0]) if len(given) == 1 else (given[0], given[1])


def _pair(values: Pair) -> str:
    return str(values[0]) if values[0] == values[1] else "x".join(map(str, values))
