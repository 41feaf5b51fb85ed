"""What differs between runtimes in building an engine: what it is made from, what compiles it, into which files."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BuildError
from .entry import ONNX_FILE, PLAN_FILE, PROGRAM_FILE
from .float_formats import advised, check_graph, check_network, precision_of
from .onnx.file import OnnxFile, float_types, parity_as_json, parse_graph
from .precision.building import is_lowering
from .source import module_of, onnx_of, payload_of
from .target import Target
from .watch import Stopped, Watch

if TYPE_CHECKING:
    from .pytorch.build import TorchProgram
    from .torch_trt.build import TorchTrtSource

    Source = OnnxFile | TorchProgram | TorchTrtSource


@dataclass(frozen=True)
class Maker:
    """What compiles: the runtime's version, and the GPU when the result is tied to it."""

    version: str
    gpu: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Built:
    """A compiled engine.

    Attributes:
        payload: its files.
        precision: what it computes in.
        read_from: where that was read.
        facts: what else the manifest says of it.
    """

    payload: dict[str, bytes | memoryview]
    precision: str
    read_from: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """One way to build engines."""

    def require(self, target: Target) -> None:
        """Check that this machine can build for the target; MissingDependencyError or BuildError where it cannot."""

    def maker(self, target: Target) -> Maker:
        """What compiles here."""

    def source(self, subject: Any, example_inputs: Any, target: Target, scratch: Path) -> tuple[Source, bytes]:
        """What the engine is made from, and its bytes; files may be written to ``scratch``."""

    def compile(self, source: Source, data: bytes, target: Target, watch: Watch) -> Built:
        """The engine, checked to be of the target's precision; BuildError where it is not, or does not compile."""


def backend_of(target: Target) -> Backend:
    """The way engines of this target are built."""
    return _BACKENDS[target.runtime]


class _FromOnnx(ABC):
    """What builds from an ONNX graph have in common."""

    def source(self, subject: Any, example_inputs: Any, target: Target, scratch: Path) -> tuple[Source, bytes]:
        found = onnx_of(subject, example_inputs, scratch / ONNX_FILE)
        return found, found.read()

    def compile(self, source: Source, data: bytes, target: Target, watch: Watch) -> Built:
        assert isinstance(source, OnnxFile)
        model = parse_graph(source.path, data)
        types = float_types(model)
        check_graph(model, types, target)
        try:
            return self._compiled(source, data, types, target, watch)
        except Stopped:
            raise  # no other precision would help
        except BuildError as problem:
            raise advised(problem, target) from problem

    @abstractmethod
    def _compiled(self, source: OnnxFile, data: bytes, types: frozenset[str], target: Target, watch: Watch) -> Built:
        """What this runtime makes of a graph whose types ``types`` are those of the target's precision."""


class _OnnxRuntime(_FromOnnx):
    def require(self, target: Target) -> None:
        """Of the library nothing: it is a dependency of this package."""
        if target.precision == "bf16":
            raise BuildError(
                f"target {target.name!r} is in bf16, for which ONNX Runtime has no kernels on the CPU",
                expected="fp32, fp16 or int8 with ONNX Runtime",
                fix="build in fp32, fp16 or int8, or in bf16 for TensorRT or torch",
            )

    def maker(self, target: Target) -> Maker:
        from .onnx import runtime as ort

        return Maker(ort.VERSION)

    def _compiled(self, source: OnnxFile, data: bytes, types: frozenset[str], target: Target, watch: Watch) -> Built:
        from .onnx.runtime import OrtSession

        folder = source.path.parent if source.weights else None
        try:
            OrtSession(data, target.threads, folder=folder).close()  # refuses operators it does not have
        except BuildError as problem:
            raise _with_node(problem, data) from problem
        if is_lowering(target):
            return Built(payload_of(source, data), target.precision, _LAYERS)
        return Built(payload_of(source, data), precision_of(types), "the ONNX graph, every tensor")


