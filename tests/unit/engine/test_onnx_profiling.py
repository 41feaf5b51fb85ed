"""Layer times by ONNX Runtime's profiler: whose a node is, what a fused one stands for, and a whole engine's profile."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.layer_times import Floors, by_name, layer_times, middle_mean
from deploy_sparse.engine.onnx.memory import move_times
from deploy_sparse.engine.onnx.owners import owners_of, path_of
from deploy_sparse.engine.onnx.profiling import pieces_of, profile_graph, split_runs
from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import EngineError

SHORT = Floors(warmup_ms=1.0, duration_s=0.01)


def weights(name: str, *shape: int) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, shape, np.ones(shape, np.float32).ravel())


def index(name: str, numbers: list[int]) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(numbers)], numbers)


def model(nodes, constants, shape=("n", 8, 6, 6)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tests",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        initializer=constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node(kind: str, inputs: str, output: str, name: str = "", **options: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=name or f"node_{output}", **options)


def owners(made: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    return {owned.node.name: (owned.layer, owned.part) for owned in owners_of(made.SerializeToString(), {})}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("stages.0.0.conv1.weight", "stages.0.0.conv1"),
        ("stages.1.shortcut.0.weights.2", "stages.1.shortcut.0"),
        ("0.weight", "0"),
        ("weight", None),
        ("val_12", None),
        ("", None),
    ],
)
def test_the_path_of_a_module_in_its_weights_name(name: str, path: str | None) -> None:
    assert path_of(name) == path


def test_products_are_called_by_their_weights_and_the_rest_by_what_it_serves(exported) -> None:
    found = owners_of(exported.path.read_bytes(), {})
    products = {owned.layer: owned for owned in found if owned.part == "product"}
    assert list(products) == ["conv1", "conv2", "head"]
    assert (products["conv1"].shape, products["conv1"].counts) == ("1→4 3×3", (1, 4))
    assert (products["head"].shape, products["head"].counts) == ("8→10", (8, 10))
    assert products["conv2"].weights == 4 * 8 * 4 * 9
    assert products["conv2"].activations == 4 * (4 * 64 + 8 * 16)
    assert [owned.layer for owned in found if owned.node.kind == "Relu"] == ["conv1", "conv2"]
    assert {owned.part for owned in found if owned.node.kind == "Relu"} == {"behind"}
    assert [owned.layer for owned in found if owned.node.kind == "ReduceMean"] == ["ReduceMean behind conv2"]


def test_look_ups_blocks_and_joins_belong_to_the_packed_layer() -> None:
    made = model(
        [
            node("Conv", "input first.weight", "a", pads=[1] * 4),
            node("Relu", "a", "b"),
            node("Gather", "b one", "c", axis=1),
            node("Conv", "c second.weights.0", "d"),
            node("Gather", "b two", "e", axis=1),
            node("Conv", "e second.weights.1", "f"),
            node("Concat", "d f", "g", axis=1),
            node("Gather", "g order", "h", axis=1),
            node("Add", "h h", "i"),
            node("Gather", "i three", "j", axis=1),
            node("Split", "j", "k l", axis=1, num_outputs=2),
            node("Conv", "k third.weights.0", "m"),
            node("Conv", "l third.weights.1", "n"),
            node("Concat", "m n", "output", axis=1),
        ],
        [
            weights("first.weight", 8, 8, 3, 3),
            *(weights(f"{layer}.weights.{i}", 4, 4, 1, 1) for layer in ("second", "third") for i in range(2)),
            index("one", [0, 1, 2, 3]),
            index("two", [4, 5, 6, 7]),
            index("order", list(range(8))),
            index("three", list(range(8))),
        ],
    )
    made.graph.node[10].output[:] = ["k", "l"]
    found = owners(made)
    assert [found[f"node_{x}"] for x in ("a", "b")] == [("first", "product"), ("first", "behind")]
    assert [found[f"node_{x}"] for x in "cegh"] == [("second", "look-up")] * 4
    assert [found[f"node_{x}"] for x in "df"] == [("second", "product")] * 2
    assert found["node_i"] == ("second", "behind")
    assert [found[x] for x in ("node_j", "node_k l", "node_output")] == [("third", "look-up")] * 3


def test_a_look_up_that_others_read_too_and_a_join_of_two_layers_are_their_own_rows() -> None:
    made = model(
        [
            node("Conv", "input a.weight", "x"),
            node("Conv", "input b.weight", "y"),
            node("Concat", "x y", "z", axis=1),
            node("MaxPool", "z", "p", kernel_shape=[1, 1]),
            node("Gather", "p some", "q", axis=1),
            node("Conv", "q c.weight", "r"),
            node("Relu", "q", "s"),
            node("MaxPool", "r", "t", kernel_shape=[1, 1]),
            node("MaxPool", "t", "u", kernel_shape=[1, 1]),
            node("Concat", "u s", "output", axis=1),
        ],
        [
            *(weights(f"{x}.weight", 4, 8, 1, 1) for x in "ab"),
            weights("c.weight", 4, 4, 1, 1),
            index("some", [0, 1, 2, 3]),
        ],
    )
    found = owners(made)
    assert found["node_z"] == ("Concat behind a", "other")
    assert found["node_q"] == ("Gather behind a", "other")
    assert found["node_s"] == ("Relu behind a", "other")
    assert found["node_t"] == ("MaxPool behind c", "other")
    assert found["node_u"] == ("MaxPool behind c (2)", "other")


def test_turned_weights_are_found_by_their_bias_and_quantized_ones_behind_their_scale() -> None:
    made = model(
        [
            node("MatMul", "input val_3", "a"),
            node("Add", "a fc.bias", "b"),
            node("DequantizeLinear", "last.weight scale", "w"),
            node("MatMul", "b w", "c"),
            node("MatMul", "c val_3", "d"),
            node("MatMul", "d val_3", "output", name="/own/name"),
        ],
        [
            weights("val_3", 8, 8),
            weights("fc.bias", 8),
            helper.make_tensor("last.weight", TensorProto.INT8, [8, 8], [1] * 64),
            helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5]),
        ],
        ("n", 8),
    )
    found = owners(made)
    assert found["node_a"] == ("fc", "product")
    assert found["node_b"] == ("fc", "behind")
    assert found["node_c"] == ("last", "product")
    assert found["node_d"] == ("MatMul behind last", "product")
    assert found["/own/name"] == ("/own/name", "product")


def event(name: str, ts: int, dur: int, kind: str = "Conv", inputs=(), outputs=()) -> dict[str, object]:
    shapes = {"input_type_shape": [{"float": x} for x in inputs], "output_type_shape": [{"float": x} for x in outputs]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": kind, **shapes}}


def run_event(dur: int) -> dict[str, object]:
    return {"cat": "Session", "name": "model_run", "ts": 0, "dur": dur, "args": {}}


def test_runs_are_told_apart_and_a_loops_body_counts_once() -> None:
    events = [
        {"cat": "Session", "name": "model_loading_uri", "ts": 0, "dur": 9},
        event("a", 10, 5),
        run_event(20),
        event("a", 100, 7),
        event("inner", 112, 2),
        event("inner", 115, 3),
        event("loop", 110, 10, "Loop"),
        event("b", 120, 1),
        event("b", 121, 0),
        run_event(30),
    ]
    runs = split_runs(events)
    assert [whole for _, whole in runs] == [0.02, 0.03]
    assert {name: ms for name, (ms, _) in runs[1][0].items()} == {"a": 0.007, "loop": 0.01, "b": 0.001}


def test_fused_nodes_and_reorders_are_traced_to_the_layers_they_serve() -> None:
    before = model(
        [
            node("Conv", "input a.weight", "x1"),
            node("Relu", "x1", "x2"),
            node("Conv", "x2 b.weight", "x3"),
            node("Add", "x3 x2", "x4"),
            node("Conv", "x3 c.weight", "y"),
            node("MaxPool", "x4", "output", kernel_shape=[1, 1]),
        ],
        [weights(f"{x}.weight", 8, 8, 1, 1) for x in "abc"],
    )
    inner = {"domain": "com.microsoft.nchwc"}
    after = model(
        [
            node("ReorderInput", "input", "token_0", name="ReorderInput", **inner),
            node("Conv", "token_0 w", "token_1", name="x2_nchwc", **inner),
            node("Conv", "token_1 w2", "token_2", name="x3_nchwc", **inner),
            node("ReorderOutput", "token_2", "x3", name="ReorderOutput_token_7", **inner),
            node("Conv", "x3 w3", "token_3", name="y_nchwc", **inner),
            node("Add", "x3 x2", "x4"),
            node("Cast", "x4", "inserted", name="InsertedCast"),
            node("MaxPool", "inserted", "output", kernel_shape=[1, 1]),
        ],
        [],
    )
    shape = [2, 16, 6, 6]
    events = [event("x2_nchwc", 0, 900), run_event(999)]  # a run of the warm-up
    for offset in (1000, 2000, 3000, 4000):
        events += [
            event("ReorderInput", offset, 3, "ReorderInput"),
            event("x2_nchwc", offset + 10, 20, "Conv", ([2, 8, 6, 6], [16, 8, 1, 1]), (shape,)),
            event("x3_nchwc", offset + 40, 30, "Conv", (shape, [16, 16, 1, 1]), (shape,)),
            event("ReorderOutput_token_7", offset + 80, 4, "ReorderOutput"),
            event("y_nchwc", offset + 84, 6, "Conv", (shape, [16, 8, 1, 1]), (shape,)),
            event("node_x4", offset + 90, 5, "Add"),
            event("InsertedCast", offset + 95, 1, "Cast"),
            event("node_output", offset + 97, 2, "MaxPool"),
            run_event(110),
        ]
    pieces, runs, whole = pieces_of(events, 4, before, after)
    assert (runs, whole) == (4, 0.11)
    found = {piece.name: piece for piece in pieces}
    assert found["ReorderInput"].nodes[0] == "node_x1"
    assert found["x2_nchwc"].nodes == ("node_x1", "node_x2")
    assert found["x3_nchwc"].nodes == ("node_x3",)
    assert found["ReorderOutput_token_7"].nodes == ("node_x3",)
    assert found["InsertedCast"].nodes == ("node_output",)
    assert {name for name, piece in found.items() if piece.role == "conversion"} == {
        "ReorderInput", "ReorderOutput_token_7", "InsertedCast",
    }  # fmt: skip
    assert [found[f"{x}_nchwc"].layout for x in ("x2", "x3", "y")] == ["NCHWc", "NCHWc", "NCHWc, plain input"]
    assert found["x3_nchwc"].macs == 2 * 36 * 16 * 16
    assert found["node_x4"].macs is None
    assert sum(piece.ms for piece in pieces) == pytest.approx(0.071)


def test_the_middle_half_counts() -> None:
    assert middle_mean([5.0]) == 5.0
    assert middle_mean([1.0, 2.0, 3.0, 1000.0]) == 2.5
    assert by_name([{"a": 1.0}, {"a": 1.0, "b": 4.0}]) == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_built_engine_is_profiled_as_it_is(built: Engine, batch: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    polls: list[int] = []
    with built.open() as engine:
        feeds = engine.sample_inputs(batch)
        times = engine.layer_times(feeds, warmup_ms=1, duration_s=0.01, poll=lambda: polls.append(1))
    assert not list(tmp_path.iterdir()), "the profile stays out of the working folder"
    named = {node for piece in times.pieces for node in piece.nodes}
    products = {owned.node.name for owned in owners_of(built.path.read_bytes(), {}) if owned.part == "product"}
    assert products <= named
    assert times.total_ms == pytest.approx(sum(piece.ms for piece in times.pieces))
    assert times.total_ms > 0
    assert times.profiled_ms > 0
    assert times.plain_ms > 0
    assert times.runs >= 20
    assert len(polls) > times.runs
    macs = {piece.nodes[0]: piece.macs for piece in times.pieces if piece.macs is not None}
    assert len(macs) == 2
    for owned in owners_of(built.path.read_bytes(), {}):
        if owned.node.name in macs:  # at least its own, with what the runtime fills up
            assert macs[owned.node.name] >= owned.node.macs * batch
            assert macs[owned.node.name] % batch == 0


def test_what_poll_raises_ends_the_profile(built: Engine) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with built.open() as engine, pytest.raises(KeyboardInterrupt):
        engine.layer_times(engine.sample_inputs(), poll=stop)


def test_feeds_are_checked_and_closed_runners_refuse(built: Engine) -> None:
    engine = built.open()
    with pytest.raises(EngineError, match="input"):
        engine.layer_times({"other": np.zeros((1, 1, 8, 8), np.float32)})
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.layer_times({})


def test_torch_engines_have_no_layer_times() -> None:
    engine = SimpleNamespace(target=load_target("torch-cpu"), folder="engines/out/x")
    with pytest.raises(EngineError) as caught:
        layer_times(engine, None, {}, SHORT)
    assert caught.value.given == "engines/out/x has no layer times, as its runtime is torch"
    assert "--target cpu" in caught.value.fix


def test_a_full_disk_or_a_profile_cut_short_is_an_error_that_says_what_to_do(
    exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = {"input": np.ones((1, 1, 8, 8), np.float32)}
    monkeypatch.setattr("json.loads", lambda text: (_ for _ in ()).throw(ValueError("cut short")))
    with pytest.raises(EngineError) as caught:
        profile_graph(exported.path.read_bytes(), feeds, SHORT)
    assert caught.value.given == "ONNX Runtime cannot profile the graph: cut short"
    assert "TMPDIR" in caught.value.fix
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda prefix: nullcontext("/nowhere/at/all"))
    with pytest.raises(EngineError, match="ONNX Runtime cannot profile the graph: "):
        profile_graph(exported.path.read_bytes(), feeds, SHORT)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="NCHWc kernels differ by processor")
def test_channel_counts_that_are_no_multiple_of_four_leave_the_blocked_layout() -> None:
    layouts = {}
    for width in (32, 29):
        made = model(
            [node("Conv", "input a.weight", "x", pads=[1] * 4), node("Conv", "x b.weight", "output", pads=[1] * 4)],
            [weights("a.weight", width, 8, 3, 3), weights("b.weight", 32, width, 3, 3)],
            (1, 8, 6, 6),
        )
        pieces, _, _ = profile_graph(made.SerializeToString(), {"input": np.ones((1, 8, 6, 6), np.float32)}, SHORT)
        layouts[width] = {piece.nodes[0]: piece.layout for piece in pieces if piece.layout}
    assert layouts[32]["node_output"] == "NCHWc"
    assert layouts[29]["node_output"] == "plain"


def test_moving_more_takes_longer() -> None:
    small, large = 1 << 12, 1 << 24
    times = move_times([small, large, small])
    assert list(times) == [small, large]
    assert times[large] > 10 * times[small] > 0


def test_a_product_between_conversions_is_traced_by_the_next_value_that_both_graphs_have() -> None:
    before = model(
        [
            node("Conv", "input a.weight", "x"),
            node("QuantizeLinear", "x scale", "q"),
            node("DequantizeLinear", "q scale", "output"),
        ],
        [weights("a.weight", 8, 8, 1, 1), weights("scale", 1)],
    )
    after = model(
        [
            node("Transpose", "input", "turned", name="Transpose"),
            node("QLinearConv", "turned w", "inner", name="renamed_token_5"),
            node("Transpose", "inner", "q", name="Transpose_token_6"),
            node("DequantizeLinear", "q scale", "output"),
        ],
        [],
    )
    events = [
        event("Transpose", 0, 2, "Transpose"),
        event("renamed_token_5", 5, 9, "QLinearConv"),
        event("Transpose_token_6", 20, 2, "Transpose"),
        event("node_output", 30, 1, "DequantizeLinear"),
        run_event(40),
    ]
    found = {piece.name: piece for piece in pieces_of(events, 1, before, after)[0]}
    assert found["renamed_token_5"].nodes == ("node_x", "node_q")
    assert found["Transpose"].nodes == ("node_x", "node_q")
    assert (found["Transpose"].role, found["renamed_token_5"].role) == ("conversion", "work")
