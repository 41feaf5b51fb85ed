"""Torch engines on the CPU: built once, verified, equal to the module, strict about inputs, quiet about everything."""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_samples import TinyNet, make_tiny
from torch import nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from deploy_sparse.artifact import read_artifact, write_artifact
from deploy_sparse.cli.main import main
from deploy_sparse.engine import build as module
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.onnx.file import OnnxFile
from deploy_sparse.engine.pytorch.session import TorchSession
from deploy_sparse.engine.runner import Runner, load_engine
from deploy_sparse.engine.target import Target, load_target
from deploy_sparse.errors import ArtifactError, BuildError, EngineError, ExportError
from deploy_sparse.measure.profile import profile


def target_of(**values: object) -> Target:
    return Target(name="mine", runtime="torch", **values)


@pytest.fixture(scope="module")
def built_torch(tiny: TinyNet, examples: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(tiny, "torch-cpu", examples, tmp_path_factory.mktemp("torch"), name="tiny")


@pytest.fixture(scope="module")
def runner(built_torch: Engine) -> Runner:
    return load_engine(built_torch)


def test_calls_of_threads_run_one_after_another(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, running, most = runner._session._forward, [], []

    def counted(inputs):
        running.append(1)
        most.append(len(running))
        try:
            time.sleep(0.001)
            return forward(inputs)
        finally:
            running.pop()

    monkeypatch.setattr(runner._session, "_forward", counted)
    feeds = runner.sample_inputs(2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: runner.run(feeds), range(12)))
    assert (len(most), max(most)) == (12, 1)


@pytest.fixture
def copied(built_torch: Engine, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built_torch.folder, tmp_path / built_torch.folder.name))


