"""The planner: what loses stays dense, the dense network is taken unless another beats it, times are kept."""

import json

import onnxruntime
import pytest
import torch
from torch import nn

from deploy_sparse.engine import _trt, pieces
from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import ConfigError
from deploy_sparse.surgery import load_compact
from deploy_sparse.surgery.pack import layer_forms
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.tune import formats, layer_bench
from deploy_sparse.tune.formats import Choice, LayerTime, NetworkTime, choose_format
from deploy_sparse.tune.layer_bench import LayerBench

CPU = load_target("cpu")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
EVEN, ODD = torch.arange(0, 32, 2), torch.arange(1, 32, 2)


def network():
    torch.manual_seed(0)
    layers = [
        layer for c in (3, 32, 32, 32) for layer in (nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()


def ticket(crossing=("9",)):
    """Disjoint blocks for three layers; those of ``crossing`` read the halves that no other layer writes."""
    masks = {}
    for path in ("3", "6", "9"):
        mask = torch.zeros(32, 32, 3, 3, dtype=torch.bool)
        reads = (torch.arange(16), torch.arange(16, 32)) if path in crossing else (EVEN, ODD)
        for rows, columns in zip((EVEN, ODD), reads, strict=True):
            mask[rows[:, None], columns] = True
        masks[f"{path}.weight"] = mask
    return Ticket(network().state_dict(), masks, ModelRef("user factory", {}, (3, 8, 8)), Provenance("test"))


class FakeBench:
    """Says what each layer's time is, and remembers what it was asked."""

    def __init__(self, ratios):
        self.ratios_of, self.asked = ratios, []

    def __call__(self, target, batch, duration_s, cache):
        return self

    def ratios(self, forms):
        self.asked.append([str(form) for form in forms])
        return [self.ratios_of(form) for form in forms]


def choose(monkeypatch, ratios, networks, **options):
    """The planner with made-up times: of layers by their form, of networks by name."""
    bench, seen = FakeBench(ratios), {}

    def timed(made, target, batch, duration_s):
        seen.update(made)
        return tuple(NetworkTime(name, 1, *networks(name)) for name in made if name != "dense")

    monkeypatch.setattr(formats, "LayerBench", bench)
    monkeypatch.setattr(formats, "_networks", timed)
    said = []
    found, choice = choose_format(ticket(**options), network, CPU, X, say=said.append)
    return found, choice, bench, seen, said


def packed(found):
    return found.plan.shape.packed


def test_losers_stay_dense_and_the_rest_is_arranged_again(monkeypatch):
    """The layer that crosses needs a look-up and loses; the two others fit together without any."""
    found, choice, bench, _, said = choose(
        monkeypatch, lambda form: 0.7 if "look-up" in str(form) and "no look-up" not in str(form) else 2.0, lambda name: (1.5, 1.4, 1.6)
    )  # fmt: skip
    first, *later = bench.asked
    assert len(first) == 3
    assert sum("no look-up" not in text for text in first) == 1
    assert later == [["2 disjoint blocks, no look-up"] * 2]
    assert len(packed(found)) == 2
    assert choice.name == "packed"
    by_layer = {time.layer: time for time in choice.layers}
    assert {path for path, time in by_layer.items() if time.packed} == packed(found)
    (loser,) = {"3", "6", "9"} - packed(found)
    assert by_layer[loser].ratio == 0.7
    assert by_layer[loser].share == 0.5
    assert type(found.module[int(loser)]) is nn.Conv2d
    assert any(
        line.startswith(f"{loser}: 2 disjoint blocks, look-up") and line.endswith("0.70x of dense") for line in said
    )
    assert found.parity.float64.max_rel < 1e-12


def test_a_layer_that_hardly_gains_stays_dense(monkeypatch):
    found, choice, *_ = choose(monkeypatch, lambda form: 1 + formats.MARGIN / 2, lambda name: (1.5, 1.4, 1.6))
    assert "packed" not in [network.name for network in choice.networks]
    assert not any(time.packed for time in choice.layers)
    assert choice.name == "dense"
    assert packed(found) == frozenset()


def test_times_that_never_settle_end(monkeypatch):
    """A layer loses each time the others are arranged again; what won in its last form is packed."""
    count = iter(range(100))

    def ratio(form):
        return 0.5 if next(count) in (0, 4) else 2.0

    found, choice, bench, *_ = choose(monkeypatch, ratio, lambda name: (1.5, 1.4, 1.6))
    assert [len(asked) for asked in bench.asked] == [3, 2, 1]
    assert len(packed(found)) == 1
    assert choice.name == "packed"


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ((0.9, 0.8, 0.95), "dense"),
        ((1.1, 0.99, 1.2), "dense"),  # not surely faster
        ((1.1, 1.01, 1.2), "packed"),
        ((1.1, None, None), "packed"),
        ((0.99, None, None), "dense"),
    ],
)
def test_the_dense_network_is_taken_unless_another_beats_it(monkeypatch, times, name):
    found, choice, _, seen, _ = choose(monkeypatch, lambda form: 2.0, lambda _: times)
    assert choice.name == name
    assert "packed" in seen
    assert bool(packed(found)) == (name == "packed")
    assert found.plan.choice == tuple(choice.lines())
    assert found.plan.notes()[: len(found.plan.choice)] == choice.lines()
    if name == "dense":
        expected = ticket().masked_weights()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.module.state_dict().items())


