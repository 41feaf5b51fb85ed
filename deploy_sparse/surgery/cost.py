"""What a network costs: parameters, and multiply-accumulates of one sample, as a whole and by weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..exporting import frozen
from ._nodes import Node
from ._outputs import tensors_of
from ._words import names
from .trace import arguments, operation


@dataclass(frozen=True)
class Cost:
    """Number of parameters, and multiply-accumulates of convolutions and matrix products for one sample."""

    parameters: int
    macs: int


def cost_of_trace(nodes: Iterable[Node], parameters: int, batch: int) -> Cost:
    """The cost of a traced network, as :func:`cost_of` has it.

    Args:
        nodes: all operations that ran, see :class:`~.trace.Traced`.
        parameters: their number.
        batch: samples in the inputs of the trace.
    """
    return Cost(parameters, sum(map(_macs, nodes)) // max(1, batch))


def _macs(node: Node) -> int:
    """Multiply-accumulates of one operation; each number of a result is a sum of products."""
    name = operation(node)[0]
    if name not in _PRODUCTS:
        return 0
    given = arguments(node)

    def shape(key: str) -> torch.Size:
        return given[key].meta["val"].shape  # type: ignore[no-any-return]

    made = node.meta["val"].numel()
    match name:
        case "linear":
            return int(made * shape("weight")[1])
        case "matmul" | "bmm" | "mm":
            return int(made * node.args[0].meta["val"].shape[-1])
        case "baddbmm":
            return int(made * shape("batch1")[-1])
        case "addmm":
            return int(made * shape("mat1")[-1])
        case "einsum":
            return _einsum_macs(str(given["equation"]), [x.meta["val"].shape for x in given["tensors"]])
        case "scaled_dot_product_attention":
            query, key = shape("query"), shape("key")
            return int(query.numel() * key[-2] + made * key[-2])
        case _ if "transpose" in name:
            return int(shape("input").numel() * shape("weight")[1:].numel())
        case _:
            return int(made * shape("weight")[1:].numel())


_PRODUCTS = names(
    "linear matmul bmm mm baddbmm addmm einsum scaled_dot_product_attention conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d"
)


def _einsum_macs(equation: str, shapes: list[torch.Size]) -> int:
    """The size of the index space; a broadcast ellipsis counts once."""
    sizes: dict[str, int] = {}
    rest = torch.Size()
    for axes, shape in zip(equation.replace(" ", "").partition("->")[0].split(","), shapes, strict=True):
        before, dots, after = axes.partition("...")
        hidden = len(shape) - len(before) - len(after)
        sizes |= dict(zip(before, shape, strict=False))
        sizes |= dict(zip(after, shape[len(shape) - len(after) :], strict=True))
        rest = max(rest, shape[len(before) : len(before) + hidden], key=lambda s: s.numel()) if dots else rest
    return int(torch.Size(sizes.values()).numel() * rest.numel()) if len(shapes) > 1 else 0


@torch.no_grad()
def cost_of(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Cost, list[torch.Size]]:
    """Run ``module`` once; its cost, and the shapes of its outputs.

    Args:
        module: in evaluation mode.
        inputs: positional inputs; axis 0 of the first one is the batch.
    """
    with _every_operator(), frozen(module), FlopCounterMode(display=False) as counter:
        outputs = module(*_copies(inputs))
    parameters = sum(p.numel() for p in module.parameters())
    shapes = [y.shape for y in tensors_of(outputs)]
    return Cost(parameters, counter.get_total_flops() // (2 * _batch(inputs))), shapes


@torch.no_grad()
def layer_macs(module: torch.nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Run ``module`` once; the dense multiply-accumulates of one sample by the weight they multiply with.

    Every convolution (grouped and transposed ones too) and Linear layer has an entry, 0 where it is not called; so has
    any other parameter that a convolution or matrix product reads. Calls of one weight add up, also where layers share
    it. What :func:`cost_of` counts besides are products of two activations, as in attention.

    Args:
        module: in evaluation mode; the meta device is enough.
        inputs: positional inputs; axis 0 of the first one is the batch.

    Returns:
        by parameter name, as :meth:`torch.nn.Module.named_parameters` has it.
    """
    weights = {name: weight for name, weight in module.named_parameters() if weight.dim() > 1}
    layers = (torch.nn.modules.conv._ConvNd, torch.nn.Linear)
    own = {id(part.weight) for part in module.modules() if isinstance(part, layers)}
    with _every_operator(), _Products(weights) as products:
        module(*_copies(inputs))
    found = {name: products.macs.get(name, 0) // _batch(inputs) for name in weights}
    return {name: macs for name, macs in found.items() if macs or id(weights[name]) in own}


@contextmanager
def _every_operator() -> Iterator[None]:
    """Attention as separate products; its fused inference kernel counts as nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the multiply-accumulates of every operator that reads one of the weights, by the weight's name."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(weight): name for name, weight in weights.items()}
        self.macs: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None and (read := [name for arg in args if (name := self._name(arg)) is not None]):
            self.macs[read[-1]] = self.macs.get(read[-1], 0) + count(*args, **(kwargs or {}), out_val=result) // 2
        return result

    def _name(self, argument: Any) -> str | None:
        """The weight that an operator's argument is, or is a view of, as Linear's transposed weight."""
        if not isinstance(argument, torch.Tensor):
            return None
        return self.names.get(id(argument)) or self.names.get(id(argument._base))


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs, safe from a network that writes into them."""
    return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)


def _batch(inputs: tuple[Any, ...]) -> int:
    return max(1, int(inputs[0].shape[0]))
