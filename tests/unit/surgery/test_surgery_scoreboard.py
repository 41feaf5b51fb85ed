"""The scoreboard of surgery: its list and weights, its limits, how parts are run and resumed, and what its tables say."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.errors import SurgeryError

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def board():
    spec = importlib.util.spec_from_file_location("surgery_scoreboard", FOLDER / "surgery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def subject(board):
    return sys.modules["surgery_subject"]


@pytest.fixture(scope="module")
def part(board):
    return sys.modules["surgery_part"]


@pytest.fixture(scope="module")
def table(board):
    return sys.modules["surgery_table"]


def test_the_list_has_every_classifier_of_torchvision_and_forty_of_timm(subject):
    names = list(subject.subjects())
    torchvision = [name.removeprefix("torchvision/") for name in names if name.startswith("torchvision/")]
    assert sorted(torchvision) == sorted(zoo.imagenet.names())
    assert len(torchvision) == 80
    assert len([name for name in names if name.startswith("timm/")]) == 40
    assert len(names) == 120
    assert {name for name, one in subject.subjects().items() if one.alone} == {
        f"torchvision/{name}" for name in ("regnet_y_128gf", "vit_l_16", "vit_h_14")
    }
    assert subject.subjects()["torchvision/vit_h_14"].arguments == {"image_size": 112}


def test_every_listed_timm_network_exists(subject):
    timm = pytest.importorskip("timm")
    listed = {name.removeprefix("timm/") for name in subject.subjects() if name.startswith("timm/")}
    assert listed <= set(timm.list_models())


class Resting(nn.Module):
    """One parameter of every kind that initialisation leaves at rest."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        nn.init.zeros_(self.head.weight)
        self.layer_scale, self.gate = nn.Parameter(1e-6 * torch.ones(6)), nn.Parameter(torch.zeros(()))
        self.position = nn.Parameter(torch.zeros(1, 5, 6))
        self.temperature = nn.Parameter(torch.full((2, 1, 1), 10.0))

    def forward(self, x):
        return self.head((self.norm(self.conv(x)) * self.layer_scale[:, None, None]).mean((2, 3)) + self.position[:, 0])


def enlivened(subject, seed):
    torch.manual_seed(0)
    model = Resting()
    first = model.conv.weight.clone()
    generator = torch.Generator().manual_seed(seed)
    subject.enliven_(model, (torch.randn(2, 3, 9, 9),), generator)
    return model, first


def test_weights_leave_nothing_at_rest_and_are_the_same_every_time(subject):
    model, first = enlivened(subject, 1)
    model.requires_grad_(False)
    assert torch.equal(model.conv.weight, first)
    assert not any(part.training for part in model.modules())
    for name, parameter in model.named_parameters():
        assert name == "gate" or float(parameter.std()) > 1e-3, name
    assert float(model.gate) == pytest.approx(0.2)
    assert 0.1 <= float(model.layer_scale.min()) < float(model.layer_scale.max()) <= 0.3
    assert 5.0 <= float(model.temperature.min()) < float(model.temperature.max()) <= 15.0
    assert float(model.norm.running_mean.abs().min()) > 1e-4
    assert float((model.norm.running_var - 1).abs().min()) > 1e-4
    assert model.norm.momentum == 0.1
    again, _ = enlivened(subject, 1)
    other, _ = enlivened(subject, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(model.norm.weight, other.norm.weight)


def test_statistics_keep_what_a_norm_makes_of_noise_near_one(subject):
    model = enlivened(subject, 1)[0].requires_grad_(False)
    images = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(5))
    reached = model.conv(images)
    assert torch.allclose(model.norm.running_mean, subject.CENTRED * reached.mean((0, 2, 3)), atol=0.02)
    left = (reached - model.norm.running_mean[:, None, None]).square().mean()
    shares = model.norm.running_var / left
    assert 0.9 < float(shares.min()) < float(shares.max()) < 3.1
    assert float(shares.max() / shares.min()) > 1.2


def test_no_layer_is_louder_than_its_input(subject):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.mul_(50)
        model[3].weight.mul_(0.1)
    quiet = model[3].weight.clone()
    images = torch.randn(2, 3, 3, 3)
    subject.enliven_(model, (images,), torch.Generator().manual_seed(1))
    heard = model[0](torch.randn(256, 3, 3, 3)).square().mean().sqrt()
    assert 0.7 < float(heard.detach()) < 1.3
    assert torch.equal(model[3].weight, quiet)


