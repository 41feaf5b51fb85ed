"""torch-tensorrt without a GPU: its signatures as they are in versions 2.8 to 2.14, and engines that run in PyTorch.

A compilation divides the graph with PyTorch's own splitter, as torch-tensorrt's does, and names the parts as it does. A
plan is a few bytes that stand for a part; what is no plan of this process is not deserialized.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import itertools
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.passes.split_utils import split_by_tags

from deploy_sparse.config import config_from
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.cuda.gpu import Gpu
from deploy_sparse.engine.entry import Engine as BuiltEngine
from deploy_sparse.engine.target import Target
from deploy_sparse.engine.torch_trt import bindings as torch_trt_bindings
from deploy_sparse.engine.torch_trt import build as torch_trt_build
from deploy_sparse.engine.trt import bindings as trt_bindings

_SINCE_2_8 = frozenset({
    "exported_program", "inputs", "arg_inputs", "kwarg_inputs", "device", "disable_tf32", "assume_dynamic_shape_support",
    "sparse_weights", "engine_capability", "num_avg_timing_iters", "workspace_size", "dla_sram_size",
    "dla_local_dram_size", "dla_global_dram_size", "truncate_double", "require_full_compilation", "min_block_size",
    "torch_executed_ops", "torch_executed_modules", "pass_through_build_failures", "max_aux_streams",
    "version_compatible", "optimization_level", "use_python_runtime", "use_fast_partitioner",
    "enable_experimental_decompositions", "dryrun", "hardware_compatible", "timing_cache_path", "lazy_engine_init",
    "cache_built_engines", "reuse_cached_engines", "engine_cache_dir", "engine_cache_size", "custom_engine_cache",
    "use_fp32_acc", "refit_identical_engine_weights", "strip_engine_weights", "immutable_weights",
    "enable_weight_streaming", "tiling_optimization_level", "l2_limit_for_tiling", "offload_module_to_cpu",
})  # fmt: skip
_TO_2_12 = frozenset({"enabled_precisions", "use_explicit_typing"})
_SINCE_2_10 = _SINCE_2_8 | {
    "use_distributed_mode_trace", "enable_autocast", "autocast_low_precision_type", "autocast_excluded_nodes",
    "autocast_excluded_ops", "autocast_max_output_threshold", "autocast_max_depth_of_reduction",
    "autocast_calibration_dataloader", "cpu_memory_budget", "enable_resource_partitioning",
}  # fmt: skip
_SINCE_2_11 = _SINCE_2_10 | {"dynamically_allocate_resources", "decompose_attention", "attn_bias_is_causal"}
_SINCE_2_13 = _SINCE_2_11 | {"fallback_data_dependent_ops"}
PARAMETERS: Mapping[str, frozenset[str]] = {
    "2.8": _SINCE_2_8 | _TO_2_12,
    "2.9": _SINCE_2_8 | _TO_2_12,
    "2.10": _SINCE_2_10 | _TO_2_12,
    "2.11": _SINCE_2_11 | _TO_2_12,
    "2.12": _SINCE_2_11 | _TO_2_12 | {"runtime_cache_path", "dynamic_shapes_kernel_specialization_strategy"},
    "2.13": _SINCE_2_13,
    "2.14": _SINCE_2_13 | {"use_complex_decomposition", "disabled_constant_fold_exclusions"},
}
"""Parameters of ``torch_tensorrt.dynamo.compile`` but for ``**kwargs``, read from the source of each release."""

GPU = Gpu("NVIDIA H100 80GB HBM3", "SM90")
HERE = ".".join(torch.__version__.split(".")[:2])
_plans: dict[bytes, nn.Module] = {}
_numbers = itertools.count()


class Engine(nn.Module):
    """``torch_tensorrt.runtime.TorchTensorRTModule``."""

    def __init__(
        self, serialized_engine=None, input_binding_names=None, output_binding_names=None, *, name="", settings=None,
        requires_output_allocator=False,
    ) -> None:  # fmt: skip
        super().__init__()
        if serialized_engine not in _plans:
            raise RuntimeError("Unable to deserialize the TensorRT engine")
        self.serialized_engine, self.engine, self.name, self.settings = serialized_engine, object(), name, settings
        self.input_binding_names, self.output_binding_names = input_binding_names, output_binding_names
        self.requires_output_allocator = requires_output_allocator
        self.aliased_io: dict[str, object] = {}

    def forward(self, *inputs):
        assert len(inputs) == len(self.input_binding_names)
        outputs = _plans[self.serialized_engine](*(x if x.dim() else x.item() for x in inputs))
        return outputs if isinstance(outputs, torch.Tensor) or len(outputs) > 1 else outputs[0]


class FakeTorchTensorRT:
    """The library.

    Attributes:
        unsupported: names of operators, such as ``"relu"``, that stay in PyTorch.
        failing: what a compilation raises; ``error`` is what TensorRT logs first.
        off_by: added to what engines compute.
        options, inputs, ranges: what the last compilation was asked, and ranges of free axes.
        loaded: engines that were made of plans.
        silent: tells no counts of operators. aliased: engines write into an input. python_runtime: engines are those of
            the runtime in Python, of versions up to 2.12. allocates: engines find the shapes of outputs as they run.
            loses_shapes: of inputs.
    """

    def __init__(self, version: str) -> None:
        self.unsupported: set[str] = set()
        self.failing: BaseException | None = None
        self.error, self.silent, self.off_by = "", False, 0.0
        self.options: dict[str, Any] = {}
        self.inputs: list[dict[str, Any]] = []
        self.ranges: list[tuple[int, int]] = []
        self.loaded: list[Engine] = []
        self.aliased = self.python_runtime = self.allocates = self.loses_shapes = False
        self.module = ModuleType("torch_tensorrt")
        self.module.__spec__ = importlib.machinery.ModuleSpec("torch_tensorrt", None)
        self.module.__version__ = f"{version}.0"
        self.module.dynamo = SimpleNamespace(
            compile=self._compiler(version), CompilationSettings=lambda **values: SimpleNamespace(**values)
        )
        self.module.runtime = SimpleNamespace(TorchTensorRTModule=self._load)
        self.module.Input = lambda **values: SimpleNamespace(**values)

    def _load(self, *args: Any, **values: Any) -> Engine:
        self.loaded.append(Engine(*args, **values))
        return self.loaded[-1]

    def _compiler(self, version: str):
        def compiler(exported_program, inputs=None, **options):
            assert options.keys() <= PARAMETERS[version], options.keys() - PARAMETERS[version]
            return self._compile(exported_program, **options)

        kinds = {"exported_program": inspect.Parameter.POSITIONAL_OR_KEYWORD}
        names = ["exported_program", *sorted(PARAMETERS[version] - {"exported_program"})]
        parameters = [inspect.Parameter(n, kinds.get(n, inspect.Parameter.KEYWORD_ONLY), default=None) for n in names]
        parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
        compiler.__signature__ = inspect.Signature(parameters)
        return compiler

    def _compile(self, program, *, arg_inputs, **options):
        self.inputs, self.options = [vars(each) for each in arg_inputs], options
        self.ranges = [
            (int(bounds.lower), int(bounds.upper))
            for node in program.graph.find_nodes(op="placeholder")
            for extent in getattr(node.meta["val"], "shape", ())
            if isinstance(extent, torch.SymInt)
            for bounds in [extent.node.shape_env.bound_sympy(extent.node.expr)]
        ]
        cache = Path(options["timing_cache_path"])
        cache.write_bytes((cache.read_bytes() if cache.is_file() else b"") + b"timings;")
        if self.error:
            logging.getLogger("torch_tensorrt [TensorRT Conversion Context]").error(self.error)
        if self.failing is not None:
            raise self.failing
        lowered = program.run_decompositions().module()
        tags: list[str] = []
        for node in lowered.graph.nodes:
            if node.op in ("call_function", "call_module"):
                name = getattr(node.target, "_opname", "")
                kind = "_run_on_gpu" if node.op == "call_module" or name in self.unsupported else "_run_on_acc"
                if not tags or not tags[-1].startswith(kind):
                    tags.append(f"{kind}_{len(tags)}")
                node.tag = tags[-1]
        divided = split_by_tags(lowered, tags)
        if self.loses_shapes:
            for node in divided.graph.find_nodes(op="placeholder"):
                del node.meta["val"]
        report = ["Graph Structure:"]
        for node in divided.graph.find_nodes(op="call_module"):
            part = divided.get_submodule(node.target)
            if "_run_on_acc" in node.target:
                (results,) = part.graph.find_nodes(op="output")
                values = results.args[0] if isinstance(results.args[0], tuple) else (results.args[0],)
                node.meta["val"] = [each.meta["val"] for each in values]
                count = sum(each.op == "call_function" for each in part.graph.nodes)
                report.append(f"Number of Operators in Engine: {count}")
                names = [each.name for each in part.graph.find_nodes(op="placeholder")]
                setattr(divided, node.target, self._engine(part, names, len(values)))
        if not self.silent:
            logging.getLogger("torch_tensorrt.dynamo._DryRunTracker").debug("\n".join(report))
        return divided

    def _engine(self, part: nn.Module, names: list[str], outputs: int) -> Engine:
        plan = b"ftrt\x00\xff" + str(next(_numbers)).encode() + b"\x00"
        _plans[plan] = _OffBy(part, self.off_by) if self.off_by else part
        engine = Engine(plan, names, [f"output{index}" for index in range(outputs)], name="compiled")
        engine.requires_output_allocator = self.allocates
        if self.python_runtime:
            del engine.input_binding_names
        if self.aliased:
            engine.aliased_io = {"output0": ("x", "kv")}
        return engine


class _OffBy(nn.Module):
    def __init__(self, part: nn.Module, difference: float) -> None:
        super().__init__()
        self.part, self.difference = part, difference

    def forward(self, *inputs):
        outputs = self.part(*inputs)
        many = isinstance(outputs, tuple)
        return tuple(y + self.difference for y in outputs) if many else outputs + self.difference


def package(folder: Path, patch: pytest.MonkeyPatch, name: str, version: str) -> None:
    """Let Python's package metadata find ``name``."""
    facts = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    patch.syspath_prepend(folder)


