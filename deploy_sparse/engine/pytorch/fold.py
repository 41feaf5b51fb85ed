"""BatchNorm folded into the convolution before it, on the graph of a torch program."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .graph import arguments, constant

_ATEN = torch.ops.aten


def fold_batchnorm_(module: GraphModule) -> int:
    """Give convolutions the scale and shift of the BatchNorm that alone reads them; returns how many.

    Computed in float64 and rounded once to the weight's type.
    """
    graph, count = module.graph, 0
    for node in graph.find_nodes(op="call_function", target=_ATEN.batch_norm.default):
        source = node.args[0]
        if not isinstance(source, Node) or source.target is not _ATEN.conv2d.default or len(source.users) > 1:
            continue
        norm, convolution = arguments(node), arguments(source)
        if norm["training"] or norm["running_mean"] is None:
            continue
        names = ("weight", "bias", "running_mean", "running_var")
        given = {name: norm[name] for name in names} | {"conv": convolution["weight"], "conv_bias": convolution["bias"]}
        found = {name: constant(module, each) for name, each in given.items() if each is not None}
        if any(tensor is None for tensor in found.values()):
            continue
        weight, bias = _folded({name: x for name, x in found.items() if x is not None}, float(norm["eps"]))
        made: dict[str, Any] = {}
        for name, tensor in (("weight", weight), ("bias", bias)):
            held = f"_folded_{count}_{name}"
            module.register_buffer(held, tensor)
            with graph.inserting_before(source):
                made[name] = graph.get_attr(held)
                made[name].meta["val"] = tensor
        source.args = tuple({**convolution, **made}.values())
        source.kwargs = {}
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        count += 1
    module.recompile()
    return count


def _folded(found: dict[str, torch.Tensor], eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = {name: x.detach().double() for name, x in found.items()}
    scale = (wide["running_var"] + eps).rsqrt()
    if "weight" in wide:
        scale = scale * wide["weight"]
    shift = (wide.get("conv_bias", torch.zeros_like(scale)) - wide["running_mean"]) * scale
    if "bias" in wide:
        shift = shift + wide["bias"]
    kernel = found["conv"]
    weight = (wide["conv"] * scale.view(-1, 1, 1, 1)).to(kernel.dtype)
    order = torch.channels_last if kernel.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return weight.contiguous(memory_format=order), shift.to(kernel.dtype)
