"""How long ONNX Runtime takes to move numbers through the processor and compute next to nothing with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..layer_times import Floors
from .profiling import profile_graph

_RUNS = Floors(warmup_ms=2.0, duration_s=0.02)


def move_times(sizes: Sequence[int], threads: int = 1) -> dict[int, float]:
    """Ms that reading and writing this many bytes takes, half of them each, by the profiler that times layers.

    A ReLU does it, again and again on the same numbers: of a layer of that size it is what moving alone takes at the
    least, as a layer finds its weights in a slower cache or in memory.

    Args:
        sizes: in bytes.
        threads: within the operator.
    """
    graph = _relu()
    found = {}
    for size in dict.fromkeys(sizes):
        numbers = np.ones(max(size // 8, 1), np.float32)
        found[size] = profile_graph(graph, {"x": numbers}, _RUNS, threads)[0][0].ms
    return found


def _relu() -> bytes:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="move")], "move", ends[:1], ends[1:])
    made: bytes = helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return made
