"""Engines of every precision: TensorRT-RTX compiles them for real, ONNX Runtime runs them, keys tell them apart."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from precision_samples import NETWORKS, conv_and_norm, exported_network, images, model_of

from deploy_sparse.cli.main import main
from deploy_sparse.engine import build as build_module
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.precision import agreement as agreement_module
from deploy_sparse.engine.precision.reading import layer_formats
from deploy_sparse.engine.target import in_precision, load_target
from deploy_sparse.engine.watch import Stopped
from deploy_sparse.errors import ArtifactError, BuildError, ConfigError

LOW = ("fp16", "bf16", "int8", "fp8")
QUANTIZED = ("int8", "fp8")


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)


def build(name: str, target: str, out: Path, precision: str, **options: object) -> Engine:
    return build_engine(exported_network(name), target, out=out, name=name, precision=precision, **options)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_rtx_compiles(name: str, precision: str, rtx: None, tmp_path: Path) -> None:
    engine = build(name, "rtx-sm89", tmp_path, precision, calibration=images())
    manifest = engine.manifest
    assert engine.folder.name.startswith(f"{name}-rtx-sm89-{precision}-")
    assert (
        manifest["target"]["precision"] == manifest["precision"]["asked"] == manifest["precision"]["built"] == precision
    )
    assert "parsed" in manifest["precision"]["read_from"]
    graph = onnx.load(engine.folder / "model.onnx")
    formats = [*layer_formats(graph).values()]
    assert manifest["precision"]["layers"] == {kind: formats.count(kind) for kind in set(formats)}
    assert precision in formats
    found = manifest["agreement"]
    assert (found["against"], found["data"], found["samples"]) == ("fp32", "the array given", 32)
    assert 0 < found["mean_abs"] <= found["max_abs"]
    assert 0 < found["mean_rel"] < 0.15
    assert found["top1"] >= 0.75
    assert manifest["parity"] == build(name, "cpu", tmp_path, "fp32").manifest["parity"]  # of the fp32 graph
    assert [spec.dtype for spec in (*engine.inputs, *engine.outputs)] == ["float32", "float32"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_runs(name: str, precision: str, tmp_path: Path) -> None:
    engine = build(name, "cpu", tmp_path, precision, calibration=images())
    x = images(8, seed=3)
    with build(name, "cpu", tmp_path, "fp32").open() as exact, engine.open() as runner:
        ours, theirs = exact.run({"input": x})["output"], runner.run({"input": x})["output"]
    assert theirs.dtype == np.float32
    assert 0 < np.abs(ours - theirs).mean() < 0.15 * np.abs(ours).mean()
    assert build(name, "cpu", tmp_path, precision, calibration=images()).cached


def test_bf16_in_onnx_runtime_says_where_else(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"(.|\n)*build in fp32, fp16 or int8"):
        build("resnet", "cpu", tmp_path, "bf16")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="precision 'fp8' only with a TensorRT runtime"):
        build("resnet", "cpu", tmp_path, "fp8", calibration=images())


def test_agreement_without_data_is_on_random_numbers_and_says_so(tmp_path: Path) -> None:
    found = build("resnet", "cpu", tmp_path, "fp16").manifest["agreement"]
    assert (found["data"], found["samples"]) == ("random numbers, seed 0", 16)
    assert "rounded to fp16" in found["computed"]


def test_agreement_counts_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples of three agree; the errors are those of numbers made up for this."""
    ours = {"scores": np.float32([[1, 2], [4, 3], [0, 8]]), "other": np.float32([10, 10, 10])}
    theirs = {"scores": np.float32([[1, 2], [3, 4], [0, 8]]), "other": np.float32([10, 10, 12])}

    class Session:
        def __init__(self, answer: bytes) -> None:
            self.answer = {b"a": ours, b"b": theirs}[answer]

        def run(self, _: object) -> dict[str, np.ndarray]:
            return self.answer

    monkeypatch.setattr(agreement_module, "OrtSession", Session)
    found = agreement_module.agreement(b"a", b"b", [{}, {}], precision="int8", as_written=False)
    assert found == {
        "samples": 6,
        "max_abs": 2.0,
        "mean_abs": pytest.approx(2 / 3),
        "max_rel": pytest.approx(0.2),
        "mean_rel": pytest.approx(2 / 18),
        "top1": pytest.approx(2 / 3),
    }
    monkeypatch.setitem(theirs, "other", np.float32([10, 10, np.inf]))
    with pytest.raises(BuildError, match=r"output 'other' has NaN or infinite entries in fp16; in fp32 it reaches 10"):
        agreement_module.agreement(b"a", b"b", [{}], precision="fp16", as_written=False)