def test_cpu_time_is_limited_inside_and_not_after(subject):
    def work(seconds):
        started = time.process_time()
        while time.process_time() < started + seconds:
            pass

    with pytest.raises(TimeoutError, match="out of CPU time"), subject.limited(cpu_s=0.05):
        work(1.0)
    with subject.limited(cpu_s=0.05):
        pass
    work(0.1)


def test_memory_is_limited_inside_and_not_after(subject):
    size = 1 << 30
    with pytest.raises((MemoryError, RuntimeError)), subject.limited(memory_gib=subject.peak_gib() * 0.1):
        torch.empty(size, dtype=torch.uint8)
    assert torch.empty(size, dtype=torch.uint8).numel() == size


def stay(kind, reason, channels):
    return SimpleNamespace(kind=kind, reason=reason, channels=tuple(range(channels)))


def test_reasons_are_gathered_without_the_names_of_layers(part):
    groups = (
        SimpleNamespace(size=8, kept=(0, 1, 2, 3), stays=(stay("leak", "constants 1.5e-05 to 2.3 at 'a.b1'", 3),)),
        SimpleNamespace(size=4, kept=(0, 1, 2, 3), stays=(stay("leak", "constants -0.1 to 7 at 'c'", 2),)),
        SimpleNamespace(size=10, kept=tuple(range(10)), stays=(stay("pinned", "network output", 10),)),
    )
    found = part.left(SimpleNamespace(groups=groups))
    assert found == {
        "groups": 3,
        "narrowed": 1,
        "channels": 22,
        "kept": 18,
        "stays": [
            {"kind": "pinned", "reason": "network output", "groups": 1, "channels": 10},
            {"kind": "leak", "reason": "constants n to n at …", "groups": 2, "channels": 5},
        ],
        "reasons": 2,
    }
    assert (
        part.general("unknown operation aten.conv2d.default in 'x.1'") == "unknown operation aten.conv2d.default in …"
    )


def test_what_a_part_raises_is_its_outcome(part, monkeypatch):
    def refuses(subject, report):
        report(stage="surgery", macs=[4, 1])
        raise SurgeryError("it is\n  refused", expected="e", fix="f")

    monkeypatch.setitem(part.PARTS, "silent", refuses)
    found = {}
    part.run(None, "silent", lambda **values: found.update(values))
    assert found.pop("peak_gib") > 0
    assert found == {
        "stage": "surgery",
        "macs": [4, 1],
        "outcome": "failed",
        "reason": "it is refused",
        "error": "SurgeryError",
    }


def test_records_name_no_folders(subject):
    text = "no such\n file '/some/folder-2/of.mine/net.onnx' in a/b, 3 / 4"
    assert subject.on_one_line(text) == "no such file 'net.onnx' in a/b, 3 / 4"
    assert len(subject.on_one_line("word " * 200)) == 400


def test_lines_of_a_part_are_merged_up_to_a_cut(part):
    assert part.merged(['{"a": 1, "b": 2}', '{"a": 3}', '{"c": 4', '{"d": 5}']) == {"a": 3, "b": 2}


@pytest.fixture
def scripted(board, subject, tmp_path, monkeypatch):
    """Measure a part whose process runs the given lines after it reported its stage."""

    def measure(*lines, **limits):
        script = tmp_path / "part.py"
        head = ["import json, os, sys, time", "def report(**v): open(sys.argv[3], 'a').write(json.dumps(v) + '\\n')"]
        script.write_text("\n".join([*head, "report(stage='surgery', cpu_s=1.5)", *lines]))
        monkeypatch.setattr(board, "SCRIPT", script)
        return board.measure(subject.Subject("timm/some", "Some", 64), "silent", **limits)

    return measure


def test_a_part_that_ends_by_itself_gives_its_row(scripted):
    row = scripted("report(outcome='ok', stage=None, said=sys.argv[1:3])")
    assert row.pop("wall_s") > 0
    assert row == {
        "kind": "part",
        "model": "timm/some",
        "part": "silent",
        "family": "Some",
        "image": 64,
        "stage": None,
        "cpu_s": 1.5,
        "outcome": "ok",
        "said": ["timm/some", "silent"],
    }


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["os.kill(os.getpid(), 11)"], "signal 11"),
        (["time.sleep(60)"], "no answer in 0.5 s"),
        (["print('first', file=sys.stderr)", "raise SystemExit('what is wrong')"], "exit 1: what is wrong"),
        (["x = bytearray(1 << 30)"], "exit 1: MemoryError"),
    ],
)
def test_a_part_that_does_not_end_by_itself_is_a_failure_that_keeps_what_was_found(scripted, lines, reason):
    row = scripted(*lines, wall_s=0.5 if "sleep" in lines[0] else 60, memory_gib=0.5)
    assert (row["outcome"], row["reason"], row["error"]) == ("failed", reason, "process")
    assert (row["stage"], row["cpu_s"]) == ("surgery", 1.5)


