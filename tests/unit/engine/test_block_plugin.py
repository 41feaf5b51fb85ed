"""The plugin against a stand-in for ``tensorrt.plugin`` that keeps its rules: annotations, argument order, symbols."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import json
import sys
import types
from dataclasses import asdict
from enum import Enum

import pytest
import torch

from deploy_sparse.engine.blocks import plugin
from deploy_sparse.engine.blocks.layout import BlockLayout, prepare
from deploy_sparse.engine.cuda.gpu import Gpu
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.errors import BuildError, ConfigError, MissingDependencyError

DataType = Enum("DataType", "FLOAT HALF BF16 INT32")
TENSORS = ["x", "weight", "bias", "columns", "positions", "table"]


class Symbol:
    """An extent that is not known while the network is described: takes numbers on its right, and hides its value."""

    def __init__(self, value: int) -> None:
        self.hidden = value

    def __add__(self, other: int | Symbol) -> Symbol:
        return Symbol(self.hidden + hidden(other))

    def __mul__(self, other: int | Symbol) -> Symbol:
        return Symbol(self.hidden * hidden(other))

    def __floordiv__(self, other: int | Symbol) -> Symbol:
        return Symbol(self.hidden // hidden(other))

    def __bool__(self) -> bool:
        raise RuntimeError("Cannot evaluate symbolic expression as boolean.")


def hidden(value: int | Symbol) -> int:
    return value.hidden if isinstance(value, Symbol) else value


class SymInt32(Symbol):
    def __init__(self, value: int | Symbol) -> None:
        super().__init__(hidden(value))


class TensorDesc:
    def __init__(self, shape_expr: tuple[int | Symbol, ...], dtype: DataType) -> None:
        self.shape_expr, self.dtype = shape_expr, dtype


class AutoTuneCombination:
    def __init__(self, io_types: str, layouts: str, tactics: list[int]) -> None:
        self.types, self.layouts, self.tactics = io_types.split(", "), layouts.split(", "), tactics


class KernelLaunchParams:
    def __init__(self) -> None:
        self.grid_x = self.grid_y = self.grid_z = self.block_x = self.block_y = self.block_z = 1
        self.shared_mem = 0


class SymIntExprs(list):
    @classmethod
    def from_tuple(cls, values: list[Symbol]) -> SymIntExprs:
        return cls(values)


class Definition:
    """One plugin: its three functions, and what calling it in a network gave."""

    def __init__(self) -> None:
        self.functions: dict = {}

    def accept(self, kind: str, function, tail: list[str], result) -> None:
        signature = inspect.signature(function)
        assert list(signature.parameters) == [*TENSORS, "settings", *tail]
        for name in TENSORS:
            assert signature.parameters[name].annotation is TensorDesc
        assert signature.parameters["settings"].annotation is str
        if "outputs" in tail:
            assert signature.parameters["outputs"].annotation == tuple[TensorDesc]
        if "tactic" in tail:
            assert signature.parameters["tactic"].annotation is int
        assert signature.return_annotation == result
        assert kind not in self.functions, "registered twice"
        self.functions[kind] = function

    def __call__(self, *tensors, settings: str):
        assert type(settings) is str
        assert len(tensors) == len(TENSORS)
        return tensors, settings


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """``.trt``, ``.trtp`` and ``.definition`` of a stand-in TensorRT, on a machine with a Hopper GPU."""
    definition = Definition()
    results = {
        "register": ([], TensorDesc),
        "autotune": (["outputs"], list[AutoTuneCombination]),
        "aot_impl": (["outputs", "tactic"], tuple[str, str, KernelLaunchParams, SymIntExprs]),
    }

    def decorator(kind: str):
        def named(plugin_id: str):
            assert plugin_id == "deploy_sparse::block_conv2d"
            return lambda function: definition.accept(kind, function, *results[kind])

        return named

    trt, trtp = types.ModuleType("tensorrt"), types.ModuleType("tensorrt.plugin")
    trt.__version__, trt.DataType, trt.plugin, trt.__path__ = "11.4.0", DataType, trtp, []
    trt.Weights = lambda kind, pointer, count: (kind, pointer, count)
    for kind in results:
        setattr(trtp, kind, decorator(kind))
    for public in (TensorDesc, AutoTuneCombination, KernelLaunchParams, SymInt32, SymIntExprs):
        setattr(trtp, public.__name__, public)
    trtp.from_shape_expr = TensorDesc
    trtp.cdiv = lambda first, second: Symbol(-(-hidden(first) // hidden(second)))
    trtp.op = types.SimpleNamespace(deploy_sparse=types.SimpleNamespace(block_conv2d=definition))
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: Gpu("NVIDIA H200", "SM90"))
    return types.SimpleNamespace(trt=trt, trtp=trtp, definition=definition)


class Network:
    def __init__(self) -> None:
        self.constants: list = []
        self.layers: list = []

    def add_constant(self, shape: tuple[int, ...], weights):
        self.constants.append((shape, weights))
        return types.SimpleNamespace(get_output=lambda index: f"constant {len(self.constants) - 1}.{index}")

    def add_plugin(self, made, aot: bool):
        self.layers.append(types.SimpleNamespace(made=made, aot=aot, name="", get_output=lambda index: f"y.{index}"))
        return self.layers[-1]


def layout_of(dtype: torch.dtype = torch.float16, channels: int = 64, rows: int = 96) -> BlockLayout:
    weight = torch.randn(rows, channels, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    blocks = [(range(0, rows, 2), range(channels // 2)), (range(1, rows, 2), range(channels // 4, channels // 4 * 3))]
    return prepare(weight, blocks, torch.ones(rows), stride=2, padding=1, dtype=dtype)


def descriptions(layout: BlockLayout, kind: DataType, image: tuple[int, int, int, int]) -> list[TensorDesc]:
    kinds = [kind, DataType.FLOAT, DataType.INT32, DataType.INT32, DataType.INT32]
    rest = [TensorDesc(tuple(t.shape), k) for t, k in zip(layout.tensors, kinds, strict=True)]
    return [TensorDesc(tuple(map(Symbol, image)), kind), *rest]


def settings_of(layout: BlockLayout) -> str:
    return json.dumps({"shape": asdict(layout.shape), "relu": True, "tf32": False})


def test_the_layer_carries_the_layout(tensorrt) -> None:
    layout, network = layout_of(), Network()
    assert plugin.add_block_conv2d(network, "x", layout, relu=True, name="conv3") == "y.0"
    (layer,) = network.layers
    assert (layer.aot, layer.name) == (True, "conv3")
    tensors, settings = layer.made
    assert tensors == ("x", *(f"constant {i}.0" for i in range(5)))
    assert json.loads(settings) == json.loads(settings_of(layout))
    kinds = [DataType.HALF, DataType.FLOAT, DataType.INT32, DataType.INT32, DataType.INT32]
    for (shape, (kind, pointer, count)), tensor, expected in zip(network.constants, layout.tensors, kinds, strict=True):
        assert (shape, kind, count) == (tuple(tensor.shape), expected, tensor.numel())
        held = ctypes.string_at(pointer, count * tensor.element_size())
        assert held == tensor.numpy().tobytes()
    plugin.add_block_conv2d(network, "x", layout)  # the second layer registers nothing


def test_shapes_stay_symbols(tensorrt) -> None:
    layout = layout_of()
    plugin.register(tensorrt.trt, tensorrt.trtp)
    describe = tensorrt.definition.functions["register"]
    found = describe(*descriptions(layout, DataType.HALF, (8, 64, 15, 12)), settings=settings_of(layout))
    assert found.dtype is DataType.HALF
    assert [hidden(extent) for extent in found.shape_expr] == [8, 96, 8, 6]


@pytest.mark.parametrize(
    ("kind", "name", "form"),
    [(DataType.HALF, "FP16", "HWC8"), (DataType.BF16, "BF16", "HWC8"), (DataType.FLOAT, "FP32", "HWC")],
    ids=str,
)
def test_every_tactic_compiles_and_covers_the_output(tensorrt, tmp_path, monkeypatch, kind, name, form) -> None:
    pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for Linux")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32}[name]
    layout = layout_of(dtype)
    plugin.register(tensorrt.trt, tensorrt.trtp)
    inputs = descriptions(layout, kind, (8, 64, 15, 12))
    outputs = (TensorDesc((8, 96, 8, 6), kind),)
    (found,) = tensorrt.definition.functions["autotune"](*inputs, settings_of(layout), outputs)
    assert found.types == [name, name, "FP32", "INT32", "INT32", "INT32", name]
    assert found.layouts == [form, "LINEAR", "LINEAR", "LINEAR", "LINEAR", "LINEAR", form]
    tiles = plugin.tiles(layout.shape, kind.name)
    assert found.tactics == list(range(1, len(tiles) + 1))
    assert len(tiles) > 1
    for tactic in (0, len(tiles)):  # 0: TensorRT asks for no tactic
        answer = tensorrt.definition.functions["aot_impl"](*inputs, settings_of(layout), outputs, tactic)
        entry, ptx, launch, numbers = answer
        tile = tiles[max(tactic - 1, 0)]
        assert f".visible .entry {entry}(" in ptx
        assert ".target sm_90a" in ptx
        pixels, rows = 8 * 8 * 6, 48
        assert hidden(launch.grid_x) == -(-pixels // tile.pixels) * 2 * -(-rows // tile.rows)
        assert (launch.grid_y, launch.block_x) == (1, tile.warps * 32)
        assert 0 < launch.shared_mem <= 48 << 10
        assert all(type(number) is SymInt32 for number in numbers)
        assert [number.hidden for number in numbers] == [pixels, 15, 12, 8, 6, 64, 96, 2, 48, layout.shape.max_columns]


def test_relu_and_tf32_reach_the_kernel(tensorrt, monkeypatch) -> None:
    seen = []
    compiled = types.SimpleNamespace(name="k", text="", threads=128, shared_bytes=0)
    stand_in = types.SimpleNamespace(
        fitting=lambda *_: [types.SimpleNamespace(pixels=64, rows=16, shared_bytes=lambda size: 0)],
        compile_ptx=lambda constants, element, tile, capability: (
            seen.append((dict(constants), element, capability)) or compiled
        ),
    )
    monkeypatch.setattr(plugin, "triton_kernel", lambda: stand_in)
    layout = layout_of(torch.float32)
    plugin.register(tensorrt.trt, tensorrt.trtp)
    inputs = descriptions(layout, DataType.FLOAT, (8, 64, 15, 12))
    for options in ({"relu": True, "tf32": False}, {"relu": False, "tf32": True}):
        settings = json.dumps({"shape": asdict(layout.shape), **options})
        tensorrt.definition.functions["aot_impl"](*inputs, settings, (), 1)
    assert [(constants["RELU"], constants["PRECISION"]) for constants, _, _ in seen] == [
        (True, "ieee"),
        (False, "tf32"),
    ]
    assert {(element, capability) for _, element, capability in seen} == {("fp32", 90)}
    assert seen[0][0]["STRIDE_H"] == 2


def test_mistakes_are_named(tensorrt, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    with pytest.raises(ConfigError, match=r"100 channels in and 96 out(.|\n)*multiples of 8(.|\n)*native form"):
        plugin.add_block_conv2d(network, "x", layout_of(channels=100))
    plugin.add_block_conv2d(network, "x", layout_of(torch.float32, channels=100))
    with pytest.raises(ConfigError, match=r"the layout is on meta(.|\n)*layout.to\('cpu'\)"):
        plugin.add_block_conv2d(network, "x", layout_of().to("meta"))
    with pytest.raises(ConfigError, match=r"no row reads anything"):
        plugin.add_block_conv2d(network, "x", prepare(torch.ones(8, 8, 1, 1), []))
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: None)
    with pytest.raises(BuildError, match=r"GPU of this machine, which has none(.|\n)*native form"):
        plugin.add_block_conv2d(network, "x", layout_of())


def test_without_tensorrt_or_without_its_plugins(tensorrt, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, *rest):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(trt_bindings.importlib, "import_module", absent)
    missing = "tensorrt"
    with pytest.raises(MissingDependencyError, match=r"tensorrt is not installed(.|\n)*pip install tensorrt"):
        plugin.add_block_conv2d(Network(), "x", layout_of())
    missing = "tensorrt.plugin"
    with pytest.raises(
        MissingDependencyError, match=r"tensorrt 11.4.0 has no plugins compiled ahead(.|\n)*native form"
    ):
        plugin.add_block_conv2d(Network(), "x", layout_of())
    missing = ""
    del tensorrt.trtp.aot_impl
    with pytest.raises(MissingDependencyError, match=r"no attribute 'aot_impl'(.|\n)*10.16 or newer"):
        plugin.add_block_conv2d(Network(), "x", layout_of())
