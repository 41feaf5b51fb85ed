"""From a module to a program of which TensorRT runs what it can, compiled for the GPU of this machine."""

from __future__ import annotations

import copy
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...artifact import write_bytes
from ...errors import ArtifactError, BuildError, DeploySparseError, ExportError
from ...exporting import eval_mode
from ...programs.program import read_bytes
from ..cuda.gpu import local_gpu
from ..float_formats import precision_of
from ..onnx.export import as_module, checked_inputs
from ..onnx.file import Parity
from ..parity import TOLERANCE, compare_outputs
from ..pytorch.build import TorchProgram, torch_program
from ..pytorch.session import _gpu_settings
from ..target import Target
from ..trt.bindings import _turn
from ..trt.messages import ran_out_of_memory, readable
from ..trt.timings import timing_file
from ..watch import Watch
from . import bindings as torch_trt_bindings
from .program import Partition, bounded, from_one, operators_of, plain_bytes
from .session import TorchTrtSession

log = logging.getLogger("deploy_sparse.torch_tensorrt")

READ_FROM = "the torch program, every tensor; TensorRT's networks are strongly typed"
_LOGGERS = ("torch_tensorrt", "torch_tensorrt [TensorRT Conversion Context]")
_REPORT = "torch_tensorrt.dynamo._DryRunTracker"  # tells, at its lowest level, how the graph was divided
_COUNT = re.compile(r"Number of Operators in Engine: (\d+)")


@dataclass(frozen=True)
class TorchTrtSource(TorchProgram):
    """A checked torch program, and what the compiled one is compared with.

    Attributes:
        network: the module.
        example: its inputs, one tensor per argument.
    """

    network: nn.Module = field(repr=False, compare=False)
    example: tuple[torch.Tensor, ...] = field(repr=False, compare=False)


@dataclass(frozen=True)
class CompiledProgram:
    """A program with TensorRT engines in it.

    Attributes:
        data: the content of the ``.pt2`` file.
        precision: what it computes in, as targets name it.
        partition: where operators run, as JSON: ``engines``, ``tensorrt_operators`` (None where the library does not
            tell), ``pytorch_operators``, ``pytorch`` (how many of each), and ``tuned_for_batch``.
        parity: against the float32 module on the GPU.
    """

    data: bytes
    precision: str
    partition: dict[str, Any]
    parity: Parity


def torch_trt_source(module: nn.Module | Any, example_inputs: Any, target: Target) -> TorchTrtSource:
    """Export a module in the target's precision, as :func:`torch_program` does, which also says what it raises."""
    program = torch_program(module, example_inputs, target)
    known = {entry.name: getattr(program, entry.name) for entry in fields(program)}
    network = as_module(module)
    return TorchTrtSource(**known, network=network, example=checked_inputs(network, example_inputs))


def compile_program(source: TorchTrtSource, target: Target, *, watch: Watch | None = None) -> CompiledProgram:
    """Compile a program for the GPU of this machine, and check what the file holds against the module.

    Args:
        watch: is asked before and after the compilation, which tells nothing of its progress.

    Raises:
        MissingDependencyError: no torch-tensorrt that loads.
        BuildError: it does not compile, TensorRT takes nothing of it, it computes something else, too little memory, or
            stopped by ``watch``.
    """
    library = torch_trt_bindings.builder_library(target)
    watch = watch or Watch()
    with _turn(watch), watch.signals_kept():
        watch.check()
        program = read_bytes(source.data, "the program", remake="build it again")
        ready, tuned_for = bounded(program, source.inputs, target, torch_trt_bindings.DEVICE)
        with _listening() as said, _timings(target) as timings, from_one():
            try:
                compiled = library.dynamo.compile(
                    ready,
                    arg_inputs=_ranges(library, source, target, tuned_for),
                    **torch_trt_bindings.compile_options(
                        library.dynamo.compile, target, timings, operators_of(ready.graph_module).total()
                    ),
                )
            except DeploySparseError:
                raise
            except Exception as problem:  # converters raise whatever they like
                raise _failed(problem, said, target) from problem
        watch.check()
        data, partition = plain_bytes(compiled, source.inputs, target, tuned_for, torch_trt_bindings.DEVICE)
    report = _report(partition, said, tuned_for)
    log.info(
        "%d engines with %s operators; %d in PyTorch %s",
        *(report["engines"], report["tensorrt_operators"], report["pytorch_operators"], report["pytorch"]),
    )
    return CompiledProgram(data, precision_of(source.float_types), report, _parity(data, source, target))


