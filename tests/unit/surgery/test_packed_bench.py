"""The benchmarks of packed layers and of shortcuts: masks, tables, and one short measurement of each kind."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from deploy_sparse.engine.target import load_target
from deploy_sparse.structure import row_blocks
from deploy_sparse.surgery import compact
from deploy_sparse.surgery.packed import packing_of
from deploy_sparse.tune.formats import Choice, NetworkTime

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def packed():
    return script("packed")


@pytest.fixture(scope="module")
def shortcuts():
    return script("shortcuts")


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("form", ["disjoint", "equal", "free"])
def test_masks_are_as_many_blocks_of_the_form_and_density_that_are_asked_for(packed, form, parts, ordered):
    mask = packed.block_mask(128, form, parts, torch.Generator().manual_seed(0), ordered=ordered)
    assert mask.shape == (128, 128, 3, 3)
    blocks = row_blocks(mask)
    assert len(blocks) == parts
    assert mask.flatten(1).any(dim=1).all()
    density, uneven = float(mask.float().mean()), form == "free" and parts < 8
    assert density == pytest.approx(1 / parts, abs=0 if not uneven else 0.07)
    assert len({len(block.rows) for block in blocks}) == (2 if uneven else 1)
    packing = packing_of(mask)
    assert packing.form == form if parts < 8 else packing.form in ("disjoint", "equal")
    neighbours = all(block.rows[-1] - block.rows[0] == len(block.rows) - 1 for block in blocks)
    assert neighbours == ordered
    assert packing.restores == (not ordered)
    assert packing.gathers == (form != "disjoint" or not ordered)


def bench(module, seconds=0.05):
    return module.Bench(load_target("cpu"), seconds)


def test_a_quarter_can_be_pruned_too(packed):
    mask = packed.block_mask(64, packed.QUARTER, 2, torch.Generator().manual_seed(0))
    assert float(mask.float().mean()) == 0.75
    assert len(packing_of(mask).blocks) == 2


def test_a_layer_is_measured_alone_and_inside(packed, monkeypatch):
    monkeypatch.setattr(packed, "LAYERS", ((32, 4),))
    monkeypatch.setattr(packed, "PARTS", (2,))
    done = {f"layer 32@4 {form} 2" for form in ("equal", "free", packed.QUARTER)}
    (row,) = packed.layer_rows(bench(packed), done)
    assert row["key"] == "layer 32@4 disjoint 2"
    assert row["ideal"] == 2
    assert row["speed_up"].keys() == row["cpu_speed_up"].keys() == {"alone", "inside"}
    assert all(ratio > 0 for ratio in row["cpu_speed_up"].values())
    assert (row["target"], row["batch"]) == ("cpu", 1)
    assert {"torch", "processor"} <= row["environment"].keys()
    text = packed.text([json.loads(json.dumps(row))])
    assert "3×3, 32 channels at 4×4" in text
    assert text.count("–") == 1  # no goal below 256 channels


@pytest.fixture
def tiny(packed, monkeypatch):
    """In the place of a zoo network one of two layers."""

    def factory():
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1)]
        return nn.Sequential(*parts, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5)).eval()

    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(packed, "subject", lambda network: (factory, x))


def test_a_whole_network_is_packed_and_measured(packed, tiny, monkeypatch):
    monkeypatch.setattr(packed, "NETWORKS", ("tiny:6",))
    monkeypatch.setattr(packed, "PARTS", (4,))
    done = {f"network tiny:6 {form} 4" for form in packed.WHOLE[1:]}
    (row,) = packed.network_rows(bench(packed), done)
    assert (row["key"], row["form"], row["blocks"]) == ("network tiny:6 disjoint 4", "disjoint", 4)
    assert row["packed_layers"] >= 1
    assert 1 < row["ideal"] <= 4
    assert row["float64"] < 1e-12
    text = packed.text([row])
    assert f"| {row['ideal']:.2f} |" in text
    assert "| network | form | blocks | layers packed |" in text


def test_tickets_have_the_blocks_asked_for(packed, tiny):
    for form in ("disjoint", "equal"):
        ticket = packed.block_ticket("tiny:6", form, 2)
        mask = ticket.masks["3.weight"]
        assert len(row_blocks(mask)) == 2
        assert float(mask.float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("pattern", ["blocks", "channels"])
def test_the_planners_choice_is_measured_against_dense(packed, tiny, monkeypatch, pattern):
    def choose_format(ticket, factory, target, inputs, *, batch, duration_s):
        assert batch == 2
        made = compact(ticket, factory, inputs, format="packed")
        return made, Choice("packed", target.name, 1, (), (NetworkTime("packed", 1, 1.5, 1.4, 1.6),))

    monkeypatch.setattr(packed, "choose_format", choose_format)
    monkeypatch.setattr(packed, "ZOO", ("tiny:6",))
    monkeypatch.setattr(packed, "SPARSITIES", (0.5,))
    other = "channels" if pattern == "blocks" else "blocks"
    (row,) = packed.planner_rows(replace(bench(packed), batch=2), {f"planner tiny:6 {other} 0.5"})
    assert row["batch"] == 2
    assert (row["format"], row["candidates"], row["pattern"]) == ("packed", {"packed": 1.5}, pattern)
    assert row["ideal"] > 1.2
    assert "| network | ticket | sparsity | chosen |" in packed.text([row])
    assert "| 50% | packed |" in packed.text([row])


TIMES = {
    "speed_up": {"alone": [1.5, 1.4, 1.6], "inside": [3.8, None, None]},
    "cpu_speed_up": {"alone": 1.52, "inside": 3.7},
}
LAYER = {
    "part": "layers",
    "layer": "x",
    "channels": 256,
    "form": "equal",
    "blocks": 4,
    "ideal": 4.0,
    "target": "cpu",
    "batch": 1,
    "environment": {"processor": "some"},
    **TIMES,
}


def test_tables_say_whether_the_goal_is_met(packed):
    text = packed.text([LAYER, {**LAYER, "ideal": 4.5}])
    assert "1.50 (1.40 to 1.60) | 3.80 | 0.38 | 0.95 | yes |" in text
    assert "0.84 | no |" in text
    assert "| network |" not in text  # nothing was measured of any


def test_lines_are_added_and_what_is_there_is_not_measured_again(packed, tmp_path, monkeypatch, capsys):
    asked = []

    def layer_rows(bench, done):
        asked.append(set(done))
        if "one" not in done:
            yield {"key": "one", **LAYER}

    monkeypatch.setattr(packed, "layer_rows", layer_rows)
    out = tmp_path / "packed" / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["packed.py", "--out", str(out), "--parts", "layers"])
    for _ in range(2):
        packed.main()
        assert len(out.read_text().splitlines()) == 1
    assert asked == [set(), {"one"}]
    assert out.with_suffix(".md").read_text() == packed.text([LAYER])
    monkeypatch.setattr(sys, "argv", ["packed.py", "--out", str(out), "--parts", "layers", "--batch", "8"])
    with pytest.raises(SystemExit):
        packed.main()
    printed = capsys.readouterr()
    assert "choose another file" in printed.err
    assert printed.out.count("ideal 4.00") == 1


class Stream(nn.Module):
    """A stream that three layers write."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.a(x)
        return self.fc((x + self.b(x)).mean((2, 3)))


