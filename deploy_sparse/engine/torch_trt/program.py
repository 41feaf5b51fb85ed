"""A program of which TensorRT runs parts, as a plain ``.pt2`` file: each part is one operator, its plan a tensor.

``torch_tensorrt.save`` pickles engines, and the settings within them, and its ``load`` unpickles both; neither is used
here. The serialized engine is a constant of bytes instead, and an operator of this package stands where it runs, with
the names, shapes and types that it needs. The operator itself computes nothing: :func:`with_engines` puts engines in
its places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule, Node
from torch.fx.experimental import _config as symbols_config
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ...errors import BuildError, EngineError
from ...exporting import quiet
from ...programs.program import _written
from ...programs.vetting import objection
from ..pytorch.graph import arguments, constant, flat_module, pruned
from ..target import Target
from ..tensors import TensorSpec

_LIBRARY: Any = torch.library.Library("deploy_sparse", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "tensorrt_part(Tensor[] inputs, Tensor plan, str[] taken, str[] given, SymInt[] extents, int[] ranks,"
    " str[] dtypes) -> Tensor[]"
)
PART: Any = torch.ops.deploy_sparse.tensorrt_part.default
_NO_WORK = ("sym_", "_assert", "scalar_tensor")  # operators on sizes, and checks

MakeEngine = Callable[[bytes, list[str], list[str], str], nn.Module]
"""From a plan, names of its inputs and of its outputs, and its own, to what runs it."""


@torch.library.register_fake("deploy_sparse::tensorrt_part", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _outputs_of(
    inputs: Sequence[torch.Tensor],
    plan: torch.Tensor,
    taken: Sequence[str],
    given: Sequence[str],
    extents: Sequence[int],
    ranks: Sequence[int],
    dtypes: Sequence[str],
) -> list[torch.Tensor]:
    """Outputs without content; ``extents`` are those of all outputs, one after another."""
    left = iter(extents)
    shapes = [[next(left) for _ in range(rank)] for rank in ranks]
    return [inputs[0].new_empty(shape, dtype=getattr(torch, name)) for shape, name in zip(shapes, dtypes, strict=True)]


@dataclass(frozen=True)
class Partition:
    """Where the operators of a compiled program run.

    Attributes:
        engines: how many TensorRT engines are in it.
        pytorch: operators left to PyTorch, and how many of each.
    """

    engines: int
    pytorch: dict[str, int]


def bounded(
    program: ExportedProgram, accepted: Sequence[TensorSpec], target: Target, device: str
) -> tuple[ExportedProgram, int]:
    """The program on a device with its batch axis in the target's range, and the batch that it will be tuned for.

    torch-tensorrt takes ranges, and what to tune for, from a program's symbols. A sample of 1 would be taken for a
    constant here and there: what is to be tuned for that, and may be larger, is tuned for 2.

    Raises:
        BuildError: the program does not take that range.
    """
    module = flat_module(move_to_device_pass(program, device)).requires_grad_(False)
    tuned_for = target.batch.opt if target.batch.min == target.batch.max else max(2, target.batch.opt)
    return _exported(module, accepted, target, tuned_for, device), tuned_for


def from_one() -> AbstractContextManager[None]:
    """Within it a symbol may begin at 1: from PyTorch's usual 2 follow wrong ranges of, say, twice the batch."""
    return symbols_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined,no-any-return]


def operators_of(module: GraphModule) -> Counter[str]:
    """Operators that compute something, over the graph and those within it."""
    targets = [node.target for part in module.modules() if isinstance(part, GraphModule) for node in part.graph.nodes]
    names = [target._opname for target in targets if isinstance(target, torch._ops.OpOverload)]
    return Counter(name for name in names if not name.startswith(_NO_WORK))


def plain_bytes(
    compiled: GraphModule, accepted: Sequence[TensorSpec], target: Target, batch: int, device: str
) -> tuple[bytes, Partition]:
    """The content of a plain ``.pt2`` file of a module that ``torch_tensorrt.dynamo.compile`` made, and its partition.

    The module's engines are taken out of it.

    Args:
        accepted: the program's inputs.
        batch: of the sample that it is exported with.

    Raises:
        BuildError: TensorRT runs nothing of it, or it holds what such a file cannot.
    """
    symbols = {
        extent.node.expr
        for node in compiled.graph.find_nodes(op="placeholder")
        for extent in getattr(node.meta.get("val"), "shape", ())
        if isinstance(extent, torch.SymInt)
    }
    found = [
        node
        for node in compiled.graph.find_nodes(op="call_module")
        if hasattr(_called(compiled, node), "serialized_engine")
    ]
    partition = Partition(len(found), dict(sorted(operators_of(compiled).items())))
    if not found:
        raise BuildError(
            f"torch-tensorrt found nothing for TensorRT in the network: all stays in PyTorch {partition.pytorch}",
            expected="operators that it converts",
            fix="take runtime torch on cuda, or replace these operators",
        )
    inputs = compiled.graph.find_nodes(op="placeholder")
    first = next(node for node, spec in zip(inputs, accepted, strict=True) if spec.batched)
    with compiled.graph.inserting_after(inputs[-1]):
        size = compiled.graph.call_function(torch.ops.aten.sym_size.int, (first, 0))
    for node in found:
        compiled.set_submodule(str(node.target), _Part(_called(compiled, node), node, symbols))
        node.args = (size, *node.args)
    compiled.recompile()
    program = move_to_device_pass(_exported(compiled, accepted, target, batch, device), "cpu")
    data = _written(program)
    if (stray := objection(data)) is not None:
        raise _unfit(f"it needs {stray}")
    return data, partition


