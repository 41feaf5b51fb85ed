"""Latency budgets in recipes: keys that go together, a table in the run folder, and a limit that is kept there."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from deploy_sparse import zoo
from deploy_sparse.cli.catalog import find_recipe, load_recipe
from deploy_sparse.config import config_from
from deploy_sparse.data import load
from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.chase_latency import LatencyChase
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.train.runtime import CPU
from deploy_sparse.tune import budget_timing
from deploy_sparse.tune.budget import Timed
from deploy_sparse.tune.latency.shapes import shapes_of
from deploy_sparse.workflow import budgeted, dst
from deploy_sparse.workflow.config import ImpConfig, StudyConfig
from deploy_sparse.workflow.dst_config import ChaseConfig, check_dst
from deploy_sparse.workflow.prepare import Work
from deploy_sparse.workflow.refilled import RefillConfig, check_refill, refilled, require_reachable
from deploy_sparse.workflow.rounds import Round, masks_of

ARGUMENTS = {"widths": [16, 32, 32]}
LATENCY = {"budget": "latency", "latency": "0.6x", "coupling": "group"}


def factory():
    torch.manual_seed(0)
    return zoo.build("resnet_digits", **ARGUMENTS)


class Table:
    multiple, target, batch = 4, {"width_multiple": 8}, 1

    def __init__(self, network, inputs):
        self.layers = shapes_of(network, inputs)

    def ms(self, path, c_in, c_out):
        return 0.01 + 1e-4 * c_in * c_out

    def network_ms(self, widths):
        return 0.05 + sum(self.ms(path, *counts) for path, counts in widths.items())


@pytest.fixture(scope="module")
def digits():
    return load("digits", seed=0)


class Run:
    """A run folder that remembers its stages."""

    def __init__(self, folder):
        self.folder, self.warned, self.made = folder, [], []
        self.console = SimpleNamespace(say=lambda text: None, warn=self.warned.append)
        self.poll = lambda *_: None

    def once(self, name, make, save, load):
        if (self.folder / name).exists():
            return load(self.folder / name)
        self.made.append(name)
        value = make()
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        save(value, self.folder / name)
        return value


@pytest.fixture
def machine(monkeypatch):
    """Tables are made up; a network takes as much longer than predicted as ``machine`` says."""
    said = SimpleNamespace(factor=1.0, timed=[], files=[])

    def table_for(file, network, inputs, where, *, batch, cuts, poll, say):
        said.files.append((file, where, batch))
        return Table(network, inputs)

    class Beside:
        def __init__(self, *given):
            self.given = given

        def __call__(self, ticket):
            said.timed.append(ticket)
            share = said.factor * said.predicted(ticket)
            return Timed(share, 1.0, share, share, share)

    monkeypatch.setattr(budgeted, "table_for", table_for)
    monkeypatch.setattr(budgeted, "BesideDense", Beside)
    return said


def work_of(config, folder, digits):
    trainer = SimpleNamespace(factory=factory, model=ModelRef("resnet_digits", ARGUMENTS, (1, 8, 8)))
    return Work(Run(folder), config, CPU, digits, trainer)


def widths(ticket):
    from deploy_sparse.surgery.compact import compact

    network = compact(ticket, factory).module
    return {path: (shape.c_in, shape.c_out) for path, shape in shapes_of(network, torch.zeros(2, 1, 8, 8)).items()}


def round_of(work):
    network = factory()
    masks = {name: torch.rand_like(mask.float()) < 0.5 for name, mask in dense_masks(network).items()}
    trained = Ticket(dict(network.state_dict()), masks, work.trainer.model, Provenance("test"))
    return Round(3, masks, trained, None)


def test_refill_lands_before_it_is_trained_and_keeps_how(tmp_path, digits, machine):
    table = Table(factory(), torch.zeros(2, 1, 8, 8))
    dense = table.network_ms({path: (s.c_in, s.c_out) for path, s in table.layers.items()})
    machine.predicted, machine.factor = lambda ticket: table.network_ms(widths(ticket)) / dense, 1.2
    config = StudyConfig()
    work, rule = work_of(config, tmp_path, digits), RefillConfig(**LATENCY)
    found = round_of(work)
    masks = refilled(work, rule, found)
    ticket = Ticket(dict(found.trained.weights), masks, work.trainer.model, Provenance("t"))
    share = table.network_ms(widths(ticket)) / dense
    assert 1.2 * share == pytest.approx(0.6, rel=0.05)
    assert all(count % 8 == 0 for path in ("stages.1.0.conv1", "stages.2.0.conv1") for count in widths(ticket)[path])
    assert len(machine.timed) >= 2
    assert work.run.made == ["latency/round-3.json"]
    kept = json.loads((tmp_path / "latency/round-3.json").read_text())
    assert kept["landed"] is True
    assert machine.files == [(tmp_path / "latency/table.json", "cpu", 1)]
    count = len(machine.timed)
    again = refilled(work, rule, found)  # a run that is continued times nothing again
    assert len(machine.timed) == count
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())


def test_a_budget_below_the_least_is_refused_before_training(tmp_path, digits, machine):
    work = work_of(StudyConfig(), tmp_path, digits)
    masks = masks_of(work, ImpConfig())
    with pytest.raises(ConfigError, match=r"a latency budget of .*\n.*at least .* ms"):
        require_reachable(work, RefillConfig(**{**LATENCY, "latency": "0.01x"}), masks)
    assert machine.files == [(tmp_path / "latency/table.json", "cpu", 1)]
    require_reachable(work, RefillConfig(**LATENCY), masks)
    require_reachable(work, RefillConfig(), masks)
    assert len(machine.files) == 2
    assert machine.timed == []


@pytest.mark.parametrize(("share", "warned"), [(0.61, False), (0.68, True), (0.5, True)])
def test_what_is_delivered_is_held_against_what_was_asked(share, warned, tmp_path, digits, monkeypatch):
    work, rule = work_of(StudyConfig(), tmp_path, digits), RefillConfig(**LATENCY)

    def record(name, ms, target="cpu", batch=1):
        return SimpleNamespace(subject=name, timed=True, target=target, batch=batch, stats=SimpleNamespace(p50=ms))

    found = [record("dense", 1.0), record("ticket", share), record("ticket", 9.0, batch=32), record("ticket", 9.0, "x")]
    monkeypatch.setattr(budgeted, "read_records", lambda file: found)
    monkeypatch.setattr(
        budget_timing, "compare", lambda a, b: SimpleNamespace(ratio=a.stats.p50 / b.stats.p50, low=None, high=None)
    )
    told = budgeted.delivered(work, rule, {"report": "r"}, True)
    assert told["report"] == "r"
    assert told["latency"] == {
        "asked": "0.6x",
        "measured": pytest.approx(share),
        "miss": pytest.approx(share / 0.6 - 1),
    }
    assert bool(work.run.warned) == warned
    assert all(re.match(r"asked 0\.6x, and the deployed network takes 0\.\d{3}x", text) for text in work.run.warned)
    assert budgeted.delivered(work, rule, {"report": "r"}, False) == {"report": "r"}
    found[:] = []
    assert budgeted.delivered(work, rule, {"report": "r"}, True)["latency"]["measured"] is None


@pytest.mark.parametrize("recipe", ["imp_refill", "imp_refill_plus"])
def test_recipes_refuse_it_before_they_train(recipe, tmp_path, digits, machine, monkeypatch):
    module = load_recipe(find_recipe(recipe))
    config = module.RecipeConfig(refill={**LATENCY, "latency": "0.01x", "extra": 0.0})
    monkeypatch.setattr(module, "prepare", lambda *_, **__: work_of(config, tmp_path, digits))
    monkeypatch.setattr(module, "train_dense", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ConfigError, match=r"a latency budget of"):
        module.main(config, None)


def test_a_budget_that_was_missed_is_warned_about(tmp_path, digits, machine):
    machine.predicted = lambda ticket: 0.9
    work = work_of(StudyConfig(), tmp_path, digits)
    refilled(work, RefillConfig(**LATENCY), round_of(work))
    assert re.match(r"round-3: asked 0\.6x, and the nearest that was found is off by \+50\.0%", work.run.warned[0])


def test_without_a_check_nothing_is_timed(tmp_path, digits, machine):
    work = work_of(StudyConfig(), tmp_path, digits)
    given = tmp_path / "given"
    given.mkdir()
    (given / "table.json").write_text("{}")
    refilled(work, RefillConfig(**LATENCY, check=False, table=str(given)), round_of(work))
    assert machine.timed == []
    assert machine.files[0][0] == given / "table.json"
    assert work.run.warned == []


def test_chase_gets_its_limit_in_ms(tmp_path, digits, machine):
    machine.predicted = lambda ticket: 0.6
    config = config_from(
        ChaseConfig,
        {
            "model": {"name": "resnet_digits", "arguments": ARGUMENTS}, "fit": {"epochs": 20}, "explore": {"interval": 10},
            "channels": {"budget": "latency", "latency": "0.6x", "coupling": "prune_skip", "interval": 10},
        },
        source="test",
    )  # fmt: skip
    work = work_of(config, tmp_path, digits)
    method = dst.chase(work, config, dst.pools_of(work, config))
    assert isinstance(method, LatencyChase)
    table = Table(factory(), torch.zeros(2, 1, 8, 8))
    dense = table.network_ms({path: (s.c_in, s.c_out) for path, s in table.layers.items()})
    assert method.latency.ms == pytest.approx(0.6 * dense)
    assert method.latency.multiple == 8
    assert math.isclose(method.dense_ms, dense)
    check_dst(config)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"coupling": "layer"}, "refill.coupling = 'layer' with refill.budget"),
        ({"extra": 0.2}, "refill.extra = 0.2 with refill.budget"),
        ({"silent": False}, "refill.silent = false with refill.budget"),
        ({"latency": ""}, "refill.latency: latency ''"),
        ({"latency": "2x"}, "refill.latency: latency '2x'"),
        ({"table": "nowhere.json"}, 'refill.table = "nowhere.json", which is not there'),
        ({"budget": "paper"}, 'refill.latency = "0.6x" without refill.budget'),
        ({"budget": "code", "latency": "", "table": "t"}, 'refill.table = "t" without refill.budget'),
    ],
)
def test_keys_of_refill_that_do_not_go_together(changes, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        check_refill(StudyConfig(), ImpConfig(), RefillConfig(**{**LATENCY, **changes}))


def test_keys_that_do():
    check_refill(StudyConfig(), ImpConfig(), RefillConfig(**LATENCY))
    check_refill(StudyConfig(), ImpConfig(), RefillConfig())
    with pytest.raises(ConfigError, match=r"imp\.group_aware = true with refill\.budget"):
        check_refill(StudyConfig(), ImpConfig(group_aware=True), RefillConfig(**LATENCY))


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        ({"budget": "latency"}, "channels.latency: latency ''"),
        ({"latency": "0.5x"}, 'channels.latency = "0.5x" without channels.budget'),
        ({"budget": "latency", "latency": "0.5x", "sparsity": 0.0}, "channels.sparsity = 0 with channels.budget"),
    ],
)
def test_keys_of_chase_that_do_not_go_together(channels, text):
    tables = {"fit": {"epochs": 20}, "explore": {"interval": 10}, "channels": {"interval": 10, **channels}}
    with pytest.raises(ConfigError, match=re.escape(text)):
        check_dst(config_from(ChaseConfig, tables, source="test"))
