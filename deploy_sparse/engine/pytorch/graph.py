"""A torch program as a module that takes and returns plain tensors: no containers, no checks on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node, map_arg
from torch.fx.graph import CodeGen

_ATEN = torch.ops.aten
_MAY_ALIAS = {  # operators that may return their input, or a view of it, and whose schema does not say so
    *("reshape", "flatten", "unflatten", "contiguous", "to", "type_as", "view_as", "reshape_as", "dropout"),
    *("feature_dropout", "alpha_dropout", "narrow", "chunk", "tensor_split", "swapaxes", "movedim", "expand_as"),
    *("atleast_1d", "atleast_2d", "atleast_3d", "squeeze", "ravel", "pad"),
    *("getitem", "broadcast_to", "moveaxis", "swapdims", "positive"),
}


def flat_module(program: ExportedProgram) -> GraphModule:
    """The program as a module from input tensors to the tuple of output tensors, both in the order of their names.

    What the program's own module checks of shapes at each call is left to the caller. Keep the program's module for
    anything else than inference.
    """
    module = program.module()
    graph = module.graph
    graph.set_codegen(CodeGen())
    return GraphModule(module, graph)


def call_flat(module: GraphModule, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The output tensors in order."""
    return [y for y in module.forward(*inputs) if isinstance(y, torch.Tensor)]


def pruned(module: GraphModule) -> GraphModule:
    """The module without nodes and tensors that nothing reads."""
    module.graph.eliminate_dead_code()  # which leaves what writes into something
    module.graph.lint()
    return GraphModule(module, module.graph)


def mutates(node: Node) -> bool:
    """Whether the node writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def writes_inputs(graph: torch.fx.Graph) -> bool:
    """Whether the graph may write into what it is given, as ``relu_`` on an input does; graphs within it may."""
    return any(
        isinstance(node.target, HigherOrderOperator) or (mutates(node) and _is_input(node.args[0]))
        for node in graph.nodes
        if node.args
    )


def loosen_views_(module: GraphModule) -> None:
    """Let views copy where memory order asks for it, as it may when an activation is channels-last.

    Views that something writes through stay what they are, and fail there.
    """
    for node in module.graph.find_nodes(op="call_function", target=_ATEN.view.default):
        (source, *_) = node.all_input_nodes
        if not any(mutates(user) for user in (*node.users, *source.users)):
            node.target = _ATEN.reshape.default
    module.recompile()


def _is_input(value: object) -> bool:
    """Whether the value may share memory with an input of the graph."""
    while isinstance(value, Node) and value.op == "call_function":
        target = value.target
        name = getattr(target, "_opname", getattr(target, "__name__", ""))
        schema = getattr(target, "_schema", None)
        aliases = schema is not None and any(returned.alias_info is not None for returned in schema.returns)
        if not (aliases or name in _MAY_ALIAS) or not value.args:
            return False
        value = value.args[0]
    return isinstance(value, Node) and value.op == "placeholder"


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of a call of an operator by name, in the order of its schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((entry.name for entry in schema.arguments), node.args, strict=False))
    return {
        entry.name: given.get(entry.name, node.kwargs.get(entry.name, entry.default_value))
        for entry in schema.arguments
    }


def constant(module: GraphModule, node: object) -> torch.Tensor | None:
    """The tensor that a node always has: one the module holds and nothing writes, or computed of such; else None."""
    if not isinstance(node, Node) or any(mutates(user) and user.args[0] is node for user in node.users):
        return None
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        held = getattr(module.get_submodule(path), name)
        return held if isinstance(held, torch.Tensor) else None
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or mutates(node):
        return None
    if not node.all_input_nodes or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    known = {each: constant(module, each) for each in node.all_input_nodes}
    if any(value is None for value in known.values()):
        return None
    args, kwargs = map_arg((node.args, dict(node.kwargs)), known.__getitem__)
    with torch.no_grad():
        found = target(*args, **kwargs)
    return found if isinstance(found, torch.Tensor) else None
