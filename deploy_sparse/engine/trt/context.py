"""An execution context of a TensorRT engine: its shapes and addresses, and buffers to run it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ...errors import EngineError
from ..cuda.runtime import Buffer, Cuda, Graph, Stream

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int32": 4, "int64": 8, "bool": 1}
"""Bytes an element takes, of the types that inputs and outputs may have."""

_ALIGNMENT = 256  # bytes; TensorRT's requirement for addresses of inputs and outputs

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Opened:
    """A deserialized engine, and what its workers need to know of it.

    Attributes:
        inputs, outputs: types by name, in the engine's order.
        failure: what TensorRT said last.
        rebuild: the command that builds the engine again.
    """

    engine: Any
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    failure: Callable[[], str]
    rebuild: str

    def new_context(self) -> Any:
        """A new execution context.

        Raises:
            EngineError: there is no memory for its activations.
        """
        context = self.engine.create_execution_context()
        if context is None:
            raise EngineError(
                f"TensorRT makes no execution context: {self.failure()}",
                expected="GPU memory for the engine's activations",
                fix="close other users of the GPU, load with fewer contexts, or build with a smaller [batch] max: "
                + self.rebuild,
            )
        return context


class Context:
    """An execution context that is told shapes and addresses when they change, and not otherwise."""

    def __init__(self, opened: Opened) -> None:
        self._context = opened.new_context()  # before the engine, as both go in this order
        self._opened = opened
        self._inputs: Shapes | None = None
        self._outputs: Shapes = {}
        self._addresses: Mapping[str, int] = {}

    def set_shapes(self, inputs: Shapes) -> Shapes:
        """Set the shapes of all inputs, and return those of the outputs.

        Raises:
            EngineError: shapes outside the profile, or outputs whose shape depends on values.
        """
        if inputs == self._inputs:
            return self._outputs
        self._inputs = None
        for name, shape in inputs.items():
            if not self._context.set_input_shape(name, shape):
                raise EngineError(
                    f"TensorRT refuses shape {shape} for input {name!r}: {self._opened.failure()}",
                    expected="a shape inside the engine's optimisation profile",
                    fix=f"change the batch, or build with another [batch] range: {self._opened.rebuild}",
                )
        if missing := self._context.infer_shapes():
            raise EngineError(
                f"TensorRT cannot infer shapes without {missing}", expected="every input bound", fix="feed every input"
            )
        outputs = {name: tuple(self._context.get_tensor_shape(name)) for name in self._opened.outputs}
        for name, shape in outputs.items():
            if min(shape, default=0) < 0:
                raise EngineError(
                    f"output {name!r} has shape {list(shape)}: it depends on the values of the inputs",
                    expected="outputs whose shapes follow from those of the inputs",
                    fix="leave operators such as NonZero or NMS out of the graph, and apply them to its outputs",
                )
        self._inputs, self._outputs = dict(inputs), outputs
        return outputs

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        """Set the addresses of all inputs and outputs; the very same mapping a second time does nothing.

        Raises:
            EngineError: an address that TensorRT refuses.
        """
        if addresses is self._addresses:
            return
        self._addresses = {}
        for name, address in addresses.items():
            if address % _ALIGNMENT or not self._context.set_tensor_address(name, address):
                raise EngineError(
                    f"TensorRT takes no address {address:#x} for {name!r}",
                    expected=f"memory aligned to {_ALIGNMENT} bytes",
                    fix="copy that tensor: tensor.clone(); a slice of one may begin anywhere",
                )
        self._addresses = addresses

    def watch(self, profiler: Any) -> None:
        """Have ``profiler``, which must outlive this, told the time of every layer; a run then waits for its end."""
        self._context.profiler = profiler
        self._context.enqueue_emits_profile = True

    def enqueue(self, stream: Stream) -> None:
        """Queue a run.

        Raises:
            EngineError: TensorRT could not start it.
        """
        if not self._context.execute_async_v3(stream.handle):
            raise EngineError(
                f"TensorRT could not start the run: {self._opened.failure()}",
                expected="a healthy GPU with free memory",
                fix=f"close other users of the GPU and run again; if it stays, build again: {self._opened.rebuild}",
            )


class Slot:
    """Buffers for inputs and outputs, and the way to run on them; with a graph, its replay.

    A captured graph is valid for shapes, addresses and the context's state at the time, so it has a context of its own.
    """

    def __init__(self, cuda: Cuda, opened: Opened, context: Context, stream: Stream) -> None:
        self._cuda, self._opened, self._context, self._stream = cuda, opened, context, stream
        self._buffers: dict[str, Buffer] = {}
        self._addresses: dict[str, int] = {}
        self._graph: Graph | None = None
        self._inputs: Shapes = {}
        self.outputs: Shapes = {}

    def fill(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Queue copies of the feeds into buffers, which grow where they are too small.

        Raises:
            EngineError: shapes that TensorRT refuses, or no memory.
        """
        self._inputs = {name: feeds[name].shape for name in self._opened.inputs}
        if self._graph is None:
            self.outputs = self._context.set_shapes(self._inputs)
            self._fit()
        for name in self._inputs:
            self._cuda.copy_in(self._buffers[name], feeds[name], self._stream)

    def _fit(self) -> None:
        types, grown = {**self._opened.inputs, **self._opened.outputs}, False
        for name, shape in {**self._inputs, **self.outputs}.items():
            nbytes = prod(shape) * ITEM_SIZES[types[name]]
            held = self._buffers.get(name)
            if held is not None and held.nbytes >= nbytes:
                continue
            if held is not None:
                self._buffers.pop(name).free()
            self._buffers[name] = self._cuda.alloc(nbytes, self._stream)
            grown = True
        if grown:
            self._addresses = {name: buffer.pointer for name, buffer in self._buffers.items()}

    def enqueue(self) -> None:
        """Queue a run on the buffers."""
        if self._graph is not None:
            self._graph.launch()
            return
        self._context.set_shapes(self._inputs)
        self._context.set_addresses(self._addresses)
        self._context.enqueue(self._stream)

    def fetch(self, name: str, array: np.ndarray) -> None:
        """Queue a copy of an output."""
        self._cuda.copy_out(array, self._buffers[name], self._stream)

    def capture(self) -> None:
        """Run once, as a first run allocates and compiles; from now on replay what a second one queues."""
        self.enqueue()
        self._stream.synchronize()
        self._graph = self._stream.capture(self.enqueue)

    def close(self) -> None:
        """Free graph and buffers; twice is fine."""
        graph, self._graph = self._graph, None
        with ExitStack() as rest:
            while self._buffers:
                rest.callback(self._buffers.popitem()[1].free)
            if graph is not None:
                rest.callback(graph.free)
        for name in ("_context", "_opened"):  # who keeps a prepared run keeps no engine by it
            self.__dict__.pop(name, None)