def test_entry_and_manifest(built_torch: Engine, exported: OnnxFile) -> None:
    manifest = built_torch.manifest
    assert built_torch.folder.name == f"tiny-torch-cpu-{manifest['key'][:12]}"
    assert sorted(path.name for path in built_torch.folder.iterdir()) == ["engine.json", "model.pt2"]
    assert built_torch.path == built_torch.folder / "model.pt2"
    assert manifest["program_sha256"] == manifest["files"]["model.pt2"]["sha256"]
    assert manifest["runtime"] == {"name": "torch", "version": torch.__version__}
    assert manifest["precision"]["asked"] == manifest["precision"]["built"] == "fp32"
    assert manifest["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]
    assert manifest["outputs"] == [{"name": "output", "dtype": "float32", "shape": ["batch", 10]}]
    assert manifest["batch"] == {"min": 1, "opt": 1, "max": 256}
    assert (manifest["parameters"], manifest["macs"]) == (exported.parameters, exported.macs)
    assert manifest["parity"]["max_rel"] < 1e-5
    assert manifest["parity"]["top1"] == 1
    assert built_torch.runnable() is None
    assert not built_torch.cached


def test_same_key_is_built_once(built_torch: Engine, examples: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compile", lambda *_: pytest.fail("built again"))
    again = build_engine(make_tiny(), "torch-cpu", examples, built_torch.folder.parent, name="tiny")
    assert again.cached
    assert again.manifest == built_torch.manifest


@pytest.mark.parametrize("name", ["model.pt2", "engine.json"])
def test_tampered_engine_never_reaches_the_loader(copied: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("a damaged engine was opened"))
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 3] ^= 4
    (copied / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"is damaged|is not valid JSON"):
        load_engine(copied)


def rewritten(folder: Path, payload: dict[str, bytes], **changes: object) -> Path:
    """The entry with other content and a manifest that fits it, as somebody who means harm would write it."""
    body = {key: value for key, value in read_artifact(folder, "engine", remake="").body.items() if key != "digest"}
    shutil.rmtree(folder)
    return write_artifact(folder, "engine", payload, {**body, **changes}).folder


def test_a_program_that_would_run_code_is_refused_whatever_its_manifest_says(copied: Path) -> None:
    reader, stream = PT2ArchiveReader(io.BytesIO((copied / "model.pt2").read_bytes())), io.BytesIO()
    with PT2ArchiveWriter(stream) as writer:
        for name in reader.get_file_names():
            if name.startswith(("data/", "models/")):
                content = reader.read_bytes(name)
                writer.write_bytes(name, content.replace(b"torch.ops.aten.relu.default", b"torch.os.system"))
    folder = rewritten(copied, {"model.pt2": stream.getvalue()})
    with pytest.raises(ArtifactError, match=r"model\.pt2 holds the operator 'torch\.os\.system'"):
        load_engine(folder)


def test_a_manifest_that_names_another_file_is_refused(copied: Path) -> None:
    data = (copied / "model.pt2").read_bytes()
    folder = rewritten(copied, {"model.pt2": data, "model.onnx": data}, engine_file="model.onnx")
    with pytest.raises(ArtifactError, match="is no usable engine"):
        open_entry(folder)


def test_a_cpu_engine_runs_on_as_many_threads_as_its_target_says(
    built_torch: Engine, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    runner.run(runner.sample_inputs())
    assert asked == [built_torch.target.threads, 7]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lower_precisions_keep_float32_at_the_border(precision: str, tiny: TinyNet, examples, tmp_path: Path) -> None:
    engine = build_engine(tiny, target_of(precision=precision), examples, tmp_path)
    manifest = engine.manifest
    assert manifest["precision"]["built"] == precision
    assert "float32 inputs and outputs" in manifest["precision"]["read_from"]
    assert {spec["dtype"] for spec in manifest["inputs"] + manifest["outputs"]} == {"float32"}
    eps = torch.finfo({"fp16": torch.float16, "bf16": torch.bfloat16}[precision]).eps
    assert eps / 100 < manifest["parity"]["max_rel"] < 10 * eps
    assert tiny.head.weight.dtype == torch.float32
    with engine.open() as runner:
        feeds = runner.sample_inputs(3)
        expected = tiny.eval()(torch.from_numpy(feeds["input"])).detach().numpy()
        found = runner.run(feeds)["output"]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=10 * eps * np.abs(expected).max())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_attention_is_built_in_lower_precisions(precision: str, tmp_path: Path) -> None:
    """A module runs fused attention, its program does not: they round differently."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    network = nn.Sequential(nn.Linear(16, 64), layer, nn.Linear(64, 5))
    parity = build_engine(network, target_of(precision=precision), torch.randn(2, 9, 16), tmp_path).manifest["parity"]
    assert 0 < parity["max_rel"] < 0.1


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_a_program_that_computes_something_else_is_refused_by_the_name_of_its_module(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Draws in bf16 has no torch\.export form: the program's outputs differ"):
        build_engine(Draws(), target_of(precision="bf16"), torch.randn(2, 3), tmp_path)


class Upcasts(nn.Module):
    def forward(self, x):
        return (x.float() * 2).to(x.dtype)


class Huge(nn.Module):
    def forward(self, x):
        return x.abs() * 1e6 + 1e5


def test_another_precision_than_asked_is_an_error(tiny: TinyNet, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"asked for fp16, but the torch program is fp16 \+ fp32"):
        build_engine(Upcasts(), target_of(precision="fp16"), torch.randn(2, 3), tmp_path)
    with pytest.raises(BuildError, match=r"asked for fp32, but the torch program is bf16(.|\n)*module\.float\(\)"):
        build_engine(nn.Linear(3, 2).bfloat16(), "torch-cpu", torch.randn(2, 3).bfloat16(), tmp_path)
    with pytest.raises(ExportError, match=r"NaN or infinite entries in the fp16 program(.|\n)*build it in bf16"):
        build_engine(Huge(), target_of(precision="fp16"), torch.randn(2, 3), tmp_path)
    assert not list(tmp_path.iterdir())


class Containers(nn.Module):
    """Two inputs; outputs in a dictionary, one of them an input itself, one a view of a buffer, one strided."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(3))

    def forward(self, x, y):
        return {"sum": x + y, "same": x, "parts": (self.scale.expand(x.shape[0], 3), (x * y).t())}


def test_several_inputs_and_outputs_share_no_memory(tmp_path: Path) -> None:
    network = Containers()
    engine = build_engine(network, "torch-cpu", (torch.randn(2, 3), torch.randn(2, 3)), tmp_path)
    with engine.open() as runner:
        assert [str(spec) for spec in runner.inputs] == [f"input_{i} float32 [batch, 3]" for i in range(2)]
        assert [spec.name for spec in runner.outputs] == [f"output_{i}" for i in range(4)]
        assert runner.outputs[3].shape == (3, "batch")
        feeds = runner.sample_inputs(4)
        x, y = feeds.values()
        outputs = list(runner.run(feeds).values())
        for actual, expected in zip(outputs, (x + y, x, np.tile(network.scale, (4, 1)), (x * y).T), strict=True):
            np.testing.assert_array_equal(actual, expected)
            assert actual.flags.c_contiguous
        before = [output.copy() for output in runner.run(feeds).values()]
        for output in outputs:
            output[:] = 7
        for actual, expected in zip(runner.run(feeds).values(), before, strict=True):
            np.testing.assert_array_equal(actual, expected)


class InPlace(nn.Module):
    def forward(self, x):
        return x.flatten(1).add_(1)


def test_feeds_are_never_written_to(tmp_path: Path) -> None:
    with build_engine(InPlace(), "torch-cpu", torch.randn(2, 3, 2), tmp_path).open() as runner:
        feeds = runner.sample_inputs(2)
        before = feeds["input"].copy()
        np.testing.assert_array_equal(runner.run(feeds)["output"], before.reshape(2, 6) + 1)
        run = runner.prepare(feeds)
        run()
        np.testing.assert_array_equal(feeds["input"], before)
        feeds["input"].flags.writeable = False
        np.testing.assert_array_equal(runner.run(feeds)["output"], before.reshape(2, 6) + 1)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, 12)