def _ranges(library: Any, source: TorchTrtSource, target: Target, tuned_for: int) -> list[Any]:
    """The inputs as the library describes them."""
    batch, found = target.batch, []
    for spec in source.inputs:
        dtype = getattr(torch, spec.dtype)
        if batch.min == batch.max or not spec.batched:
            found.append(library.Input(shape=spec.concrete(batch.opt), dtype=dtype))
        else:
            shapes = [spec.concrete(size) for size in (batch.min, tuned_for, batch.max)]
            found.append(library.Input(min_shape=shapes[0], opt_shape=shapes[1], max_shape=shapes[2], dtype=dtype))
    return found


def _report(partition: Partition, said: list[logging.LogRecord], tuned_for: int) -> dict[str, Any]:
    counts = [int(count) for record in said if record.name == _REPORT for count in _COUNT.findall(record.getMessage())]
    return {
        "engines": partition.engines,
        "tensorrt_operators": sum(counts) if len(counts) == partition.engines else None,
        "pytorch_operators": sum(partition.pytorch.values()),
        "pytorch": partition.pytorch,
        "tuned_for_batch": tuned_for,
    }


def _parity(data: bytes, source: TorchTrtSource, target: Target) -> Parity:
    """Of the file's content, loaded again, against the float32 module on the GPU."""
    names = [spec.name for spec in source.inputs], [spec.name for spec in source.outputs]
    session = TorchTrtSession(data, target, *names, where="the compiled program", rebuild="build it again")
    try:
        network = copy.deepcopy(source.network).to(torch_trt_bindings.DEVICE).float()
        inputs = [x.detach().to(torch_trt_bindings.DEVICE) for x in source.example]
        inputs = [x.float() if x.is_floating_point() else x for x in inputs]
        batch = target.batch
        with eval_mode(network), _gpu_settings(False):
            return compare_outputs(
                network,
                session.run,
                inputs,
                source.inputs,
                tuple(dict.fromkeys((batch.opt, batch.min, batch.max))),
                runtime="torch-tensorrt",
                tolerance=TOLERANCE if target.precision == "fp32" and not target.tf32 else None,
            )
    except ExportError as problem:
        raise BuildError(
            f"the compiled network computes something else than the module: {problem.given}",
            expected=problem.expected,
            fix="build it with runtime tensorrt or torch, or in another precision",
        ) from problem
    finally:
        session.close()


@contextmanager
def _timings(target: Target) -> Iterator[str]:
    """The path of a file for kernel timings: a copy of those of this GPU and version, which a finished build replaces.

    The library writes its file in place. Of builds at one time the last one's timings are kept.
    """
    gpu = local_gpu()
    own = target.model_copy(update={"runtime": "tensorrt"})
    kept = timing_file(own, f"{torch_trt_bindings.version()} torch", gpu.name) if gpu else None
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
        path = Path(scratch) / "timings"
        if kept is not None and kept.is_file():
            shutil.copyfile(kept, path)
        yield str(path)
        if kept is not None and path.is_file():
            try:
                write_bytes(kept, path.read_bytes())
            except (ArtifactError, OSError) as problem:
                log.warning("kernel timings are not kept: %s", str(problem).splitlines()[0])


@contextmanager
def _listening() -> Iterator[list[logging.LogRecord]]:
    """What torch-tensorrt and TensorRT say meanwhile: collected, and printed only from warnings on."""
    handler = _Keeping()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    report = logging.getLogger(_REPORT)
    level, propagates = report.level, report.propagate
    try:
        for each in (*loggers, report):
            each.addHandler(handler)
        report.setLevel(logging.DEBUG)
        report.propagate = False
        yield handler.said
    finally:
        report.setLevel(level)
        report.propagate = propagates
        for each in (*loggers, report):
            each.removeHandler(handler)


class _Keeping(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record)


def _failed(problem: Exception, said: list[logging.LogRecord], target: Target) -> BuildError:
    errors = [record.getMessage() for record in said if record.levelno >= logging.ERROR]
    why = readable([*errors, " ".join(str(problem).split()) or type(problem).__name__])
    if isinstance(problem, torch.cuda.OutOfMemoryError | MemoryError) or ran_out_of_memory([*errors, str(problem)]):
        return BuildError(
            f"torch-tensorrt ran out of memory while it compiled for {target.name!r}: {why}",
            expected="enough free memory on the GPU",
            fix="close what else uses it; or give the target a smaller batch.max, or a workspace_mib",
        )
    return BuildError(
        f"torch-tensorrt could not compile the network for {target.name!r}: {why}",
        expected="operators that it converts, or leaves to PyTorch",
        fix="replace the layer it names, or take runtime tensorrt, which compiles the network from ONNX",
    )
