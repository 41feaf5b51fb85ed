"""Export: exact, deterministic, clean, harmless to the module; every failure is one readable error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from engine_samples import TinyNet, make_tiny
from torch import nn

from deploy_sparse.engine.onnx.export import OPSET, export_onnx
from deploy_sparse.engine.onnx.file import OnnxFile, read_onnx, sidecar_path
from deploy_sparse.engine.onnx.runtime import OrtSession
from deploy_sparse.errors import ArtifactError, ExportError


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: torch.Tensor):
        return self.function(*xs)


def test_describes_the_graph(exported: OnnxFile, tiny: TinyNet) -> None:
    assert exported.opset == OPSET == 20
    assert [str(spec) for spec in exported.inputs] == ["input float32 [batch, 1, 8, 8]"]
    assert [str(spec) for spec in exported.outputs] == ["output float32 [batch, 10]"]
    assert exported.parameters == sum(p.numel() for p in tiny.parameters())
    assert exported.macs == 8 * 8 * 4 * 9 + 4 * 4 * 8 * 4 * 9 + 8 * 10
    assert exported.parity is not None
    assert exported.parity.batches == (4, 1, 3)
    assert exported.parity.max_rel < 1e-5
    assert exported.parity.top1 == 1.0


def test_computes_the_module_at_any_batch(exported: OnnxFile, tiny: TinyNet) -> None:
    session = OrtSession(exported.read())
    tiny.eval()
    for batch in (1, 2, 7):
        x = torch.randn(batch, 1, 8, 8)
        with torch.no_grad():
            np.testing.assert_allclose(session.run({"input": x.numpy()})["output"], tiny(x).numpy(), atol=1e-5)
    tiny.train()


def test_same_module_same_bytes_and_no_traces(exported: OnnxFile, tmp_path: Path, capfd) -> None:
    again = export_onnx(make_tiny(), torch.randn(2, 1, 8, 8), tmp_path / "again.onnx")
    assert again.sha256 == exported.sha256
    data = again.read()
    for trace in (b"conftest", b"forward", str(Path(torch.__file__).parent).encode(), str(Path.cwd()).encode()):
        assert trace not in data
    model = onnx.load_model_from_string(data)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert capfd.readouterr() == ("", "")


def test_other_weights_other_bytes(exported: OnnxFile, tmp_path: Path) -> None:
    assert export_onnx(make_tiny(1), torch.randn(2, 1, 8, 8), tmp_path / "x.onnx").sha256 != exported.sha256


def test_module_is_left_as_it_was(tmp_path: Path) -> None:
    network = make_tiny().train()
    network.norm.eval()  # a frozen BatchNorm inside a training network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    export_onnx(network, torch.randn(1, 1, 8, 8), tmp_path / "x.onnx")
    assert network.training
    assert network.conv1.training
    assert not network.norm.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_mode_is_restored_after_a_failure(tmp_path: Path) -> None:
    network = make_tiny().train()
    with pytest.raises(ExportError):
        export_onnx(network, torch.randn(2, 3, 8, 8), tmp_path / "x.onnx")
    assert network.training
    assert not list(tmp_path.iterdir())


def test_object_with_a_module_inside(exported: OnnxFile, tmp_path: Path) -> None:
    found = export_onnx(SimpleNamespace(module=make_tiny()), (torch.randn(2, 1, 8, 8),), tmp_path / "x.onnx")
    assert found.sha256 == exported.sha256


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    network = Lambda(lambda x, y: {"sum": x + y.mean(1, keepdim=True), "parts": (x * 2, [y.argmax(1)])})
    found = export_onnx(network, (torch.randn(2, 4), torch.randn(2, 6)), tmp_path / "x.onnx")
    assert [str(spec) for spec in found.inputs] == ["input_0 float32 [batch, 4]", "input_1 float32 [batch, 6]"]
    assert [spec.name for spec in found.outputs] == ["output_0", "output_1", "output_2"]
    assert found.outputs[2].dtype == "int64"
    assert (found.parameters, found.macs) == (0, 0)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: x if x.sum() > 0 else -x, "Lambda cannot be exported: Could not guard on data-dependent"),
        (lambda x: x.reshape(2, -1), r"computes with one fixed batch size \(2\)"),
        (lambda x: torch.linalg.svd(x)[1], "No ONNX function found for .*linalg_svd"),
        (lambda x: x @ x, "Lambda cannot be exported: .*size"),
        (lambda x: x + torch.rand_like(x), "differs by .* in ONNX Runtime"),
        (lambda x: x / 0, "has NaN or infinite entries"),
        (lambda x: (x, "label"), "the module returns a str"),
    ],
    ids=["branch", "fixed-batch", "no-operator", "shapes", "random", "nan", "output-type"],
)
def test_what_cannot_be_exported(function, text: str, tmp_path: Path, capfd) -> None:
    with pytest.raises(ExportError, match=text) as caught:
        export_onnx(Lambda(function), torch.randn(2, 4, 3), tmp_path / "x.onnx")
    assert "next step:" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (None, "example_inputs holds nothing"),
        ((np.zeros((2, 4)),), "example_inputs holds ndarray"),
        (np.zeros((2, 4)), "example_inputs holds ndarray"),
        ({"x": torch.zeros(2, 4)}, "example_inputs holds dict"),
        (3, "example_inputs holds int"),
        ((torch.zeros(2, 4), torch.zeros(3, 4)), "one batch size"),
        (torch.tensor(1.0), "one batch size of at least 1"),
        (torch.zeros(0, 4), "one batch size of at least 1"),
    ],
)
def test_bad_example_inputs(inputs, text: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=text):
        export_onnx(Lambda(lambda *xs: xs[0]), inputs, tmp_path / "x.onnx")


def test_no_module(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"a dict was given(.|\n)*load it first"):
        export_onnx({"weight": torch.zeros(1)}, torch.zeros(2, 4), tmp_path / "x.onnx")


@pytest.mark.parametrize("path", [None, 3])
def test_no_path(path: object) -> None:
    with pytest.raises(ExportError, match=r"the path is of type (.|\n)*'model\.onnx'"):
        export_onnx(make_tiny(), torch.randn(2, 1, 8, 8), path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64, torch.float16])
def test_input_of_another_type_than_the_weights_is_named(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(make_tiny(), torch.ones(2, 1, 8, 8, dtype=dtype), tmp_path / "x.onnx")
    assert caught.value.given == f"example input 0 is {dtype}; the weights are torch.float32"
    assert caught.value.fix == "convert the example inputs: tensor.float()"


def test_weights_of_another_type_than_the_input_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"0 is torch\.float32; the weights are torch\.float64(.|\n)*module\.float\(\)"
    ):
        export_onnx(make_tiny().double(), torch.randn(2, 1, 8, 8), tmp_path / "x.onnx")


def test_integer_inputs_are_right_for_an_embedding(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    assert export_onnx(network, torch.ones(2, 2, dtype=torch.int64), tmp_path / "x.onnx").inputs[0].dtype == "int64"
    with pytest.raises(ExportError, match=r"cannot be exported: .*cannot be multiplied"):  # types are not the reason
        export_onnx(network, torch.ones(2, 4, dtype=torch.int64), tmp_path / "x.onnx")


def test_double_precision_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Conv(.|\n)*module\.float\(\)"):
        export_onnx(make_tiny().double(), torch.randn(2, 1, 8, 8).double(), tmp_path / "x.onnx")


def test_export_replaces_file_and_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.onnx"
    first = export_onnx(Lambda(lambda x: x + 1), torch.zeros(2, 4), path)
    second = export_onnx(Lambda(lambda x: x + 2), torch.ones(2, 4), path)
    assert first.sha256 != second.sha256
    assert read_onnx(path) == second
    with pytest.raises(ArtifactError, match="is damaged: its SHA-256"):
        first.read()
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.onnx", sidecar_path(path).name]


def test_failed_export_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    kept = export_onnx(Lambda(lambda x: x + 1), torch.zeros(2, 4), path)
    with pytest.raises(ExportError):
        export_onnx(Lambda(lambda x: x.reshape(2, -1)), torch.zeros(2, 4, 4), path)
    assert read_onnx(path) == kept


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot be"):
        export_onnx(Lambda(lambda x: x + 1), torch.zeros(2, 4), tmp_path / "file" / "x.onnx")


class Token(nn.Module):
    """Hands a view of its parameter to a submodule, as class attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.layer = nn.Parameter(torch.randn(1, 6)), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.token.expand(x.shape[0], -1)) + x


def test_a_view_of_a_parameter_may_be_passed_to_a_submodule(tmp_path: Path) -> None:
    module = Token()
    module.layer.bias.requires_grad_(False)
    found = export_onnx(module, torch.randn(2, 6), tmp_path / "token.onnx")
    assert found.macs == 36
    assert [p.requires_grad for p in module.parameters()] == [True, True, False]


@pytest.mark.parametrize(
    ("equation", "expected"),
    [("B G d, B H d -> B G H", b"a b c, a d c -> a b d"), ("bgd,bhd->bgh", b"bgd,bhd->bgh")],
)
def test_einsums_are_written_in_small_letters(tmp_path: Path, equation, expected) -> None:
    module = Lambda(lambda x: torch.einsum(equation, x, x))
    found = export_onnx(module, torch.randn(2, 3, 4), tmp_path / "einsum.onnx")
    (node,) = [node for node in onnx.load(found.path).graph.node if node.op_type == "Einsum"]
    assert node.attribute[0].s == expected