def done(model, part, outcome="ok"):
    return {"kind": "part", "model": model, "part": part, "outcome": outcome}


def test_what_the_record_has_is_not_measured_again_unless_asked(board):
    models, parts = ["torchvision/resnet1*", "torchvision/resnet34"], ["silent", "peer"]
    rows = [
        {"kind": "conditions"},
        done("torchvision/resnet18", "silent", "failed"),
        done("torchvision/resnet18", "silent"),
    ]
    rows += [done("torchvision/resnet34", "silent"), done("torchvision/resnet34", "silent", "failed")]

    def asked(again, rows=rows):
        found = board.wanted(models, parts, rows, again)
        return [(one.name.removeprefix("torchvision/resnet"), part) for one, part in found]

    everything = [(name, part) for name in ("18", "34", "101", "152") for part in parts]
    assert asked("all") == asked("none", rows[:1]) == everything
    assert asked("none") == [job for job in everything if job not in (("18", "silent"), ("34", "silent"))]
    assert asked("failed") == [job for job in everything if job != ("18", "silent")]


def test_without_the_optional_libraries_the_rest_is_measured(board, monkeypatch):
    jobs = board.wanted(["timm/dla34", "*/resnet18"], ["silent", "peer"], [], "none")
    missing = set()
    monkeypatch.setattr(board, "find_spec", lambda name: None if name in missing else object())
    assert board.possible(jobs) == (jobs, [])
    missing.add("torch_pruning")
    kept, left = board.possible(jobs)
    assert [(one.name, part) for one, part in kept] == [("torchvision/resnet18", "silent"), ("timm/dla34", "silent")]
    assert left == ["torch-pruning is not installed: the part 'peer' is left out"]
    missing.add("timm")
    kept, left = board.possible(jobs)
    assert [(one.name, part) for one, part in kept] == [("torchvision/resnet18", "silent")]
    assert len(left) == 2


def test_large_networks_are_measured_last_and_alone(board, subject, monkeypatch):
    running, most, order = [], {}, []

    def measure(one, part, **limits):
        running.append(one.name)
        time.sleep(0.02)
        most[one.alone] = max(most.get(one.alone, 0), len(running))
        running.remove(one.name)
        return {"model": one.name, **limits}

    monkeypatch.setattr(board, "measure", measure)
    jobs = [(subject.Subject(str(i), "F", 64, alone=i < 3), "silent") for i in range(9)]
    board.run(jobs, 3, lambda row: order.append(row["model"]), wall_s=7.0)
    assert sorted(order[:6]) == [str(i) for i in range(3, 9)]
    assert order[6:] == ["0", "1", "2"]
    assert most[True] == 1
    assert 1 < most[False] <= 3