def with_engines(program: ExportedProgram, make: MakeEngine) -> GraphModule:
    """The program, on its device, as a flat module with engines where its parts are.

    Raises:
        EngineError: a part without a plan. Others of ``make``.
    """
    module = flat_module(program)
    for index, node in enumerate(module.graph.find_nodes(op="call_function", target=PART)):
        part, name = arguments(node), f"tensorrt_{index}"
        plan = constant(module, part["plan"])
        if plan is None:
            raise EngineError(
                f"part {index} of the program has no plan", expected="a program of this toolkit", fix="build it again"
            )
        engine = make(plan.cpu().numpy().tobytes(), [*part["taken"]], [*part["given"]], name)
        module.add_submodule(name, _Listing(engine))
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.call_module(name, tuple(part["inputs"])))
        module.graph.erase_node(node)
    return pruned(module)


@dataclass(frozen=True)
class _Output:
    """An output of an engine: type, extents as integers or expressions of the batch; and its value, if it is a size."""

    dtype: str
    shape: tuple[Any, ...]
    size: Any = None

    @classmethod
    def of(cls, value: torch.Tensor | torch.SymInt, symbols: set[Any], where: str) -> Self:
        """From what it is in the compiled graph."""
        if isinstance(value, torch.SymInt):
            return cls("int64", (), _expression(value, symbols, where))
        dtype = str(value.dtype).removeprefix("torch.")
        return cls(dtype, tuple(_expression(extent, symbols, where) for extent in value.shape))


class _Part(nn.Module):
    """What stands for an engine while the program is exported: called with the batch size and the engine's inputs."""

    def __init__(self, engine: Any, node: Node, symbols: set[Any]) -> None:
        super().__init__()
        if getattr(engine, "aliased_io", None):
            raise _unfit("an engine of it writes into its inputs")
        if engine.requires_output_allocator:
            raise _unfit("an engine of it knows the shapes of its outputs only as it runs")
        if not hasattr(engine, "input_binding_names"):
            raise _unfit("this torch-tensorrt has no runtime in C++, and its other one keeps engines otherwise")
        value = node.meta.get("val")
        outputs = [value] if isinstance(value, torch.Tensor | torch.SymInt) else list(value or ())
        if not outputs or not all(isinstance(y, torch.Tensor | torch.SymInt) for y in outputs):
            raise _unfit(f"it is not known what {node.name} returns")
        self.register_buffer("plan", torch.frombuffer(bytearray(engine.serialized_engine), dtype=torch.uint8))
        self._names = list(engine.input_binding_names), list(engine.output_binding_names)
        self._outputs = [_Output.of(y, symbols, node.name) for y in outputs]
        self._symbols = symbols

    def forward(self, batch: Any, *inputs: Any) -> Any:
        """As the engine's module returns: one output, or a tuple. Sizes follow from the batch, not from the engine."""
        device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
        tensors = [
            x if isinstance(x, torch.Tensor) else torch.scalar_tensor(x, dtype=torch.int64, device=device)
            for x in inputs
        ]
        sizes = dict.fromkeys(self._symbols, batch)
        shapes = [[_at(sizes, x) for x in output.shape] for output in self._outputs]
        extents, ranks = [x for shape in shapes for x in shape], [len(shape) for shape in shapes]
        given = PART(tensors, self.plan, *self._names, extents, ranks, [output.dtype for output in self._outputs])
        outputs = [
            y if output.size is None else _at(sizes, output.size)
            for y, output in zip(given, self._outputs, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class _Listing(nn.Module):
    """An engine whose outputs are a list even if there is one, as those of the operator are."""

    def __init__(self, engine: nn.Module) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        outputs = self.engine(*inputs)
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _exported(
    module: GraphModule, accepted: Sequence[TensorSpec], target: Target, batch: int, device: str
) -> ExportedProgram:
    inputs = tuple(
        torch.zeros(spec.concrete(batch), dtype=getattr(torch, spec.dtype), device=device) for spec in accepted
    )
    smallest, largest = target.batch.min, target.batch.max
    free = None if smallest == largest else {0: Dim("batch", min=smallest, max=largest)}
    try:
        with quiet(), from_one(), torch.no_grad():
            shapes = tuple(free if spec.batched else None for spec in accepted)
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as problem:  # the exporter raises whatever its own steps do
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
        raise BuildError(
            f"the program cannot be exported for batches of {smallest} to {largest}: {lines[0][:300]}",
            expected="a network that takes every batch size of the range",
            fix="narrow [batch] of the target",
        ) from problem


def _expression(extent: Any, symbols: set[Any], where: str) -> Any:
    """A fixed extent as an integer, another one as an expression of the batch size."""
    if not isinstance(extent, torch.SymInt):
        return int(extent)
    expression = extent.node.expr
    if not expression.free_symbols <= symbols:
        raise _unfit(f"an output of {where} has an extent that does not follow from the batch")
    return int(expression) if expression.is_Integer else expression


def _at(sizes: dict[Any, Any], extent: Any) -> Any:
    """An extent, or an expression of such, at these sizes of its symbols."""
    return extent if isinstance(extent, int) else sympy_interp(PythonReferenceAnalysis, sizes, extent)


def _unfit(why: str) -> BuildError:
    return BuildError(
        f"the compiled network does not go into a file: {why}",
        expected="a program of PyTorch's own operators and TensorRT engines, whose shapes follow from the batch",
        fix="take runtime tensorrt or torch, or rewrite that part of forward",
    )


def _called(module: GraphModule, node: Node) -> nn.Module:
    return module.get_submodule(str(node.target))