def test_the_fastest_of_those_that_are_surely_faster_is_taken(monkeypatch):
    """A wider interval around a higher ratio does not hide a network that is faster for sure."""

    def masks_with_a_cut():
        made = ticket()
        mask = made.masks["3.weight"].clone()
        mask[:2] = False
        return Ticket(made.weights, {**made.masks, "3.weight": mask}, made.model, made.provenance)

    monkeypatch.setattr(formats, "LayerBench", FakeBench(lambda form: 2.0))
    times = {"packed": (1.6, 0.9, 2.0)}
    monkeypatch.setattr(
        formats,
        "_networks",
        lambda made, *_: tuple(NetworkTime(n, 1, *times.get(n, (1.2, 1.1, 1.3))) for n in made if n != "dense"),
    )
    _, choice = choose_format(masks_with_a_cut(), network, CPU, X)
    assert choice.name.startswith("channels")


def test_lines_say_what_was_timed():
    layers = (LayerTime("a", "form", 0.5, 2.0, True), LayerTime("b", "form", 0.5, 0.7, False))
    networks = (NetworkTime("channels", 9, 0.98, 0.9, 1.0), NetworkTime("packed", 5, 1.523, 1.5, 1.6))
    assert Choice("packed", "cpu", 4, layers, networks).lines() == [
        "chosen for cpu at batch 4: packed",
        "  channels: 0.98x as fast as dense",
        "  packed: 1.52x as fast as dense",
        "  1 of 2 layers of blocks are faster packed",
    ]
    assert Choice("dense", "cpu", 1, (), ()).lines() == ["chosen for cpu at batch 1: dense"]


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
    for text in ("{", "[]", '{"ratio": "fast"}', "{}", '{"ratio": null}'):
        files[0].write_text(text)
        again, timed = bench(monkeypatch, cache, ratio=3.0)
        assert sorted(set(again.ratios(forms))) == [2.0, 3.0]
        assert sum(map(len, timed)) == 1
        assert json.loads(files[0].read_text())["ratio"] == 3.0


def test_other_machines_targets_and_batches_have_times_of_their_own(monkeypatch, forms, tmp_path):
    made, _ = bench(monkeypatch, tmp_path)
    made.ratios(forms)
    known = len(list(tmp_path.iterdir()))
    LayerBench(CPU, 2, 0.1, tmp_path).ratios(forms)
    assert len(list(tmp_path.iterdir())) == 2 * known
    real = layer_bench.environment
    monkeypatch.setattr(layer_bench, "environment", lambda: {**real(), "processor": "another"})
    LayerBench(CPU, 1, 0.1, tmp_path).ratios(forms)
    assert len(list(tmp_path.iterdir())) == 3 * known


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
    LayerBench(CPU, 1, 0.1, None)._files({"k": layer_forms(module, made.masks, (), (X.double(),))[0]}, tmp_path)
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


def test_a_ticket_is_timed_and_the_choice_is_loaded_again(tmp_path):
    """The whole of it, on ONNX Runtime; which one wins is not for a test to say."""
    said = []
    found, choice = choose_format(
        ticket(crossing=()), network, CPU, X, duration_s=0.1, cache=tmp_path / "times", say=said.append
    )
    assert [time.layer for time in choice.layers] == ["3", "6", "9"]
    assert all(time.share == 0.5 and time.ratio > 0 for time in choice.layers)
    assert len(said) >= 3
    assert list((tmp_path / "times").iterdir())
    names = [other.name for other in choice.networks]
    assert ("packed" in names) == any(time.packed for time in choice.layers)
    for other in choice.networks:
        assert other.ratio > 0
        assert other.low is None or other.low <= other.ratio <= other.high
    assert choice.name in ("dense", *names)
    assert found.plan.choice[0] == f"chosen for cpu at batch 1: {choice.name}"
    loaded = load_compact(found.save(tmp_path / "found", program=False), network)
    with torch.no_grad():
        assert torch.equal(loaded(X), found.module(X))


def test_a_ticket_without_any_structure_is_deployed_dense_and_nothing_is_timed(monkeypatch):
    made = ticket()
    scattered = {name: torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5 for name, mask in made.masks.items()}  # fmt: skip
    monkeypatch.setattr(formats, "build_engine", lambda *_, **__: pytest.fail("built"))
    found, choice = choose_format(Ticket(made.weights, scattered, made.model, made.provenance), network, CPU, X)
    assert choice == Choice("dense", "cpu", 1, (), ())
    assert found.plan.choice == ("chosen for cpu at batch 1: dense",)


def test_a_target_that_does_not_run_here_is_refused_before_anything_else(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    if _trt.local_gpu() is not None:
        pytest.skip("a GPU is here")
    monkeypatch.setattr(formats, "compact", lambda *_, **__: pytest.fail("surgery first"))
    with pytest.raises(ConfigError) as caught:
        choose_format(ticket(), network, load_target("rtx-sm89"), X)
    for part in (
        "target 'rtx-sm89' cannot be timed here: ",
        "no NVIDIA GPU",
        "choose the format 'channels' or 'packed'",
    ):
        assert part in str(caught.value)