def test_shortcuts_are_compacted_twice_and_measured(shortcuts, tmp_path, monkeypatch):
    """Rows are emptied layer by layer, whatever the others of the stream lose."""
    monkeypatch.setattr(shortcuts, "BATCHES", (1,))
    monkeypatch.setattr(shortcuts.zoo, "build", lambda name: Stream())
    (row,) = shortcuts.measure("tiny:8", 0.5, load_target("cpu"), seconds=0.05, folder=tmp_path)
    assert (row["network"], row["sparsity"], row["batch"], row["target"]) == ("tiny:8", 0.5, 1, "cpu")
    assert row["macs"]["spread"] < row["macs"]["union"] <= 1
    assert row["look_ups"] > 0
    assert max(row["float64"].values()) < 1e-10
    text = shortcuts.text([json.loads(json.dumps(row))])
    assert f"| tiny:8 | 50% | 1 | {row['macs']['union']:.0%} | {row['macs']['spread']:.0%} |" in text
    assert "target cpu" in text


def test_own_rows_are_the_smallest_of_each_layer(shortcuts):
    from deploy_sparse.surgery import channel_groups

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    ticket = shortcuts.own_rows(model, channel_groups(model, torch.zeros(2, 3, 8, 8)), 0.5)
    norms = model[0].weight.abs().flatten(1).sum(1)
    kept = norms >= norms.sort().values[4]
    assert torch.equal(ticket.masks["0.weight"].flatten(1).any(1), kept)
    assert torch.equal(ticket.masks["0.bias"], kept)
    assert torch.equal(ticket.masks["1.weight"], kept)
    assert "3.weight" not in ticket.masks  # the network's output stays, and its columns are not asked for