def install(folder: Path, patch: pytest.MonkeyPatch, version: str = HERE) -> FakeTorchTensorRT:
    """The library, installed beside a GPU; what would run there runs on the CPU."""
    fake = FakeTorchTensorRT(version if version in PARAMETERS else "2.14")
    package(folder, patch, "torch-tensorrt", f"{version}.0")
    patch.setitem(sys.modules, "torch_tensorrt", fake.module)
    patch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.1.0.106", __name__="tensorrt"))
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for module in (torch_trt_bindings, torch_trt_build, trt_bindings):
        patch.setattr(module, "local_gpu", lambda: GPU)
    patch.setattr(torch_trt_bindings, "DEVICE", "cpu")
    return fake


IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def target_of(**values: object) -> Target:
    given = {"name": "mine", "runtime": "torch-tensorrt", "batch": {"min": 1, "opt": 4, "max": 6}}
    return config_from(Target, given, values, source="mine.toml")


def built(network: nn.Module, folder: Path, inputs: object = IMAGES, **values: object) -> BuiltEngine:
    return build_engine(network, target_of(**values), inputs, folder)


class Views(nn.Module):
    """Sizes that follow from the batch: a flattened view, a token repeated for each sample, twice as many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.token = nn.Linear(64, 6), nn.Parameter(torch.ones(1, 1, 6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.first(x.reshape(x.shape[0], -1)))
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y[:, None]], 1)
        rows = torch.sigmoid(y.reshape(x.shape[0] * 2, 6))
        return torch.relu(rows), y.mean(1)


class Pair(nn.Module):
    """Two inputs, one of them integers, and channels that are looked up, as packed layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embedding = nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(2, 4)
        self.register_buffer("order", torch.tensor([2, 0, 1, 2]))

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        y = self.conv(x.expand(-1, 4, -1, -1).index_select(1, self.order)).mean((2, 3))
        return torch.relu(y) + self.embedding(words)


WORDS = torch.tensor([0, 1, 1, 0])
