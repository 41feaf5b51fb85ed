"""What a recording is made of: one node for each operation, and for each tensor that comes from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal


class Node:
    """An operation, or a tensor from outside. Unlike a node of ``torch.fx`` it knows no graph, so it is in no cycle.

    Attributes:
        op: ``"placeholder"``, ``"call_function"`` or ``"output"``.
        name: of a placeholder.
        target: the function called.
        args: positional arguments; tensors are nodes.
        kwargs: the others.
        meta: what else is known, see :class:`~.trace.Traced`.
    """

    __slots__ = ("_sources", "args", "kwargs", "meta", "name", "op", "target")

    def __init__(
        self,
        op: Literal["placeholder", "call_function", "output"],
        target: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        name: str = "",
    ) -> None:
        self.op, self.target, self.args, self.kwargs, self.name = op, target, args, kwargs or {}, name
        self.meta: dict[str, Any] = {}
        self._sources: tuple[Node, ...] | None = None

    @property
    def all_input_nodes(self) -> tuple[Node, ...]:
        """The nodes among the arguments, each once."""
        if self._sources is None:
            self._sources = tuple(dict.fromkeys(_nodes((self.args, self.kwargs))))
        return self._sources

    def __repr__(self) -> str:
        return self.name or str(self.target)


def map_nodes(value: Any, function: Callable[[Node], Any]) -> Any:
    """``value`` with ``function(node)`` in the place of every node in its tuples, lists and dictionaries."""
    if isinstance(value, Node):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([map_nodes(entry, function) for entry in value])
    if isinstance(value, dict):
        return {key: map_nodes(entry, function) for key, entry in value.items()}
    return value


def overwritten(node: Node) -> tuple[Node, ...]:
    """The nodes whose tensors an operation writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    written = [
        node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tuple(_nodes(written))


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _nodes(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _nodes(entry)
