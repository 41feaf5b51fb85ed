"""The scoreboard of surgery: its list and weights, its limits, and how parts are run and resumed."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.errors import SurgeryError


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