def test_a_board_goes_on_where_it_stopped_and_refuses_other_conditions(board, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "records" / "results.jsonl", []

    def measure(one, part, **limits):
        calls.append((one.name, part))
        row = {"outcome": "failed", "stage": "ticket", "reason": "no luck", "wall_s": 0.1}
        return {**row, **done(one.name, part, "failed"), "family": one.family, "image": one.image}

    monkeypatch.setattr(board, "measure", measure)
    words = ["surgery.py", "--out", str(out), "--models", "torchvision/resnet18", "--parts"]
    for parts, new in ((["silent"], 1), (["silent", "live"], 1), ([], 0)):
        monkeypatch.setattr(sys, "argv", [*words, *parts])
        before = len(calls)
        board.main()
        assert len(calls) - before == new
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["conditions", "part", "part"]
    assert torch.__version__.startswith(rows[0]["environment"]["torch"])
    printed = capsys.readouterr().out
    assert "torchvision/resnet18 silent: failed at ticket: no luck (0.1 s)" in printed
    assert out.with_suffix(".md").read_text() == board.text(rows)
    assert board.text(rows) in printed
    assert "resnet18" in out.with_name("models.md").read_text()
    lines = out.read_text().splitlines()
    out.write_text("\n".join([json.dumps({**rows[0], "sparsity": 0.7}), *lines[1:]]) + "\n")
    with pytest.raises(SystemExit, match=r"other conditions \(sparsity\): choose another --out"):
        board.main()


def surgery_row(model, kind, *, cpu_s=1.0, macs=(100, 30), error=1e-15, **more):
    own = {"float64": error, "float32": 1e-7, "cpu_s": cpu_s, "macs": list(macs), "parameters": [10, 4]}
    stays = [{"kind": "pinned", "reason": r, "groups": 1, "channels": c} for r, c in (("network output", 9), ("x", 3))]
    row = {**done(model, kind), "family": "F", "image": 64, "groups": {"stays": stays}, "peak_gib": 1.0, **own}
    return {**row, **more}


def attempt(cpu_s, macs=(100, 28), silent=True):
    equal = {"silent": silent, "live": False}
    return {
        "outcome": "ok",
        "cpu_s": cpu_s,
        "macs": list(macs),
        "equal": equal,
        "float64": {"silent": 0.0, "live": 0.9},
    }


def peer_row(model, **attempts):
    return {**done(model, "peer"), "family": "F", "image": 64, **attempts}


def goal(table, rows, start):
    found = [row for row in table.goals(table.Board(rows)).rows if row[0].startswith(start)]
    assert len(found) == 1
    return found[0][1:]


def test_goals_are_met_by_numbers_only(table):
    models = [f"torchvision/m{i:02}" for i in range(80)]
    rows = [surgery_row(model, "silent") for model in models] + [
        peer_row(model, generic=attempt(2.0)) for model in models
    ]
    assert goal(table, rows, "all 80 of torchvision exact, silent") == ("80 of 80", "yes")
    assert goal(table, rows, "all 80 of torchvision exact, live") == ("not measured", None)
    assert goal(table, rows, "relative error") == ("1.0e-15", "yes")
    assert goal(table, rows, "median CPU seconds below Torch-Pruning's, silent")[1] == "yes"
    assert goal(table, rows, "CPU seconds for torchvision's 80: at most 90, silent") == ("80.0 for 80", "yes")
    assert goal(table, rows, "CPU seconds for torchvision's 80: at most 90, live") == ("not measured", None)
    assert goal(table, rows, "no network above 10") == ("1.0 (m79)", "yes")
    found, met = goal(table, rows, "MACs kept no more than Torch-Pruning's (within 0.5%), silent")
    assert met == "no"
    assert found.startswith("0 of 80 networks; most above: m79, by 2.0%")
    assert goal(table, rows[1:], "all 80 of torchvision exact, silent") == ("79 of 79", "no")
    worse = [*rows, surgery_row(models[5], "silent", error=2e-10, cpu_s=12.0, macs=(100, 20))]  # measured again
    assert goal(table, worse, "all 80 of torchvision exact, silent") == ("79 of 80", "no")
    assert goal(table, worse, "relative error") == ("2.0e-10", "no")
    assert goal(table, worse, "CPU seconds for torchvision's 80: at most 90, silent") == ("91.0 for 80", "no")
    assert goal(table, worse, "no network above 10") == ("12.0 (m05)", "no")


def test_a_refused_network_is_no_success_and_is_named(table):
    failed = {**surgery_row("timm/a", "live"), "outcome": "failed", "stage": "proof", "reason": "differs by 0.1"}
    rows = [surgery_row("timm/a", "silent"), failed, surgery_row("timm/b", "silent"), surgery_row("timm/b", "live")]
    assert goal(table, rows, "38 of 40 of timm exact, live") == ("1 of 2", "no")
    assert table.failures(table.Board(rows)).rows == (("timm/a", "live", "proof", "differs by 0.1"),)
    assert table.reasons(table.Board(rows)).rows == (("silent", "pinned", "x", 2, 6), ("live", "pinned", "x", 2, 6))
    assert "differs by 0.1" in table.text(rows)


def test_torch_prunings_better_attempt_counts(table):
    no = {"outcome": "failed", "error": "TypeError", "reason": "int + None"}
    rows = [
        peer_row("torchvision/a", generic=attempt(5.0), own_help=attempt(3.0, silent=False)),
        peer_row("torchvision/b", generic=attempt(4.0), own_help=no),
        {**peer_row("torchvision/c", generic=no), "outcome": "failed", "reason": "int + None"},
        {**peer_row("torchvision/d"), "outcome": "failed", "reason": "signal 9"},
    ]
    board = table.Board(rows)
    assert [board.peer(f"torchvision/{name}").get("cpu_s") for name in "abcd"] == [3.0, 4.0, None, None]
    assert table.peer_failures(board).rows == (("c", "int + None"), ("d", "signal 9"))
    (family,) = table.families(board).rows
    assert dict(zip(table.families(board).columns[9:13], family[9:13], strict=True)) == {
        "Torch-Pruning: through": "2 / 4",
        "equal, silent": "1 / 2",
        "equal, live": "0 / 2",
        "CPU s": "3.00 to 4.00",
    }
    networks = table.networks(board)
    helped = [row[networks.columns.index("help")] for row in networks.rows]
    assert helped == ["own", "none", None, None]


def test_exports_count_where_the_dense_network_compiles(table):
    def export(model, kind, **found):
        return {**done(model, f"export-{kind}"), "family": "F", "image": 64, **found}

    both, graph = (
        {"onnx": {"max_rel": 1e-6}, "engine": {"bytes": 2_000_000}},
        {"onnx": {"max_rel": 1e-6}, "engine": None},
    )
    rows = [export("timm/a", kind, **both) for kind in ("dense", "silent", "live")]
    rows += [export("timm/b", "dense", **graph), export("timm/b", "silent", **graph)]
    rows += [{**export("timm/b", "live"), "outcome": "failed", "stage": "onnx", "reason": "no"}]
    assert goal(table, rows, "ONNX export that agrees in ONNX Runtime, silent") == ("2 of 2", "yes")
    assert goal(table, rows, "ONNX export that agrees in ONNX Runtime, live") == ("1 of 2", "no")
    assert goal(table, rows, "compiles with TensorRT-RTX where the dense network does, live") == ("1 of 1", "yes")
    assert [row[-3:] for row in table.networks(table.Board(rows)).rows] == [("2.0 MB",) * 3, ("no",) * 3]


@pytest.fixture
def peer(board):
    import surgery_peer

    return surgery_peer


def small_network():
    torch.manual_seed(3)
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 3, groups=8, bias=False)]
    model = nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10))
    return model.eval()


