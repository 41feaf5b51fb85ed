"""Which layers a network has, and what decides how long they take."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy_sparse.engine.onnx.runtime import OrtSession
from deploy_sparse.errors import ConfigError, SurgeryError
from deploy_sparse.tune.latency.bench import layer_module
from deploy_sparse.tune.latency.graphs import layer_graph, without_reorders
from deploy_sparse.tune.latency.shapes import LayerShape, shape_from_json, shapes_of


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.grouped = nn.Conv2d(8, 16, 1, groups=2)
        self.twice = nn.Conv2d(16, 16, 1)
        self.tokens = nn.Linear(16, 12, bias=False)
        self.line = nn.Conv1d(12, 6, 3, padding=2, dilation=2)
        self.head = nn.Linear(6, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x):
        x = self.twice(self.twice(self.grouped(self.depthwise(self.stem(x)))))
        x = self.tokens(x.flatten(2).mT)
        return self.head(self.line(x.mT).mean(-1))


def test_layers_are_found_with_all_that_decides_their_time():
    network = Mixed().train()
    found = shapes_of(network, torch.randn(2, 3, 8, 10))
    assert found == {
        "stem": LayerShape("conv", 3, 8, (3, 3), (2, 2), (1, 1), height=8, width=10),
        "depthwise": LayerShape("depthwise", 8, 8, (3, 3), padding=(1, 1), groups=8, height=4, width=5),
        "grouped": LayerShape("conv", 8, 16, groups=2, height=4, width=5),
        "tokens": LayerShape("linear", 16, 12, tokens=20, bias=False),
        "line": LayerShape("conv", 12, 6, (1, 3), padding=(0, 2), dilation=(1, 2), height=1, width=20),
        "head": LayerShape("linear", 6, 4),
    }
    assert network.training  # and no hook is left
    assert not any(module._forward_hooks for module in network.modules())
    assert [str(found[path]) for path in ("stem", "depthwise", "grouped", "tokens", "line")] == [
        "conv 3x3 3->8 @8x10 stride 2",
        "depthwise 3x3 8->8 @4x5",
        "conv 1x1 8->16 @4x5 groups 2",
        "linear 16->12 x20",
        "conv 1x3 12->6 @1x20 dilation 1x2",
    ]


def test_shapes_survive_json():
    for shape in shapes_of(Mixed(), torch.randn(1, 3, 8, 10)).values():
        assert shape_from_json(shape.as_json()) == shape
    with pytest.raises(ValueError, match="unknown kind of layer 'norm'"):
        shape_from_json({**shape.as_json(), "kind": "norm"})


def test_a_padding_of_its_own_is_part_of_the_input():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    assert shapes_of(network, torch.randn(1, 3, 6, 6))["0"] == LayerShape("conv", 3, 4, (3, 3), height=8, width=8)


def test_frames_in_the_batch_are_tokens():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 7)

        def forward(self, x):
            return self.linear(x.flatten(0, 1))

    assert shapes_of(Frames(), torch.randn(2, 3, 5))["linear"] == LayerShape("linear", 5, 7, tokens=3)


def test_a_depthwise_layer_has_one_count():
    layer = LayerShape("depthwise", 8, 16, (3, 3), groups=8, height=4, width=4)
    assert layer.with_counts(4, 16) == LayerShape("depthwise", 4, 8, (3, 3), groups=4, height=4, width=4)


def test_networks_without_layers_or_with_wrong_inputs_are_refused():
    with pytest.raises(ConfigError, match="Sequential runs no convolution or linear layer"):
        shapes_of(nn.Sequential(nn.ReLU()), torch.randn(1, 3))
    with pytest.raises(SurgeryError, match="Sequential does not run on the example inputs"):
        shapes_of(nn.Sequential(nn.Linear(3, 4)), torch.randn(1, 5))


convolutions = st.builds(
    LayerShape,
    st.just("conv"),
    st.sampled_from([4, 16, 20]),
    st.sampled_from([16, 24]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 1), st.integers(0, 1)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from([1, 2, 4]),
    st.integers(6, 9),
    st.integers(6, 9),
)


@settings(max_examples=25, deadline=None)
@given(convolutions)
def test_the_graph_of_a_convolution_is_the_modules(shape):
    graph = layer_graph(shape)
    onnx.checker.check_model(onnx.load_model_from_string(graph), full_check=True)
    x = torch.randn(2, shape.c_in, shape.height, shape.width)
    module = _with_weights_of(graph, layer_module(shape))
    with torch.no_grad():
        expected = module(x)
    found = OrtSession(graph).run({"input": x.numpy()})["output"]
    assert tuple(found.shape[2:]) == shape.output
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "shape",
    [
        LayerShape("linear", 6, 5),
        LayerShape("linear", 6, 5, tokens=3),
        LayerShape("linear", 6, 5, tokens=3, bias=False),
    ],
    ids=str,
)
def test_the_graph_of_a_linear_layer_is_the_modules(shape):
    graph = layer_graph(shape)
    x = torch.randn(2, 6) if shape.tokens == 1 else torch.randn(2, 3, 6)
    module = _with_weights_of(graph, layer_module(shape), transposed=shape.tokens > 1)
    with torch.no_grad():
        expected = module(x)
    np.testing.assert_allclose(OrtSession(graph).run({"input": x.numpy()})["output"], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        LayerShape("conv", 32, 48, (3, 3), padding=(1, 1), height=6, width=6),
        LayerShape("conv", 20, 24, height=6, width=6),
        LayerShape("conv", 64, 64, (3, 3), groups=2, height=6, width=6),
        LayerShape("depthwise", 32, 32, (3, 3), (2, 2), (1, 1), groups=32, height=7, width=7),
        LayerShape("conv", 3, 32, (3, 3), height=6, width=6),
    ],
    ids=str,
)
def test_a_layer_amid_a_network_computes_the_same_on_blocks(shape):
    graph = layer_graph(shape)
    inner = without_reorders(graph, 1)
    if inner is None:
        pytest.skip("ONNX Runtime has no blocked layout on this CPU")
    operators = [node.op_type for node in onnx.load_model_from_string(inner).graph.node]
    assert operators == ["Conv"]
    x = np.random.default_rng(0).standard_normal((2, shape.c_in, shape.height, shape.width), dtype=np.float32)
    expected = OrtSession(graph).run({"input": x})["output"]
    channels = onnx.load_model_from_string(inner).graph.input[0].type.tensor_type.shape.dim[1].dim_value
    made = OrtSession(inner).run({"input": x if channels == 3 else _blocked(x, channels)})["output"]
    np.testing.assert_allclose(_plain(made)[:, : shape.c_out], expected, atol=1e-5)


def test_a_layer_that_runs_plain_stays_as_it_is():
    assert without_reorders(layer_graph(LayerShape("conv", 31, 31, (3, 3), height=6, width=6)), 1) is None


def _block():
    """Channels of a block on this CPU, from the padded output of a narrow layer."""
    inner = without_reorders(layer_graph(LayerShape("conv", 4, 4, height=4, width=4)), 1)
    return onnx.load_model_from_string(inner).graph.output[0].type.tensor_type.shape.dim[1].dim_value


def _blocked(x, channels):
    padded = np.zeros((len(x), channels, *x.shape[2:]), np.float32)
    padded[:, : x.shape[1]] = x
    blocks = padded.reshape(len(x), -1, _block(), *x.shape[2:]).transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(blocks).reshape(padded.shape)


def _plain(y):
    block = _block()
    blocks = y.reshape(len(y), -1, *y.shape[2:], block).transpose(0, 1, 4, 2, 3)
    return blocks.reshape(y.shape)


def _with_weights_of(graph, module, transposed=False):
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(graph).graph.initializer}
    layer = module[0] if isinstance(module, nn.Sequential) else module
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(tensors["weight"].T if transposed else tensors["weight"]))
        if layer.bias is not None:
            layer.bias.copy_(torch.tensor(tensors["bias"]))
    return module
