"""Packed layers become few plain nodes, which ONNX Runtime agrees with and TensorRT-RTX compiles."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx
import pytest
import torch
from packed_samples import dense_conv, dense_linear, packing

from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.onnx.export import export_onnx
from deploy_sparse.engine.onnx.file import OnnxFile
from deploy_sparse.surgery.packed import PackedConv2d, PackedLinear, Packing

EVENS, ODDS = range(0, 32, 2), range(1, 32, 2)
HALVES = range(16), range(16, 32)
KERNEL = (3, 3)
TURNED = {"Transpose": 2, "Unsqueeze": 1, "Squeeze": 1}  # features first and back


def conv(form, blocks, **options):
    return packing(32, 32, KERNEL, form, blocks, **options)


def linear(form, blocks, **options):
    return packing(32, 32, (), form, blocks, **options)


def positions():
    whole = conv("free", [(EVENS, range(12)), (ODDS, range(8, 30))])
    blocks = tuple(type(block)(block.rows, block.columns[::2]) for block in whole.blocks)
    return Packing(32, 32, KERNEL, "positions", blocks)


SHARED = [(HALVES[0], range(16)), (HALVES[1], range(8, 24))]
MIXED = [(EVENS, range(16)), (ODDS, range(8, 24))]
UNEVEN = [(range(0, 20), range(12)), (range(20, 32), range(8, 30))]

CASES = {
    "disjoint": (conv("disjoint", [(EVENS, ODDS), (ODDS, EVENS)], gather=False, restore=False), {"Conv": 1}),
    "equal": (conv("equal", SHARED), {"Gather": 1, "Conv": 1}),
    "equal with an empty row": (
        conv("equal", [(range(15), range(16)), (range(16, 31), range(8, 24))]),
        {"Gather": 2, "Conv": 1, "Pad": 1, "Add": 1},
    ),
    "free": (conv("free", UNEVEN, tile=16), {"Gather": 2, "Conv": 2, "Concat": 1}),
    "positions": (positions(), {"Pad": 1, "Slice": 12, "Concat": 2, "Gather": 3, "Conv": 2}),
    "linear disjoint": (
        linear("disjoint", list(zip(HALVES, HALVES, strict=True))),
        {"Split": 1, "MatMul": 2, "Concat": 1, "Add": 1},
    ),
    "linear equal": (
        linear("equal", SHARED),
        {"Transpose": 2, "Gather": 1, "Split": 1, "MatMul": 2, "Concat": 1, "Add": 1},
    ),
    "linear equal, rows mixed": (linear("equal", MIXED), {**TURNED, "Gather": 2, "Conv": 1}),
}
MORE = {
    "disjoint in order": (conv("disjoint", list(zip(HALVES, HALVES, strict=True))), {"Conv": 1}),
    "disjoint, both look-ups": (conv("disjoint", [(EVENS, ODDS), (ODDS, EVENS)]), {"Gather": 2, "Conv": 1}),
    "equal once padded": (
        conv("equal", [(range(12), range(10)), (range(12, 32), range(8, 30))], tile=32),
        {"Gather": 2, "Conv": 1},
    ),
    "free, rows mixed": (
        conv("free", [(EVENS, range(12)), (ODDS, range(8, 30))]),
        {"Gather": 3, "Conv": 2, "Concat": 1},
    ),
    "linear free, rows mixed": (
        linear("free", [(EVENS, range(12)), (ODDS, range(8, 30))]),
        {**TURNED, "Gather": 3, "Conv": 2, "Concat": 1},
    ),
}
PARAMS = [
    *(pytest.param(case, id=name) for name, case in CASES.items()),
    *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in MORE.items()),
]


@dataclass(frozen=True)
class Exported:
    packing: Packing
    file: OnnxFile
    nodes: dict[str, int]


@pytest.fixture(scope="module", params=PARAMS)
def exported(request, tmp_path_factory) -> Exported:
    found, nodes = request.param
    if found.kernel:
        layer = PackedConv2d.of(dense_conv(found, dtype=torch.float32, padding=1, stride=2), found)
        x = torch.randn(2, 32, 7, 7)
    else:
        layer = PackedLinear.of(dense_linear(found, dtype=torch.float32), found)
        x = torch.randn(2, 5, 32)
    path = tmp_path_factory.mktemp("packed") / "layer.onnx"
    return Exported(found, export_onnx(layer.train(), x, path), nodes)


def attribute(node, name):
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def test_few_plain_nodes(exported):
    graph = onnx.load(exported.file.path).graph
    assert Counter(node.op_type for node in graph.node) == exported.nodes
    assert {node.domain for node in graph.node} == {""}
    constants, grouped = {x.name for x in graph.initializer}, exported.packing.form in ("disjoint", "equal")
    for node in graph.node:
        if node.op_type == "Conv":
            assert attribute(node, "group") == (len(exported.packing.blocks) if grouped else 1)
        if node.op_type in ("Conv", "MatMul"):
            assert {*node.input[1:]} <= constants  # not made of others on every run
        if node.op_type == "Gather":
            assert node.input[1] in constants
            assert attribute(node, "axis") == (-2 if "MatMul" in exported.nodes else 1)


def test_onnx_runtime_agrees(exported):
    assert exported.file.parity.max_rel < 1e-5
    assert exported.file.parity.batches == (2, 1, 3)


def test_compiles_for_tensorrt_rtx(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)
    engine = build_engine(exported.file, "rtx-portable", out=tmp_path)
    assert engine.manifest["bytes"] > 1000


@pytest.mark.parametrize(
    "mode", ["circular", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("reflect", "replicate"))]
)
def test_other_padding_modes(mode, tmp_path):
    found = conv("equal", MIXED)
    layer = PackedConv2d.of(dense_conv(found, dtype=torch.float32, padding=(1, 2), padding_mode=mode), found)
    assert export_onnx(layer, torch.randn(2, 32, 6, 6), tmp_path / "layer.onnx").parity.max_rel < 1e-5