def test_masks_of_the_peer_are_rows_and_if_silent_all_that_belongs_to_them(peer):
    live, silent = small_network(), small_network()
    removed = {("0", -1): torch.tensor([1, 4]), ("1", -1): torch.tensor([1, 4]), ("3", -1): torch.tensor([1, 4])}
    peer.mask_(live, removed, silent=False)
    peer.mask_(silent, removed, silent=True)
    plain = small_network()
    for masked in (live, silent):
        for layer in (0, 3):
            gone = masked[layer].weight.flatten(1).abs().sum(1) == 0
            assert gone.nonzero().flatten().tolist() == [1, 4]
    assert torch.equal(live[0].bias, plain[0].bias)
    assert torch.equal(live[1].weight, plain[1].weight)
    assert (silent[0].bias == 0).nonzero().flatten().tolist() == [1, 4]
    assert (silent[1].weight == 0).nonzero().flatten().tolist() == [1, 4]


def test_the_peers_result_is_compared_with_the_channels_it_removed(peer, subject):
    pytest.importorskip("torch_pruning")
    model, dense = small_network(), small_network()
    inputs = (torch.randn(2, 3, 8, 8),)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for network, generator in zip((model, dense), generators, strict=True):
        subject.enliven_(network, inputs, generator)
    pruned = peer.prune(model, inputs, None, classes=10)
    assert [pruned.model[i].weight.shape[0] for i in (0, 1, 3, 6, 8)] == [4, 4, 4, 6, 10]
    kept = torch.tensor([i for i in range(8) if i not in pruned.removed["0", -1].tolist()])
    assert torch.equal(pruned.model[0].weight, dense[0].weight[kept])
    assert ("8", -1) not in pruned.removed
    assert min(pruned.graph_s, pruned.prune_s) > 0
    found = peer.deviations(dense, pruned, inputs)
    assert found["silent"] < 1e-14
    assert found["live"] > 1e-3


def test_the_classifier_is_a_linear_layer_or_a_convolution(peer):
    model = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Linear(10, 4), nn.Conv2d(10, 4, 1))
    assert peer.classifiers(model, 4) == [model[1], model[2]]
