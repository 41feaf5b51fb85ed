"""One run of a network, written down: every ATen call with its layer and the origins of its numbers."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ._nodes import Node, overwritten
from ._outputs import tensors_of
from ._plain_results import refuse_unfit, without_work
from ._provenance import Expr, Size, SizesRemembered, origin, settings_marked
from ._skeleton import parts_of, state_of

_READS_VALUES = frozenset({"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "unique", "_unique2"})
_FACTORIES = frozenset({"new_zeros", "new_ones", "new_full"})
_RECKONED = 1 << 22  # elements; larger constants stay without memory


class DataDependent(Exception):
    """The network looks at the values of a tensor that depends on its input."""


class ConstantWritten(Exception):
    """What depends on the input is written into a tensor that was reckoned; others may show the same memory."""


@dataclass
class Recording:
    """What :func:`record` found; see :class:`~.trace.Traced`."""

    nodes: tuple[Node, ...] = ()
    calls: list[Node] = field(default_factory=list)
    state: dict[str, str] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)


def record(
    module: nn.Module,
    inputs: tuple[Any, ...],
    *,
    real_constants: bool,
    origins: bool = True,
    into: Recording | None = None,
) -> Recording:
    """Run ``module`` once and write its operations down.

    Args:
        module: in evaluation mode; the run may change it, so it is a copy.
        inputs: positional inputs, on the device of the module.
        real_constants: reckon tensors that depend on no input, instead of only recording them.
        origins: remember where sizes come from, which takes time.
        into: filled with the calls while the network runs, for runs that may fail midway; its ``nodes`` stay empty.

    Raises:
        DataDependent: the network looks at values that depend on the input.
        ConstantWritten: it writes what depends on the input into a tensor that was reckoned.
        Exception: whatever the network's own code raises.
    """
    recorder = _Recorder(module, inputs, real_constants, into or Recording())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel hides the attention's parts
    try:
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"), ExitStack() as entered:
            entered.enter_context(_any_algorithm())
            if origins:
                entered.enter_context(settings_marked(module))
            entered.enter_context(_layers_followed(module, recorder.stack))
            if origins:
                recorder.sizes = entered.enter_context(SizesRemembered(recorder.node_of))
            entered.enter_context(recorder)
            outputs = module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        recorder.sizes = None  # each would keep the other alive
    return recorder.finish(outputs) if into is None else into


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Deterministic algorithms, as trainings ask for them, take other operations apart or refuse them."""
    asked = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warns)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        real_constants: bool,
        recording: Recording,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes, self.stack = recording.calls, [("", 0)]
        self.recording, self.real_constants = recording, real_constants
        self.light = any(x.is_meta for x in _tensors_in(inputs))
        self.sizes: SizesRemembered | None = None
        self.symbols: dict[int, Node] = {}
        self.twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.state: list[torch.Tensor] = []
        parts = parts_of(module)
        self.buffers = {id(tensor) for _, part in parts for tensor in part._buffers.values()}
        self.kept: list[torch.Tensor] = []  # so that no id is given twice
        self.names: dict[int, str] = {}  # of parameters and buffers that were not read yet
        for name, tensor in state_of(parts):
            if tensor.is_meta or isinstance(tensor, nn.Parameter) or not real_constants:
                self.state.append(tensor)
                self.names.setdefault(id(tensor), name)
        for number, tensor in enumerate(x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)):
            self._placeholder(tensor).meta["input"] = number

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as the stance has it; the wrapper that would do so is slow

    def node_of(self, tensor: torch.Tensor) -> Node | None:
        if id(tensor) in self.names:
            name = self.names.pop(id(tensor))
            self.recording.state[self._placeholder(tensor).name] = name
        return self.symbols.get(id(tensor))

    def finish(self, outputs: Any) -> Recording:
        """The recording, without the calls that nothing comes of."""
        tensors = [*tensors_of(outputs), *self._written_state()]
        results = tuple(node for x in tensors if (node := self.node_of(x)) is not None)
        output = Node("output", "output", (results,))
        used = {_storage(x) for x in tensors}
        alive: list[Node] = []
        for node in reversed(self.nodes):
            if node.target is operator.getitem:
                alive.append(node)
                continue
            if used & _memories((node, *overwritten(node))):
                alive.append(node)
                used |= _memories(node.all_input_nodes)
        kept = set(alive)
        nodes = [n for n in reversed(alive) if n.target is not operator.getitem or n.args[0] in kept]
        self.recording.nodes = (*nodes, output)
        return self.recording

    def _written_state(self) -> list[torch.Tensor]:
        """Buffers that the run changed: what goes into them counts as an output."""
        changed = {memory for node in self.nodes for memory in _memories(overwritten(node))}
        return [x for x in self.state if _storage(x) in changed]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = _tensors_in((args, kwargs))
        known = [self.node_of(x) is not None for x in tensors]
        symbolic = any(known)
        if symbolic and name in _READS_VALUES:
            raise DataDependent(f"it looks at the values of a tensor ({func}) in {_where(self.stack[-1][0])}")
        if not symbolic:
            if not self.real_constants and not tensors and self.light:
                kwargs = {**kwargs, "device": torch.device("meta")}
            else:
                if self.twins and func._schema.is_mutable:
                    self._forget_twins_(tensors)
                return func(*args, **_off_meta(kwargs))
        elif self.real_constants and name in _FACTORIES and _numel(args[1]) <= _RECKONED:
            source = torch.empty((), dtype=args[0].dtype)
            return func(source, *args[1:], **_off_meta(kwargs))
        if not all(known) or not tensors:
            if self.real_constants and func._schema.is_mutable and self._writes_a_constant(func, args, kwargs):
                raise ConstantWritten(f"{func} writes into a constant in {_where(self.stack[-1][0])}")
            meta = any(x.is_meta for x in tensors)
            args, kwargs = self._with_twins((args, kwargs), meta)
        result = None
        if func.namespace == "aten":
            refuse_unfit(name, args)
            result = without_work(name, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        self._write_down(func, args, kwargs, result)
        return result

    def _writes_a_constant(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a tensor is written that was reckoned; buffers are known by themselves."""
        written = [
            args[position] if position < len(args) else kwargs.get(argument.name)
            for position, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        return any(self.node_of(x) is None and id(x) not in self.buffers for x in _tensors_in(written))

    def _with_twins(self, value: Any, meta: bool) -> Any:
        """Constants among the arguments become placeholders; beside tensors without memory they lose theirs too."""
        if isinstance(value, torch.Tensor):
            if self.node_of(value) is not None:
                return value
            if id(value) not in self.twins:
                twin = torch.empty_like(value, device="meta") if meta else value
                node = self._placeholder(twin)
                self.recording.constants[node.name] = value.clone()  # the network may write into it later
                self.twins[id(value)] = value, twin
                if id(value) in self.buffers:
                    self.state.append(twin)
            return self.twins[id(value)][1]
        if isinstance(value, list | tuple):
            return type(value)(self._with_twins(v, meta) for v in value)
        if isinstance(value, dict):
            return {k: self._with_twins(v, meta) for k, v in value.items()}
        return value

    def _forget_twins_(self, changing: list[torch.Tensor]) -> None:
        """Constants over the same memory hold other numbers from now on."""
        memories = {_storage(x) for x in changing}
        forgotten = {key: value for key, (value, _) in self.twins.items() if _storage(value) in memories}
        self.kept += forgotten.values()
        self.twins = {key: pair for key, pair in self.twins.items() if key not in forgotten}

    def _placeholder(self, tensor: torch.Tensor) -> Node:
        node = Node("placeholder", "placeholder", name=f"tensor_{len(self.symbols)}")
        node.meta["val"] = tensor
        self._know(tensor, node)
        return node

    def _know(self, tensor: torch.Tensor, node: Node) -> None:
        self.symbols[id(tensor)] = node
        self.kept.append(tensor)

    def _write_down(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        node = Node("call_function", func, self._nodes_in(args), self._nodes_in(kwargs))
        layer, call = self.stack[-1]
        sizes = {} if self.sizes is None else _sizes(func, args, self.sizes.given)
        node.meta = {"val": result, "layer": layer, "call": call, "sizes": sizes}
        self.nodes.append(node)
        if isinstance(result, torch.Tensor):
            self._know(result, node)
        elif isinstance(result, list | tuple):
            for position, part in enumerate(result):
                if isinstance(part, torch.Tensor):
                    pick = Node("call_function", operator.getitem, (node, position))
                    pick.meta.update(val=part, layer=layer, call=call)
                    self.nodes.append(pick)
                    self._know(part, pick)

    def _nodes_in(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.symbols[id(value)]
        if isinstance(value, list | tuple):
            return type(value)(self._nodes_in(v) for v in value)
        if isinstance(value, dict):
            return {k: self._nodes_in(v) for k, v in value.items()}
        return int(value) if isinstance(value, Size) else value


def _where(layer: str) -> str:
    return f"layer {layer!r}" if layer else "the network itself"


def _sizes(func: Any, args: Any, given: list[int]) -> dict[str, tuple[Expr, ...]]:
    """The origins of an operation's numbers, by argument; numbers the Python call did not have are plain."""
    marked = [number for number in given if isinstance(number, Size)]
    if not marked:
        return {}
    found: dict[str, tuple[Expr, ...]] = {}
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if isinstance(value, int) and not isinstance(value, bool):
            found[argument.name] = (_origin_of(int(value), marked),)
        elif isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            exact = _aligned(value, given)
            found[argument.name] = tuple(map(origin, exact)) if exact else tuple(_origin_of(v, marked) for v in value)
    return found


def _aligned(value: Any, given: list[int]) -> list[int] | None:
    """The run of ``given`` that equals ``value``."""
    width = len(value)
    runs = [given[i : i + width] for i in range(len(given) - width + 1)]
    return next((run for run in runs if [int(n) for n in run] == list(value)), None)


def _origin_of(value: int, marked: list[Size]) -> Expr:
    origins = {number.expr for number in marked if int(number) == value}
    return origins.pop() if len(origins) == 1 else int(value)


def _off_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    device = kwargs.get("device")
    return (
        {**kwargs, "device": torch.device("cpu")}
        if device is not None and torch.device(device).type == "meta"
        else kwargs
    )


def _numel(shape: Any) -> int:
    total = 1
    for n in shape if isinstance(shape, list | tuple) else (shape,):
        total *= int(n)
    return total


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _memories(nodes: Sequence[Node]) -> set[int]:
    return {_storage(x) for node in nodes for x in _tensors_in(node.meta["val"])}


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if not isinstance(value, list | tuple):
        return []
    found: list[torch.Tensor] = []
    for entry in value:
        if isinstance(entry, torch.Tensor):
            found.append(entry)
        elif isinstance(entry, list | tuple | dict):
            found += _tensors_in(entry)
    return found


@contextmanager
def _layers_followed(module: nn.Module, stack: list[tuple[str, int]]) -> Iterator[None]:
    """Keep the path of the module that runs on top of ``stack``, with a number of its own for each call."""
    paths = {id(part): path for path, part in reversed(parts_of(module))}

    numbers = itertools.count(1)

    def enter(part: nn.Module, _: Any) -> None:
        stack.append((paths.get(id(part), stack[-1][0]), next(numbers)))

    def leave(part: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
