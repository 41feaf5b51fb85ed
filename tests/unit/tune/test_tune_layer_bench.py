"""Layers timed by themselves: each kind once, kept in files, and what cannot be timed told."""

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from deploy_sparse.engine.onnx import pieces
from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import ArtifactError, BuildError, EngineError, ExportError, Interrupted
from deploy_sparse.surgery.pack import layer_forms
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.tune import layer_bench
from deploy_sparse.tune.layer_bench import LayerBench, layer_times_folder

CPU = load_target("cpu")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
EVEN, ODD = torch.arange(0, 32, 2), torch.arange(1, 32, 2)


def network():
    torch.manual_seed(0)
    layers = [
        layer for c in (3, 32, 32, 32) for layer in (nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()


def ticket():
    """Disjoint blocks for three layers; those of the last read the halves that no other layer writes."""
    masks = {}
    for path in ("3", "6", "9"):
        mask = torch.zeros(32, 32, 3, 3, dtype=torch.bool)
        reads = (torch.arange(16), torch.arange(16, 32)) if path == "9" else (EVEN, ODD)
        for rows, columns in zip((EVEN, ODD), reads, strict=True):
            mask[rows[:, None], columns] = True
        masks[f"{path}.weight"] = mask
    return Ticket(network().state_dict(), masks, ModelRef("user factory", {}, (3, 8, 8)), Provenance("test"))


@pytest.fixture
def forms():
    module, made = network(), ticket()
    module.load_state_dict(made.masked_weights())
    return layer_forms(module, made.masks, (), (X,))


def bench(monkeypatch, cache, ratio=2.0):
    """A bench that counts what it times."""
    timed = []

    def fake(self, wanted):
        timed.append([form.path for form in wanted.values()])
        return dict.fromkeys(wanted, ratio)

    monkeypatch.setattr(LayerBench, "_timed", fake)
    return LayerBench(CPU, 1, 0.1, cache), timed


def test_layers_of_one_kind_are_timed_once(monkeypatch, forms, tmp_path):
    """Two of the three layers differ only in their numbers."""
    made, timed = bench(monkeypatch, None)
    assert made.ratios(forms) == [2.0] * 3
    assert len({json.dumps(form.description(), sort_keys=True) for form in forms}) == len(timed[0])
    assert len(timed[0]) < 3
    assert made.ratios(forms) == [2.0] * 3
    assert timed[1:] in ([], [[]])
    assert not list(tmp_path.iterdir())


def test_times_are_kept_in_files_and_damaged_ones_are_taken_again(monkeypatch, forms, tmp_path):
    cache = tmp_path / "times"
    made, timed = bench(monkeypatch, cache)
    made.ratios(forms)
    files = sorted(cache.iterdir())
    assert len(files) == len(timed[0])
    assert {json.loads(file.read_text())["target"] for file in files} == {"cpu"}
    again, timed = bench(monkeypatch, cache, ratio=3.0)
    assert again.ratios(forms) == [2.0] * 3
    assert not any(timed)
    for text in ("{", "[]", '{"ratio": "fast"}', "{}", '{"ratio": null}', '{"ratio": NaN}', '{"ratio": -1}'):
        files[0].write_text(text)
        again, timed = bench(monkeypatch, cache, ratio=3.0)
        assert sorted(set(again.ratios(forms))) == [2.0, 3.0]
        assert sum(map(len, timed)) == 1
        assert json.loads(files[0].read_text())["ratio"] == 3.0


def test_what_a_time_depends_on_has_times_of_its_own(monkeypatch, forms, tmp_path):
    """Batch, duration, target, this package's version, how blocks are padded, and the machine."""
    made, timed = bench(monkeypatch, tmp_path)
    made.ratios(forms)
    known = count = len(list(tmp_path.iterdir()))
    real = layer_bench.environment
    benches = [
        lambda: LayerBench(CPU, 2, 0.1, tmp_path),
        lambda: LayerBench(CPU, 1, 0.2, tmp_path),
        lambda: LayerBench(CPU.model_copy(update={"threads": 2}), 1, 0.1, tmp_path),
        lambda: changed("environment", lambda: {**real(), "deploy-sparse": "9.9"}),
        lambda: changed("environment", lambda: {**real(), "processor": "another"}),
        lambda: changed("TILE", 8),
    ]

    def changed(name, value):
        monkeypatch.setattr(layer_bench, name, value)
        return LayerBench(CPU, 1, 0.1, tmp_path)

    for make in benches:
        make().ratios(forms)
        count += known
        assert len(list(tmp_path.iterdir())) == count
    changed("environment", lambda: {**real(), "python": "9.9"}).ratios(forms)
    changed("TILE", 16).ratios(forms)
    timed.clear()
    LayerBench(CPU, 1, 0.1, tmp_path).ratios(forms)
    assert timed == [[]]


def test_a_folder_that_cannot_be_written_keeps_nothing(monkeypatch, forms, tmp_path):
    (tmp_path / "file").write_text("no folder")
    made, timed = bench(monkeypatch, tmp_path / "file" / "times")
    assert made.ratios(forms) == [2.0] * 3
    assert len(timed) == 1


def test_files_are_written_whole_or_not_at_all(monkeypatch, forms, tmp_path):
    made, _ = bench(monkeypatch, tmp_path)
    written = []

    def full(path, value):
        written.append(path)
        raise ArtifactError("no room", expected="room", fix="make some")

    monkeypatch.setattr(layer_bench, "write_json", full)
    made.ratios(forms)
    assert written
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "HOME/.cache/deploy-sparse/layer-times"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/deploy-sparse/layer-times"),
        ({"XDG_CACHE_HOME": "relative"}, "HOME/.cache/deploy-sparse/layer-times"),
        ({"DEPLOY_SPARSE_LAYER_TIMES": "mine", "XDG_CACHE_HOME": "/caches"}, "mine"),
        ({"DEPLOY_SPARSE_LAYER_TIMES": "off"}, None),
        ({"DEPLOY_SPARSE_LAYER_TIMES": "OFF"}, None),
    ],
)
def test_times_are_kept_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path, variables, folder):
    for name in ("XDG_CACHE_HOME", "DEPLOY_SPARSE_LAYER_TIMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert layer_times_folder() == (None if folder is None else Path(folder.replace("HOME", str(tmp_path))))


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    for name in ("XDG_CACHE_HOME", "DEPLOY_SPARSE_LAYER_TIMES"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", homeless)
    assert layer_times_folder() is None


def test_a_layer_that_does_not_export_does_not_keep_others_from_being_timed(monkeypatch, forms, tmp_path):
    real, calls = layer_bench.export_pieces, []

    def export(modules, inputs, folder):
        calls.append(len(modules))
        if any(module is forms[0].packed for module in modules.values()):
            raise ExportError("no such operator", expected="one", fix="none")
        return real(modules, inputs, folder)

    monkeypatch.setattr(layer_bench, "export_pieces", export)
    made = LayerBench(CPU, 1, 0.02, tmp_path)
    first, *others = made.ratios([forms[0], forms[2]])
    assert first == "no such operator"
    assert others[0] > 0
    assert calls == [4, 2, 2]
    assert len(list(tmp_path.iterdir())) == 1  # a failure is not kept
    assert made.ratios([forms[0]]) == ["no such operator"]
    assert calls == [4, 2, 2]


@pytest.mark.parametrize("problem", [ExportError, BuildError, EngineError])
def test_a_layer_that_does_not_compile_or_run_is_told(monkeypatch, forms, problem):
    def build(*_, name, **options):
        if name == "packed":
            raise problem("does not compile", expected="that it does", fix="none")

    monkeypatch.setattr(layer_bench, "build_engine", build)
    monkeypatch.setattr(LayerBench, "_files", lambda self, forms, scratch: (_Anything(), {}))
    assert LayerBench(CPU, 1, 0.02, None).ratios(forms) == ["does not compile"] * 3


class _Anything(dict):
    def __missing__(self, key):
        return key


def test_a_stop_is_heard_while_layers_are_timed(monkeypatch, forms):
    def poll():
        raise Interrupted("stopped", signal_number=15, fix="go on")

    monkeypatch.setattr(layer_bench, "export_pieces", lambda *_: pytest.fail("went on"))
    with pytest.raises(Interrupted):
        LayerBench(CPU, 1, 0.1, None, poll).ratios(forms)


def test_types_have_times_of_their_own(forms):
    module, made = network().double(), ticket()
    module.load_state_dict(made.masked_weights())
    doubled = layer_forms(module, made.masks, (), (X.double(),))
    assert [form.dtype for form in doubled] == [torch.float64] * 3
    for form, other in zip(forms, doubled, strict=True):
        assert {**form.description(), "dtype": "torch.float64"} == other.description() != form.description()


def test_layers_are_exported_with_inputs_of_their_own_type(monkeypatch, tmp_path):
    module, made = network().double(), ticket()
    module.load_state_dict(made.masked_weights())
    seen = []
    monkeypatch.setattr(layer_bench, "export_pieces", lambda modules, inputs, folder: seen.append(inputs) or {})
    files, why = LayerBench(CPU, 1, 0.1, None)._files(
        {"k": layer_forms(module, made.masks, (), (X.double(),))[0]}, tmp_path
    )
    assert (files, why) == ({}, {})
    assert {name: x.dtype for name, x in seen[0].items()} == {"dense k": torch.float64, "packed k": torch.float64}


@pytest.mark.parametrize("limit", [1, 3000, 10**6])
def test_pieces_are_exported_a_few_at_a_time(monkeypatch, tmp_path, limit):
    monkeypatch.setattr(pieces, "BYTES_AT_ONCE", limit)
    exports = []
    real = pieces.export_onnx
    monkeypatch.setattr(pieces, "export_onnx", lambda *given: exports.append(len(given[1])) or real(*given))
    modules = {name: nn.Linear(16, 16).eval() for name in "abc"}
    inputs = {name: torch.randn(2, 16) for name in modules}
    files = pieces.export_pieces(modules, inputs, tmp_path)
    assert exports == {1: [1, 1, 1], 3000: [2, 1], 10**6: [3]}[limit]
    assert len({file.path for file in files.values()}) == 3
    for name, module in modules.items():
        found = onnxruntime.InferenceSession(files[name].path).run(None, {"input": inputs[name].numpy()})[0]
        assert torch.allclose(torch.from_numpy(found), module(inputs[name]), atol=1e-5)


def test_layers_are_timed_in_pytorch_too(forms, monkeypatch):
    monkeypatch.setattr(layer_bench, "export_pieces", lambda *_: pytest.fail("PyTorch needs no graph"))
    (ratio,) = LayerBench(load_target("torch-cpu"), 1, 0.05, None).ratios(forms[:1])
    assert isinstance(ratio, float)
    assert 0.1 < ratio < 10