def test_what_cannot_be_built(exported: OnnxFile, built_torch: Engine, tmp_path: Path) -> None:
    for given in (exported, exported.path):
        with pytest.raises(BuildError, match=r"tiny\.onnx was given for a torch target(.|\n)*pass the network"):
            build_engine(given, "torch-cpu", out=tmp_path)
    for target in ("cpu", "torch-cpu"):
        with pytest.raises(BuildError, match=r"an engine was given(.|\n)*pass the network that it was built from"):
            build_engine(built_torch, target, out=tmp_path)
    with pytest.raises(ArtifactError, match=r"is an engine(.|\n)*pass the network that it was built from"):
        build_engine(built_torch.folder, "torch-cpu", out=tmp_path)
    with pytest.raises(BuildError, match="without example_inputs"):
        build_engine(make_tiny(), "torch-cpu", out=tmp_path)
    with pytest.raises(ExportError, match="lost its batch axis"):
        build_engine(FixedBatch(), "torch-cpu", torch.randn(2, 3, 4), tmp_path)
    with pytest.raises(ExportError, match=r"Branches has no torch\.export form"):
        build_engine(Branches(), "torch-cpu", torch.ones(2, 3), tmp_path)
    assert not list(tmp_path.iterdir())


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_a_failure_inside_pytorch_is_explained(runner: Runner, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("no such luck\nat line 3")

    monkeypatch.setattr(runner._session, "_forward", fails)
    with pytest.raises(EngineError, match=r"PyTorch .* failed while running: no such luck\n"):
        runner.run(runner.sample_inputs())
    with pytest.raises(EngineError, match="no such luck"):
        runner.prepare(runner.sample_inputs())
    assert capfd.readouterr() == ("", "")


def test_gpu_engines_are_built_but_not_opened_without_a_gpu(
    tiny: TinyNet, examples: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module.require_runtime(load_target("torch-cuda"))
    engine = build_engine(tiny, "torch-cuda", examples, tmp_path, name="tiny")
    assert engine.manifest["target"]["cuda_graph"]
    assert engine.runnable() == "compiled, not timed here: no NVIDIA GPU"
    with pytest.raises(EngineError, match=r"is a torch engine for a GPU; here: no NVIDIA GPU(.|\n)*--target torch-cpu"):
        load_engine(engine)


def test_a_pytorch_that_finds_no_gpu_is_told_from_a_machine_without_one(
    built_torch: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    target = load_target("torch-cuda")
    with pytest.raises(EngineError, match=r"PyTorch .* finds no GPU here(.|\n)*PyTorch with CUDA(.|\n)*nvidia-smi"):
        TorchSession(built_torch.path.read_bytes(), target, ["input"], ["output"], where="here", rebuild="again")


def test_rebuild_command_says_what_subject_stands_for(built_torch: Engine) -> None:
    command = built_torch.build_command()
    assert command.startswith(f"deploy-sparse build SUBJECT --target torch-cpu --out {built_torch.folder.parent}")
    assert command.endswith("(SUBJECT: the ticket or compact network that it was built from)")


def test_profile_in_python_and_in_the_shell(built_torch: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    found = profile({"dense": built_torch, "same": built_torch}, duration_s=0.01, warmup_ms=0, block_ms=1)
    assert [(record.status, record.runtime) for record in found.records] == [("timed", "torch")] * 2
    assert main(["profile", f"a={built_torch.folder}", f"b={built_torch.folder}", "--seconds", "0.01"]) == 0
    assert "torch-cpu" in capsys.readouterr().out
    assert main(["show", str(built_torch.folder)]) == 0
    assert "torch" in capsys.readouterr().out


def test_build_in_the_shell(small_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_run[0] / "compact"
    assert main(["build", str(folder), "--target", "torch-cpu", "--out", str(tmp_path)]) == 0
    (made,) = tmp_path.iterdir()
    assert "model.pt2" in capsys.readouterr().out
    with load_engine(made) as runner:
        assert runner.run(runner.sample_inputs(2))["output"].shape[0] == 2


def test_running_loads_neither_onnx_nor_the_kernel(built_torch: Engine) -> None:
    code = (
        "import sys, deploy_sparse; r = deploy_sparse.load_engine(sys.argv[1]); r.run(r.sample_inputs(2)); "
        "r.prepare(r.sample_inputs(2))(); "
        "assert not {'onnx', 'onnxruntime', 'tensorrt', 'deploy_sparse.engine.blocks.triton_kernel'} & set(sys.modules), 'heavy import'"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(built_torch.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_torch_engine_where_pytorch_is_not_installed(
    tiny: TinyNet, examples: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(tiny, "torch-cpu", examples, tmp_path, name="tiny")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "PyTorch is not installed" in str(engine.runnable())
    with pytest.raises(EngineError, match=r"here: PyTorch is not installed\n.*\n  next step: install it: pip install"):
        load_engine(engine)
