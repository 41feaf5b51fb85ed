"""What a build that a compiler refuses says: which node, and what would help."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_samples import write_graph
from onnx import NodeProto, TensorProto, helper, numpy_helper
from precision_samples import images, model_of

from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.onnx.nodes import place_of
from deploy_sparse.errors import BuildError


def wobble(name: str | None = None) -> NodeProto:
    return helper.make_node("Wobble", ["x"], ["y"], name=name, domain="acme")


def in_a_branch(node: NodeProto) -> list[NodeProto]:
    """Two nodes after which ``node`` runs in a branch."""
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])]
    then, other = (
        helper.make_graph([node], "then", [], outputs),
        helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "else", [], outputs),
    )
    yes = numpy_helper.from_array(np.array(True), "yes")
    return [
        helper.make_node("Relu", ["input"], ["x"]),
        helper.make_node("Constant", [], ["yes"], value=yes),
        helper.make_node("If", ["yes"], ["output"], then_branch=then, else_branch=other),
    ]


@pytest.mark.parametrize(
    ("nodes", "place"),
    [
        ([helper.make_node("Relu", ["input"], ["x"]), wobble("odd"), helper.make_node("Relu", ["y"], ["output"])],
         "node 'odd'"),
        ([helper.make_node("Relu", ["input"], ["x"]), wobble(), helper.make_node("Relu", ["y"], ["output"])],
         "the node that writes 'y'"),
        (in_a_branch(wobble("within")), "node 'within'"),
    ],
    ids=["named", "unnamed", "in a branch"],
)  # fmt: skip
def test_the_node_with_an_operator_that_onnx_runtime_does_not_have(nodes, place: str, tmp_path: Path) -> None:
    path = write_graph(tmp_path / "x.onnx", nodes, domain="acme")
    with pytest.raises(BuildError, match=rf"acme:Wobble.*; {place} needs it\n") as caught:
        build_engine(path, "cpu", out=tmp_path / "out")
    assert caught.value.fix.startswith("replace that operator")


def test_operators_of_the_default_domain_and_others() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["b"], "first"), helper.make_node("Relu", ["b"], ["c"], "mine", domain="my")],
        "g", [], [],
    )  # fmt: skip
    data = helper.make_model(graph).SerializeToString()
    assert place_of(data, "", "Relu") == place_of(data, "ai.onnx", "Relu") == "node 'first'"
    assert place_of(data, "my", "Relu") == "node 'mine'"
    assert place_of(data, "my", "Tanh") == "a node"


def test_a_graph_quantized_for_onnx_runtime_is_built_from_its_float32_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)
    nodes = [helper.make_node("MatMul", ["input", "w"], ["a"]), helper.make_node("Relu", ["a"], ["output"])]
    weight, data = np.random.default_rng(0).standard_normal((4, 4), np.float32), images()[:, 0, 0, :4]
    onnx.save(model_of(nodes, {"w": weight}), tmp_path / "x.onnx")
    made = build_engine(tmp_path / "x.onnx", "cpu", out=tmp_path, precision="int8", calibration=data)
    with pytest.raises(BuildError, match=r"\(QuantizeLinear\): Non-zero zero point") as caught:
        build_engine(made.path, "rtx-sm89", out=tmp_path, precision="int8")
    assert caught.value.fix.startswith("a graph that was quantized for ONNX Runtime: build from the float32 file")
