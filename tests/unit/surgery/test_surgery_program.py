"""``.pt2`` programs: load without model code, compute the same, and never unpickle or run what a file says."""

import copy
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from deploy_sparse.artifact import write_artifact
from deploy_sparse.errors import ArtifactError, ExportError
from deploy_sparse.surgery.program import FILE, load_bytes, load_program, program_bytes, save_program

GRAPH = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Net(nn.Module):
    """Conv, BatchNorm, tied Linear layers, a buffer outside the state dict, a plain tensor, a nested output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(4), persistent=False)
        self.offset = torch.full((4,), 2.0)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3)) * self.scale + self.offset
        with torch.no_grad():
            halves = y.reshape(2 * x.shape[0], -1)
        return {"logits": self.second(self.first(y)), "parts": (halves, nn.functional.pad(y, (1, 1), mode="constant"))}


def leaves(outputs):
    return [outputs["logits"], *outputs["parts"]]


@pytest.fixture(scope="module")
def data():
    return program_bytes(Net(), torch.randn(2, 3, 6, 6))


def changed(data, record, edit):
    """The archive with one record edited, or added."""
    reader, stream = PT2ArchiveReader(io.BytesIO(data)), io.BytesIO()
    with PT2ArchiveWriter(stream) as writer:
        names = [n for n in reader.get_file_names() if n.startswith(("data/", "models/"))]
        for name in dict.fromkeys([*names, record]):
            content = reader.read_bytes(name) if name in names else b""
            writer.write_bytes(name, edit(content) if name == record else content)
    return stream.getvalue()


def test_the_program_computes_the_network_at_any_batch_size(data):
    network, loaded = Net().eval(), load_bytes(data, FILE)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 6, 6)
        for expected, actual in zip(leaves(network(x)), leaves(loaded(x)), strict=True):
            assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)
    assert loaded.state_dict().keys() == network.state_dict().keys()


def test_a_batch_of_one_and_a_training_network_are_fine_and_nothing_changes():
    network = Net().train()
    network.norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    loaded = load_bytes(program_bytes(network, torch.randn(1, 3, 6, 6)), FILE)
    assert leaves(loaded(torch.randn(4, 3, 6, 6)))[0].shape == (4, 4)
    assert (network.training, network.norm.training, network.conv.training) == (True, False, True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_program_trains_and_stays_in_evaluation_mode(data):
    loaded = load_bytes(data, FILE)
    assert loaded.eval() is loaded
    assert not loaded.training
    other = copy.deepcopy(loaded)
    assert other.eval() is other
    with pytest.raises(NotImplementedError, match="fine-tune it as it is"):
        loaded.train()
    loaded(torch.randn(2, 3, 6, 6))["logits"].sum().backward()
    assert loaded.get_parameter("conv.weight").grad is not None


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, 12) @ torch.ones(12, 3)


def test_a_fixed_batch_size_stays_fixed():
    loaded = load_bytes(program_bytes(FixedBatch(), torch.randn(2, 3, 4)), FILE)
    assert loaded(torch.randn(2, 3, 4)).shape == (2, 3)
    with pytest.raises(RuntimeError, match="to be equal to 2"):
        loaded(torch.randn(4, 3, 4))


class TwoInputs(nn.Module):
    def forward(self, *tensors, shift=1):
        tokens, table = tensors
        return table[tokens] + shift


def test_inputs_without_the_batch_axis_keep_their_size():
    loaded = load_bytes(program_bytes(TwoInputs(), (torch.randint(0, 7, (3, 5)), torch.randn(7, 4))), FILE)
    assert loaded(torch.randint(0, 7, (2, 5)), torch.randn(7, 4)).shape == (2, 5, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    loaded = load_bytes(program_bytes(nn.Linear(3, 2).to(dtype), torch.randn(2, 3, dtype=dtype)), FILE)
    assert loaded(torch.randn(4, 3, dtype=dtype)).dtype == dtype


PROGRAM = """
import hashlib, sys
import torch
from deploy_sparse.surgery.program import load_program, program_bytes
loaded = load_program(sys.argv[2])
assert "test_surgery_program" not in sys.modules
print(loaded(torch.zeros(2, 3, 6, 6))["logits"].shape[1])
sys.path.insert(0, sys.argv[1])
from test_surgery_program import Net
print(hashlib.sha256(program_bytes(Net(), torch.zeros(2, 3, 6, 6))).hexdigest())
"""


def test_another_process_loads_without_model_code_and_writes_the_same_bytes(tmp_path, data):
    here = os.path.dirname(__file__)
    (tmp_path / FILE).write_bytes(data)
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, here, str(tmp_path / FILE)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert answer.stdout.split() == ["4", hashlib.sha256(data).hexdigest()]
    graph = PT2ArchiveReader(io.BytesIO(data)).read_string(GRAPH)
    assert here not in graph
    assert ".py" not in graph


def test_loading_unpickles_nothing(data, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    load_bytes(data, FILE)


def test_pytorch_loads_the_file_too(tmp_path, data):
    (tmp_path / FILE).write_bytes(data)
    x = torch.randn(3, 3, 6, 6)
    found = torch.export.load(tmp_path / FILE).module()(x)
    assert torch.allclose(found["logits"], Net().eval()(x)["logits"], atol=1e-6)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /nonexistent/evil",)


def edited(old, new):
    def edit(content):
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    return edit


def in_graph(path, value):
    def edit(content):
        graph = json.loads(content)
        node = graph
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value
        return json.dumps(graph).encode()

    return edit


NODE = ("graph_module", "graph", "nodes", 1)
RUNS = "__import__('os').system('false')"


@pytest.mark.parametrize(
    ("record", "edit", "message"),
    [
        (SAMPLES, lambda _: pickle.dumps((Evil(),)), "pickled sample inputs"),
        (WEIGHTS, edited('"use_pickle": false', '"use_pickle": true'), "the pickled tensor"),
        (WEIGHTS, edited('"weight_0"', '"../weight_0"'), r"the tensor file '../weight_0'"),
        ("data/aotinductor/model/lib.so", lambda _: b"x", r"the record 'data/aotinductor/model/lib.so'"),
        ("data/constants/opaque_obj_0", lambda _: b"x", r"the record 'data/constants/opaque_obj_0'"),
        ("data/weights/model.pt", lambda _: pickle.dumps({"a": Evil()}), r"the record 'data/weights/model.pt'"),
        (GRAPH, in_graph((*NODE, "target"), "torch.os.system"), r"the operator 'torch.os.system'"),
        (GRAPH, in_graph((*NODE, "target"), "torch.ops.aten.from_file.default"), r"the operator 'torch.ops.aten.from_file.default'"),
        (GRAPH, in_graph((*NODE, "target"), "torch.ops.mine.relu.default"), r"the operator 'torch.ops.mine.relu.default'"),
        (GRAPH, in_graph((*NODE, "target"), "torch.ops.deploy_sparse.relu.default"), r"the operator 'torch.ops.deploy_sparse.relu"),
        (GRAPH, in_graph((*NODE, "target"), "torch.ops.deploy_sparse.tensorrt_part"), r"the operator 'torch.ops.deploy_sparse"),
        (GRAPH, in_graph((*NODE, "target"), "torch.ops.aten.__class__.mro"), r"the operator"),
        (GRAPH, in_graph((*NODE, "target"), "#mine:relu"), r"the operator '#mine:relu'"),
        (GRAPH, in_graph((*NODE, "metadata"), {"stack_trace": "x"}), "metadata of a node"),
        (GRAPH, in_graph(("guards_code",), [RUNS]), "guards, which are source code"),
        (GRAPH, in_graph(("graph_module", "graph", "inputs", 0, "as_tensor", "name"), f"x={RUNS}"), r"the name \"x=__import__"),
        (GRAPH, in_graph(("range_constraints",), {RUNS: {"min_val": 2, "max_val": None}}), "the name"),
        (GRAPH, edited("Symbol('s77', positive=True, integer=True)", RUNS), "the size"),
        (GRAPH, edited("Symbol('s77', positive=True, integer=True)", "preview(1)"), "the size 'preview"),
        (GRAPH, edited("builtins.tuple", "collections.defaultdict"), "the container 'collections.defaultdict'"),
        (GRAPH, edited(r'\\\"logits\\\"', r"\\\"a'] or __import__('os') or ['\\\""), "the dictionary key"),
        (GRAPH, in_graph(("torch_version",), "2 ()"), "the version"),
    ],
)  # fmt: skip
def test_whatever_would_run_is_refused_before_it_does(data, record, edit, message, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("reached the loader"))
    with pytest.raises(ArtifactError, match=rf"evil.pt2 holds {message}[\s\S]*do not load it"):
        load_bytes(changed(data, record, edit), "evil.pt2")


def test_an_unchanged_copy_of_the_archive_loads(data):
    load_bytes(changed(data, GRAPH, lambda content: content), FILE)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"nothing of the kind", pytest.param(None, id="zip"), pytest.param(1, id="cut")]
)
def test_other_files_are_no_programs(data, content):
    if content is None:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a/b.txt", "text")
        content = stream.getvalue()
    with pytest.raises(ArtifactError, match=r"x.pt2 is not a readable .pt2 file"):
        load_bytes(data[: len(data) // 2] if content == 1 else content, "x.pt2")


def test_broken_graphs_are_no_programs(data):
    with pytest.raises(ArtifactError, match="does not load with torch"):
        load_bytes(changed(data, GRAPH, in_graph(("graph_module", "graph", "outputs"), [{"as_int": 3}])), "x.pt2")
    with pytest.raises(ArtifactError, match="is not a readable"):
        load_bytes(changed(data, GRAPH, lambda content: content[:-9]), "x.pt2")


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Own(nn.Module):
    def forward(self, x):
        return torch.ops.made_up.twice(x)


def test_networks_without_an_export_form_are_refused_with_the_reason():
    with pytest.raises(ExportError, match=r"Branches has no torch.export form: [\s\S]*load it with its factory"):
        program_bytes(Branches(), torch.ones(2, 3))
    operators = torch.library.Library("made_up", "DEF")
    operators.define("twice(Tensor x) -> Tensor")
    operators.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    with pytest.raises(ExportError, match=r"needs the operator 'torch.ops.made_up.twice.default'"):
        program_bytes(Own(), torch.ones(2, 3))
    with pytest.raises(ExportError, match=r"Linear has no torch.export form"):
        program_bytes(nn.Linear(3, 2), torch.ones(2, 4))


def test_a_program_that_computes_something_else_is_not_handed_out(monkeypatch):
    from deploy_sparse.programs import program

    other = nn.Linear(3, 2).eval()
    monkeypatch.setattr(program, "load_bytes", lambda *_, **__: other)
    with pytest.raises(ExportError, match=r"the program's outputs differ by"):
        program_bytes(nn.Linear(3, 2), torch.ones(2, 3))


def test_files_and_folders(tmp_path, data):
    path = save_program(Net(), torch.randn(2, 3, 6, 6), tmp_path / "net.pt2")
    assert load_program(path).state_dict().keys() == Net().state_dict().keys()
    with pytest.raises(ArtifactError, match=r"path '.*net.onnx'[\s\S]*net.pt2"):
        save_program(Net(), torch.randn(2, 3, 6, 6), tmp_path / "net.onnx")
    folder = write_artifact(tmp_path / "compact", "plan", {FILE: data}, {}).folder
    for given in (folder, folder / FILE, folder / "plan.json"):
        assert load_program(given).state_dict().keys() == Net().state_dict().keys()
    content = bytearray((folder / FILE).read_bytes())
    content[len(content) // 3] ^= 1
    (folder / FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"compact.pt2 is damaged: its SHA-256"):
        load_program(folder)
    bare = write_artifact(tmp_path / "bare", "plan", {"compact.safetensors": b"x"}, {}).folder
    with pytest.raises(ArtifactError, match=r"holds no compact.pt2[\s\S]*factory="):
        load_program(bare)
    with pytest.raises(ArtifactError, match="does not exist"):
        load_program(tmp_path / "nowhere")
