"""A real table of a small network on the CPU target, and its report."""

import copy

import pytest
import torch
from torch import nn

from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.profile import profile
from deploy_sparse.tune.latency import measure as module
from deploy_sparse.tune.latency.bench import TargetBench
from deploy_sparse.tune.latency.measure import measure_table
from deploy_sparse.tune.latency.show import report_text, summary
from deploy_sparse.tune.latency.table import read_table


def network(width=64):
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
FAST = {"rounds": 5, "network_s": 0.05}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = tmp_path_factory.mktemp("points")
    cuts = {"half": network(32), "quarter": network(16)}
    table = measure_table(network(), X, "cpu", cuts=lambda multiple: cuts, cache=cache, **FAST)
    return table, cache


def stub_networks(monkeypatch):
    """Whole networks are not exported and built, which takes seconds; a callable stands for the dense one."""
    timed = profile({"dense": lambda: sum(range(1000))}, duration_s=0.01, warmup_ms=0)
    monkeypatch.setattr(module, "time_networks", lambda *_, **__: timed)


def test_the_table_predicts_the_dense_network_and_its_layers(made):
    table = made[0]
    assert list(table.layers) == ["0", "3", "8"]
    assert table.network_ms({}) == pytest.approx(table.dense_ms)
    middle = [table.ms("3", count, count) for count in (16, 32, 64)]
    assert 0 < middle[0] < middle[2]
    assert table.target["name"] == "cpu"
    assert [cut.name for cut in table.cuts] == ["half", "quarter"]
    assert all(0 < cut.ratio < 1 and cut.predicted is not None for cut in table.cuts)


def test_another_call_times_no_layer_again(made, monkeypatch):
    table, cache = made

    def refuse(self, shapes):
        raise AssertionError(f"{shapes} were timed again")

    monkeypatch.setattr(TargetBench, "times", refuse)
    stub_networks(monkeypatch)
    again = measure_table(network(), X, "cpu", cache=cache, **FAST)
    assert again.surfaces == table.surfaces
    assert again.multiple == table.multiple


def test_what_was_measured_survives_the_file(made, tmp_path):
    assert read_table(made[0].save(tmp_path / "table.json")) == made[0]


def test_the_report_says_what_was_found(made):
    table = made[0]
    text = report_text(table, title="Latency", command="deploy-sparse table")
    assert text.provenance == tuple(summary(table))
    assert f"multiples of {table.multiple} on cpu" in text.provenance[0]
    cuts, layers, staircases = text.tables
    assert [row[0] for row in cuts.rows] == ["half", "quarter"]
    assert {row[0] for row in layers.rows} == {str(shape) for shape in table.layers.values()}
    assert [row[0] for row in staircases.rows] == ["conv 3x3 64->64 @12x12"]
    assert {plot.title for plot in text.plots} == {
        "The staircase",
        "Layers over their input channels",
        "Layers over their output channels",
    }


@pytest.mark.parametrize("batch", [0, 257, 1.5, True])
def test_a_batch_that_the_target_does_not_take_is_refused(batch):
    with pytest.raises(ConfigError, match=r"for target 'cpu'\n.*from 1 to 256, which its engines take"):
        measure_table(network(), X, "cpu", batch=batch)


@pytest.mark.parametrize(("option", "text"), [({"seconds": -1}, "-1 seconds"), ({"rounds": 0}, "0 rounds")])
def test_values_out_of_range_are_refused(option, text):
    with pytest.raises(ConfigError, match=text):
        measure_table(network(), X, "cpu", **option)


def test_a_cut_network_with_other_layers_is_refused():
    other = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 144, 10))
    with pytest.raises(ConfigError, match="the cut network 'other' has '2', which the dense one has not"):
        measure_table(network(8), X, "cpu", cuts=lambda multiple: {"other": other}, seconds=0, **FAST)


def test_the_targets_library_is_asked_for_first(monkeypatch):
    def refuse(target):
        raise ConfigError(f"no library for {target.name}", expected="one", fix="install it")

    monkeypatch.setattr(module, "require_runtime", refuse)
    with pytest.raises(ConfigError, match="no library for cpu"):
        measure_table(network(), X, load_target("cpu"))


def test_a_network_in_training_is_left_as_it_is(monkeypatch):
    stub_networks(monkeypatch)
    trained = network(8).train()
    before = copy.deepcopy(trained.state_dict())
    table = measure_table(trained, X, "cpu", seconds=0, **FAST)
    assert table.multiple == 1  # nothing is wide enough to show a staircase
    assert "No layer is wide enough to read a multiple from" in summary(table)[0]
    assert (table.context, table.cuts, table.error) == (1.0, (), None)
    assert trained.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