def test_graph_that_onnx_runtime_cannot_run_is_not_compared() -> None:
    nodes = [helper.make_node("MatMul", ["input", "w"], ["output"])]
    model = model_of(nodes, {"w": np.eye(4, dtype=np.float32)})
    x = {"input": np.ones((2, 4), np.float32)}
    plain = model.SerializeToString()
    same = agreement_module.agreement(plain, plain, [x], precision="fp16")
    assert (same["max_abs"], same["top1"], same["samples"]) == (0.0, 1.0, 2)
    found = agreement_module.agreement(plain, b"broken", [x], precision="fp16")
    assert [*found] == ["why_not"]
    assert "ONNX Runtime cannot run the lowered graph" in found["why_not"]


def test_entries_that_are_no_numbers_in_fp32_are_left_out(tmp_path: Path) -> None:
    """Of log(x) half of the outputs are NaN in float32 too; the others are compared."""
    nodes = [helper.make_node("MatMul", ["input", "w"], ["a"], "product"), helper.make_node("Log", ["a"], ["output"])]
    onnx.save(model_of(nodes, {"w": np.eye(4, dtype=np.float32)}), tmp_path / "x.onnx")
    found = build_engine(tmp_path / "x.onnx", "cpu", out=tmp_path, precision="fp16").manifest["agreement"]
    assert 0 < found["mean_abs"] < found["max_abs"] < 0.01


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("after", range(8))
def test_a_build_stops_between_batches(after: int, precision: str, tmp_path: Path) -> None:
    """Whatever look at ``cancel`` it is that finds it true: while calibrating, while comparing."""
    asked = iter([False] * after)
    with pytest.raises(Stopped, match=r"the build was cancelled(.|\n)*next step: start it again; nothing is left"):
        build(
            "packed", "cpu", tmp_path / "out", precision, calibration=[images(4)] * 8, cancel=lambda: next(asked, True)
        )
    assert not (tmp_path / "out").exists()


def test_advice_after_a_time_limit_is_not_another_precision(rtx: None, tmp_path: Path) -> None:
    seen: list[object] = []  # of the compiler, which begins after the last look from outside

    with pytest.raises(Stopped, match=r"cancelled(.|\n)*next step: start it again"):
        build("packed", "rtx-sm89", tmp_path / "out", "fp16", progress=seen.append, cancel=lambda: bool(seen))
    assert seen


def test_no_room_for_the_quantizers_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", full)
    with pytest.raises(ArtifactError, match=r"cannot be written \(No space left on device\)(.|\n)*TMPDIR"):
        build("packed", "cpu", tmp_path / "out", "int8", calibration=images())


def test_a_graph_quantized_for_onnx_runtime_is_not_for_tensorrt(rtx: None, tmp_path: Path) -> None:
    ours = build("packed", "cpu", tmp_path, "int8", calibration=images())
    with pytest.raises(BuildError, match=r"DequantizeLinear(.|\n)*build from the float32 file, with calibration"):
        build_engine(ours.path, "rtx-sm89", out=tmp_path, precision="int8")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_weights_that_are_inputs_too(precision: str, tmp_path: Path) -> None:
    """As in every file of before 2019."""
    model = model_of([helper.make_node("MatMul", ["input", "w"], ["output"])], {"w": 2 * np.eye(4, dtype=np.float32)})
    model.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4, 4]))
    onnx.save(model, tmp_path / "x.onnx")
    x = np.random.default_rng(0).standard_normal((16, 4), np.float32)
    engine = build_engine(tmp_path / "x.onnx", "cpu", out=tmp_path / "out", precision=precision, calibration=x)
    assert [spec.name for spec in engine.inputs] == ["input"]
    with engine.open() as runner:
        assert np.abs(runner.run({"input": x})["output"] - 2 * x).max() < 0.05


def test_result_before_a_relu_keeps_its_negative_numbers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["input", "w"], ["before"], "product"),
        helper.make_node("Relu", ["before"], ["output"], "relu"),
    ]
    model = model_of(nodes, {"w": np.eye(4, dtype=np.float32)})
    model.graph.output.append(helper.make_tensor_value_info("before", onnx.TensorProto.FLOAT, ["n", 4]))
    onnx.save(model, tmp_path / "x.onnx")
    x = np.random.default_rng(0).standard_normal((64, 4), np.float32)
    engine = build_engine(tmp_path / "x.onnx", "cpu", out=tmp_path / "out", precision="int8", calibration=x)
    assert engine.manifest["agreement"]["max_rel"] < 0.02


