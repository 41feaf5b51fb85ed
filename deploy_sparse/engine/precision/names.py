"""Which nodes a pattern of a target's ``exclude`` means: node names, or paths of modules, as their weights tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import onnx

from ...errors import BuildError, nearest
from .graph import consumers


def names_of(graph: onnx.GraphProto) -> dict[str, frozenset[str]]:
    """What each node may be called, by its name: that name, and the paths of the module that its weights are from.

    A weight ``layer1.0.conv.weight`` puts its node under ``layer1``, ``layer1.0`` and ``layer1.0.conv``. A matrix
    product is under the paths of the bias that is added to it, too: exporters transpose its weight and rename it.
    """
    weights = {tensor.name for tensor in graph.initializer}
    readers = consumers(graph)
    found = {}
    for node in graph.node:
        paths = _paths(node, weights)
        if (
            node.op_type == "MatMul"
            and len(after := readers.get(node.output[0], [])) == 1
            and after[0].op_type == "Add"
        ):
            paths |= _paths(after[0], weights)
        found[node.name] = frozenset(paths | {node.name})
    return found


def matching(names: Mapping[str, frozenset[str]], patterns: Sequence[str]) -> frozenset[str]:
    """Names of the nodes that a pattern means; ``*``, ``?`` and ``[…]`` as in a shell, ``*`` matches dots too.

    Raises:
        BuildError: a pattern means none.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {node for node, called in names.items() if any(fnmatchcase(name, pattern) for name in called)}
        if not hits:
            known = sorted({name for called in names.values() for name in called})
            raise BuildError(
                f"exclude has {pattern!r}, which no layer of the graph is called",
                expected=f"a node's name or a module's path, such as {', '.join(known[:4])}; * stands for anything",
                fix=f"{nearest(pattern, known)}deploy-sparse inspect shows the names",
            )
        found |= hits
    return frozenset(found)


def _paths(node: onnx.NodeProto, weights: set[str]) -> set[str]:
    """All of ``a``, ``a.b``… that lead to a weight of this node."""
    found = set()
    for name in node.input:
        parts = name.split(".") if name in weights else []
        found |= {".".join(parts[:end]) for end in range(1, len(parts))}
    return found