class _TensorRT(_FromOnnx):
    def require(self, target: Target) -> None:
        from .trt.bindings import builder_library

        builder_library(target)

    def maker(self, target: Target) -> Maker:
        from .trt.bindings import library

        version = str(library(target.runtime).__version__)
        return Maker(version, _this_gpu() if target.runtime == "tensorrt" else None)  # RTX compiles for no one GPU

    def _compiled(self, source: OnnxFile, data: bytes, types: frozenset[str], target: Target, watch: Watch) -> Built:
        from .trt.bindings import compile_onnx

        path = source.path if source.weights else None
        compiled = compile_onnx(data, target, source.inputs, watch=watch, path=path)
        check_network(compiled.float_types, types, target)
        payload = {**payload_of(source, data), PLAN_FILE: compiled.plan}
        network = "the parsed, strongly typed network, every layer output"
        if is_lowering(target):
            return Built(payload, target.precision, f"{_LAYERS}; floating-point types: {network}")
        return Built(payload, precision_of(compiled.float_types), network)


class _Torch:
    def require(self, target: Target) -> None:
        """Nothing: a program is exported on the CPU."""

    def maker(self, target: Target) -> Maker:
        from .pytorch.build import VERSION

        return Maker(VERSION)

    def source(self, subject: Any, example_inputs: Any, target: Target, scratch: Path) -> tuple[Source, bytes]:
        module, inputs = module_of(subject, example_inputs)
        from .pytorch.build import torch_program

        program = torch_program(module, inputs, target)
        return program, program.data

    def compile(self, source: Source, data: bytes, target: Target, watch: Watch) -> Built:
        from .pytorch.build import TorchProgram

        assert isinstance(source, TorchProgram)
        border = "" if target.precision == "fp32" else " between its float32 inputs and outputs"
        return Built({PROGRAM_FILE: data}, precision_of(source.float_types), f"the torch program, every tensor{border}")


class _TorchTensorRT:
    def require(self, target: Target) -> None:
        from .torch_trt import bindings as torch_trt_bindings

        torch_trt_bindings.builder_library(target)

    def maker(self, target: Target) -> Maker:
        from .torch_trt import bindings as torch_trt_bindings

        return Maker(torch_trt_bindings.version(), _this_gpu())

    def source(self, subject: Any, example_inputs: Any, target: Target, scratch: Path) -> tuple[Source, bytes]:
        module, inputs = module_of(subject, example_inputs)
        from .torch_trt.build import torch_trt_source

        traced = torch_trt_source(module, inputs, target)
        return traced, traced.data

    def compile(self, source: Source, data: bytes, target: Target, watch: Watch) -> Built:
        from .torch_trt.build import READ_FROM, TorchTrtSource, compile_program

        assert isinstance(source, TorchTrtSource)
        made = compile_program(source, target, watch=watch)
        facts = {"parity": parity_as_json(made.parity), "partition": made.partition}
        return Built({PROGRAM_FILE: made.data}, made.precision, READ_FROM, facts)


def _with_node(problem: BuildError, graph: bytes) -> BuildError:
    """The same problem with the node that needs the operator which ONNX Runtime does not know."""
    found = re.search(r"([\w.]*):(\w+)\(-?\d+\) is not a registered function/op", problem.given)
    if found is None:
        return problem
    from .onnx.nodes import place_of

    given = f"{problem.given}; {place_of(graph, found[1], found[2])} needs it"
    return BuildError(given, expected=problem.expected, fix=problem.fix)


def _this_gpu() -> dict[str, str] | None:
    from .trt import bindings as trt_bindings

    gpu = trt_bindings.local_gpu()
    return {"name": gpu.name, "capability": gpu.capability} if gpu else None


_LAYERS = "the ONNX graph, every convolution and matrix product"
_BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": _OnnxRuntime(),
    "tensorrt": _TensorRT(),
    "tensorrt-rtx": _TensorRT(),
    "torch": _Torch(),
    "torch-tensorrt": _TorchTensorRT(),
}