def test_advice_on_fp8_is_about_gpus_only_where_they_may_be_too_old(rtx: None, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["input", "w"], ["a"], "product"),
        helper.make_node("Dropout", ["a"], ["output", ""], "drop"),
    ]
    onnx.save(model_of(nodes, {"w": np.eye(4, dtype=np.float32)}), tmp_path / "x.onnx")
    data = np.arange(64, dtype=np.float32).reshape(16, 4)
    with pytest.raises(BuildError, match=r"node 'drop'(.|\n)*exclude the layer it names"):
        build_engine(tmp_path / "x.onnx", "rtx-sm89", out=tmp_path / "out", precision="fp8", calibration=data)


def test_activations_beyond_fp16_are_an_error(tmp_path: Path) -> None:
    onnx.save(
        model_of([helper.make_node("Mul", ["input", "w"], ["output"])], {"w": np.float32(6e4)}), tmp_path / "x.onnx"
    )
    with pytest.raises(BuildError, match=r"output 'output' has NaN or infinite entries in fp16(.|\n)*bf16"):
        build_engine(tmp_path / "x.onnx", "cpu", out=tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(precision: str, calibration: object = None, **options: object) -> str:
        return build("packed", "cpu", tmp_path, precision, calibration=calibration, **options).folder.name

    plain = folder("fp32")
    names = {
        plain,
        folder("fp16"),
        folder("fp16", exclude=["head"]),
        folder("int8", images()),
        folder("int8", images(seed=1)),
        folder("int8", images(), exclude=["head"]),
    }
    assert len(names) == 6
    assert folder("fp32", images()) == plain  # has no use for data
    assert build_engine(exported_network("packed"), "cpu", out=tmp_path, name="packed").folder.name == plain
    np.savez(tmp_path / "data.npz", images())
    assert folder("int8", tmp_path / "data.npz") in names  # the same numbers from a file
    monkeypatch.setattr(build_module, "lower", lambda *_: pytest.fail("lowered again"))
    assert folder("int8", images()) in names


@pytest.mark.parametrize("precision", QUANTIZED)
def test_missing_data_and_bad_data(precision: str, rtx: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{precision} without calibration data"):
        build("packed", "rtx-sm89", tmp_path / "out", precision)
    with pytest.raises(ConfigError, match=r"input 'input' has 15 at axis 3"):
        build("packed", "rtx-sm89", tmp_path / "out", precision, calibration=np.ascontiguousarray(images()[..., :15]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_rebuild_from_the_entrys_own_graph_needs_no_data(precision: str, tmp_path: Path) -> None:
    first = build("packed", "cpu", tmp_path, precision, calibration=images(), exclude=["head"])
    assert first.manifest["precision"]["layers"] == {precision: 3, "fp32": 1}
    again = build_engine(first.path, first.target, out=tmp_path / "again", name="packed")
    assert again.path.read_bytes() == first.path.read_bytes()
    for key in ("macs", "parameters"):
        assert again.manifest[key] == first.manifest[key]
    assert again.manifest["precision"]["layers"] == first.manifest["precision"]["layers"]
    assert again.manifest["agreement"]["data"] is None
    with pytest.raises(
        BuildError, match=f"asked for fp32, but the ONNX graph is .*{precision}(.|\n)*with precision {precision}"
    ):
        build_engine(first.path, "cpu", out=tmp_path / "again")
    other = "bf16" if precision == "fp16" else "fp8"
    with pytest.raises(BuildError, match=f"asked for {other}, but of 4 layers .* is {precision}"):
        build_engine(
            first.path, in_precision(load_target("rtx-sm89"), other), out=tmp_path / "again", calibration=images()
        )


def test_turing_takes_matrix_products_in_fp16_only(rtx: None, tmp_path: Path) -> None:
    assert build("resnet", "rtx-sm75", tmp_path, "fp16").manifest["precision"]["built"] == "fp16"
    with pytest.raises(BuildError, match=r"FP32 GEMM is not supported(.|\n)*build with precision fp16"):
        build("resnet", "rtx-sm75", tmp_path, "fp32")
    with pytest.raises(BuildError, match=r"FP32 GEMM is not supported(.|\n)*exclude none of them"):
        build("resnet", "rtx-sm75", tmp_path, "fp16", exclude=["head"])


def test_gpus_without_the_format(rtx: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision 'fp8' only on later GPUs than SM86"):
        build("resnet", "rtx-sm86", tmp_path, "fp8", calibration=images())


def test_a_parser_that_changes_types_is_noticed(rtx: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from deploy_sparse.engine.trt import bindings as trt_bindings

    compile_onnx = trt_bindings.compile_onnx

    def other(*given: object, **named: object) -> object:
        return replace(compile_onnx(*given, **named), float_types=frozenset({"float32"}))

    monkeypatch.setattr(trt_bindings, "compile_onnx", other)
    with pytest.raises(BuildError, match="asked for fp16, but the parsed network is fp32"):
        build("packed", "rtx-sm89", tmp_path, "fp16")


def test_target_file_with_precision_and_exclude(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text('inherits = "cpu"\nprecision = "fp16"\nexclude = ["head", "layer1.*"]\n')
    engine = build_engine(exported_network("resnet"), tmp_path / "board.toml", out=tmp_path / "out")
    assert engine.target.exclude == ("head", "layer1.*")
    assert engine.manifest["precision"]["layers"] == {"fp16": 4, "fp32": 4}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "images.npz", input=images())
    path, out = str(exported_network("packed").path), str(tmp_path / "out")
    words = ["build", path, "--out", out, "--precision", "int8", "--calibration", str(tmp_path / "images.npz")]
    assert main([*words, "--exclude", "head", "cut"]) == 0
    text = capsys.readouterr().out
    assert "cpu-int8" in text
    assert "32 samples (images.npz)" in text
    assert main([*words, "--exclude", "head", "cut", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["cached"]
    assert (value["precision"], value["manifest"]["precision"]["layers"]) == ("int8", {"fp32": 2, "int8": 2})
    assert main(words[:-2]) == 2
    assert "int8 without calibration data" in capsys.readouterr().err
    assert main([*words[:5], "int4"]) == 2
    assert "int4" in capsys.readouterr().err


@pytest.mark.parametrize("operator", ["HardSwish", "Mish"])
def test_operators_that_the_parser_takes_in_fp16_only(operator: str, rtx: None, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["input", "w"], ["a"], "product"),
        helper.make_node(operator, ["a"], ["output"], "bend"),
    ]
    onnx.save(model_of(nodes, {"w": np.eye(4, dtype=np.float32)}), tmp_path / "x.onnx")
    half, brain = (build_engine(tmp_path / "x.onnx", "rtx-sm89", out=tmp_path, precision=p) for p in ("fp16", "bf16"))
    assert half.manifest["precision"]["in_fp32"] == {}
    assert brain.manifest["precision"]["in_fp32"] == {f"{operator} has no bf16 in TensorRT": 1}
    assert brain.manifest["precision"]["layers"] == {"bf16": 1}


def test_operator_that_does_not_compile_in_the_precision(rtx: None, tmp_path: Path) -> None:
    nodes = [helper.make_node("ConvTranspose", ["input", "w"], ["output"], "up")]
    weights = {"w": np.ones((4, 4, 3, 3), np.float32)}
    onnx.save(model_of(nodes, weights, shape=("n", 4, 8, 8), out_shape=("n", 4, 10, 10)), tmp_path / "x.onnx")
    with pytest.raises(BuildError, match=r"exclude the layer it names, or build in fp16"):
        build_engine(tmp_path / "x.onnx", "rtx-sm89", out=tmp_path / "out", precision="bf16")
    build_engine(tmp_path / "x.onnx", "rtx-sm89", out=tmp_path / "out", precision="fp16")


def test_foreign_file_with_norms_for_a_gpu(rtx: None, tmp_path: Path) -> None:
    """BatchNorm after a bf16 convolution has to be folded, and opset 20 has no bf16 convolutions."""
    onnx.save(conv_and_norm(), tmp_path / "x.onnx")
    engine = build_engine(tmp_path / "x.onnx", "rtx-sm89", out=tmp_path, precision="bf16")
    assert engine.manifest["opset"] >= 22
    assert engine.manifest["precision"]["layers"] == {"bf16": 1}


def test_command_line_needs_no_torch_for_an_onnx_file(tmp_path: Path) -> None:
    words = ["build", str(exported_network("packed").path), "--out", str(tmp_path), "--precision", "fp16"]
    code = "import sys; from deploy_sparse.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert "cpu-fp16" in done.stdout
    assert done.stdout.endswith("\nFalse\n")
    assert done.stderr == ""  # no line with progress in a pipe
