"""Latency budgets: what is asked, tickets that land there, corrections, provenance, and what is refused."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from budget_samples import MODEL, Machine, Table, X, factory, record, widths_of

from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.allocation import Allocation
from deploy_sparse.surgery.compact import compact
from deploy_sparse.ticket import Provenance, Ticket
from deploy_sparse.tune import budget_table, budget_ticket, budget_timing
from deploy_sparse.tune.budget import TOLERANCE, Asked, Timed, budget_of, land
from deploy_sparse.tune.budget_table import even_cuts, table_for
from deploy_sparse.tune.budget_ticket import source_of, ticket_within
from deploy_sparse.tune.budget_timing import BesideDense


@pytest.mark.parametrize(
    ("text", "share", "ms", "limit"),
    [("0.5x", 0.5, None, 2.0), (" .25X ", 0.25, None, 1.0), ("1x", 1.0, None, 4.0), ("3.2ms", None, 3.2, 3.2), ("3 ms", None, 3.0, 3.0)],
)  # fmt: skip
def test_what_is_asked(text, share, ms, limit):
    asked = Asked.parse(text)
    assert (asked.share, asked.ms) == (share, ms)
    assert asked.limit_ms(4.0) == limit
    assert Asked.parse(str(asked)) == asked


@pytest.mark.parametrize("text", ["", "0.5", "half", "2x", "0x", "-1ms", "0ms", "x", "1e9x", "0.5x 3ms", "nanms"])
def test_what_is_no_latency(text):
    with pytest.raises(ConfigError, match=rf"latency {re.escape(repr(text))}\n.*0\.5x, or a time such as 3\.2ms"):
        Asked.parse(text)


class Maker:
    """Tickets whose predicted time is the limit, rounded down to steps; remembers the limits."""

    def __init__(self, dense=10.0, step=0.01, least=0.5):
        self.dense, self.step, self.least, self.limits = dense, step, least, []

    def __call__(self, limit):
        if limit < self.least:
            raise ConfigError(f"a limit of {limit}", expected=f"at least {self.least}", fix="more")
        self.limits.append(limit)
        steps = math.floor(limit / self.step + 1e-9)
        return SimpleNamespace(ms=steps * self.step), Allocation((steps,), 0.0, steps * self.step, self.dense, {}, 0.5)


def measured(share_of):
    return lambda ticket: Timed(share_of(ticket.ms), 10.0, share_of(ticket.ms) / 10, None, None)


@pytest.mark.parametrize(
    "share_of",
    [lambda ms: ms, lambda ms: 1.3 * ms, lambda ms: 0.6 * ms + 1.0, lambda ms: 0.5 * ms + 2.3, lambda ms: 10 * (ms / 10) ** 1.6],
)  # fmt: skip
@pytest.mark.parametrize("text", ["0.5x", "0.3x", "4ms"])
def test_tickets_land_within_five_per_cent(share_of, text):
    asked, make = Asked.parse(text), Maker()
    ticket, landing = land(asked, asked.limit_ms(10.0), make, measured(share_of))
    wanted = asked.limit_ms(10.0)
    assert abs(share_of(ticket.ms) / wanted - 1) <= TOLERANCE
    assert landing.landed
    assert landing.miss == pytest.approx(share_of(ticket.ms) / wanted - 1)
    assert landing.chosen.allocation.ms == ticket.ms
    assert make.limits[0] == wanted


def test_a_miss_scales_the_limit_by_measured_over_predicted():
    make = Maker()
    _, landing = land(Asked.parse("0.5x"), 5.0, make, measured(lambda ms: 1.25 * ms))
    assert make.limits == pytest.approx([5.0, 4.0])
    assert [each.timed.ms for each in landing.passes] == pytest.approx([6.25, 5.0])


def test_between_too_much_and_too_little_it_is_interpolated():
    make = Maker()
    land(Asked.parse("0.5x"), 5.0, make, measured(lambda ms: 6.5 if ms > 4.5 else 4.0 + (ms - 3.8)), passes=3)
    assert make.limits[1] == pytest.approx(5.0 / 1.3, abs=0.01)
    assert make.limits[1] < make.limits[2] < make.limits[0]


def test_one_that_fits_is_not_made_again_and_one_that_just_fits_is():
    for factor, passes in ((1.02, 1), (0.98, 1), (1.04, 2)):
        make = Maker()
        land(Asked.parse("0.5x"), 5.0, make, measured(lambda ms, by=factor: by * ms))
        assert len(make.limits) == passes


def test_where_the_same_channels_come_out_again_it_ends_and_says_it_missed():
    make, lines = Maker(step=5.0), []
    _, landing = land(Asked.parse("0.6x"), 6.0, make, measured(lambda ms: 0.9 * ms), say=lines.append)
    assert len(landing.passes) == 1
    assert landing.landed is False
    assert landing.miss == pytest.approx(-0.25)
    assert landing.sentence() == (
        "asked 0.6x, predicted 0.500x (5 of 10 ms), measured 0.450x (4.5 of 10 ms), off by -25.0%"
    )
    assert lines == [f"pass 1: {landing.sentence()}", f"pass 1, timed again: {landing.sentence()}"]


def test_the_nearest_pass_is_taken_where_none_lands():
    make = Maker()
    _, landing = land(Asked.parse("0.5x"), 5.0, make, in_turn(7.0, 4.4, 8.0, 4.5), passes=3)
    assert landing.chosen is landing.passes[1]
    assert landing.landed is False
    assert landing.miss == pytest.approx(-0.1)


def in_turn(*times):
    left = iter(times)
    return lambda ticket: Timed(t := next(left), 10.0, t / 10, None, None)


def test_what_lands_is_timed_again_and_that_time_is_reported():
    lines, make = [], Maker()
    _, landing = land(Asked.parse("0.5x"), 5.0, make, in_turn(4.9, 5.2), say=lines.append)
    assert len(make.limits) == 1
    assert landing.landed
    assert landing.chosen.timed.share == 0.52
    assert "measured 0.520x" in landing.sentence()
    assert landing.summary()["measured"] == 0.52
    assert landing.summary()["timings"] == pytest.approx([0.49, 0.52])
    assert [line.split(":")[0] for line in lines] == ["pass 1", "pass 1, timed again"]


def test_what_does_not_land_again_is_corrected_by_its_second_timing():
    """A refill that landed at 0.490x was delivered at 0.552x."""
    make = Maker()
    _, landing = land(Asked.parse("0.5x"), 5.0, make, in_turn(4.9, 5.52, 5.0, 5.05))
    assert make.limits == pytest.approx([5.0, 5.0 / 1.104])
    assert landing.chosen is landing.passes[1]
    assert [each.timed.ms for each in landing.passes] == [5.52, 5.05]
    assert landing.landed


def test_the_nearest_that_is_far_off_when_timed_again_gives_way_to_another():
    _, landing = land(Asked.parse("0.5x"), 5.0, Maker(), in_turn(5.2, 5.3, 6.0, 5.25), passes=2)
    assert landing.chosen is landing.passes[1]
    assert landing.chosen.timed.ms == 5.25
    assert [len(each.timings) for each in landing.passes] == [2, 2]


def test_no_pass_at_all_is_refused():
    with pytest.raises(ConfigError, match=r"0 passes\n.*1 or more"):
        land(Asked.parse("0.5x"), 5.0, Maker(), None, passes=0)


def test_a_limit_below_the_least_ends_the_passes_but_not_the_first():
    with pytest.raises(ConfigError, match=r"a limit of 5\.0"):
        land(Asked.parse("0.5x"), 5.0, Maker(least=6.0), measured(lambda ms: ms))
    lines = []
    _, landing = land(Asked.parse("0.5x"), 5.0, Maker(least=4.0), measured(lambda ms: ms + 2), say=lines.append)
    assert len(landing.passes) == 1
    assert "below what the channels can reach" in lines[1]


def test_without_timing_the_table_is_believed():
    ticket, landing = land(Asked.parse("0.5x"), 5.0, Maker(), None)
    assert ticket.ms == pytest.approx(5.0)
    assert (landing.landed, landing.miss, len(landing.passes)) == (None, None, 1)
    assert landing.sentence() == "asked 0.5x, predicted 0.500x (5 of 10 ms), not timed"
    assert landing.summary()["measured"] is None


def test_the_summary_is_json():
    _, landing = land(Asked.parse("0.5x"), 5.0, Maker(), lambda t: Timed(5.1, 10.2, 0.5, 0.49, 0.51))
    found = json.loads(json.dumps(landing.summary()))
    assert (found["asked"], found["measured"], found["interval"], found["landed"]) == ("0.5x", 0.5, [0.49, 0.51], True)
    assert found["passes"][0]["predicted"] == pytest.approx(0.5)


def test_the_budget_is_the_tables():
    table = Table(multiple=8)
    budget = budget_of(table, Asked.parse("0.5x"))
    assert budget.ms == pytest.approx(table.dense_ms / 2)
    assert (budget.multiple, budget.worth) == (8, "product")
    assert budget.widths["conv1"] == (1, 16)
    assert budget_of(table, Asked.parse("0.2ms"), multiple=2).ms == 0.2
    assert budget_of(table, Asked.parse("0.2ms"), multiple=2).multiple == 2
    assert budget_of(table, Asked.parse("1x")).ms == table.dense_ms
    with pytest.raises(ConfigError, match=r"latency '50ms', where the dense network takes .* ms\n.*less than that"):
        budget_of(table, Asked.parse("50ms"))


def test_a_one_shot_ticket_has_the_widths_and_says_what_it_was_made_for():
    table = Table()
    source = source_of(factory(), X, MODEL, note={"weights": "random, seed 0"})
    ticket, found = source.ticket(budget_of(table, Asked.parse("0.5x")), {"latency": "0.5x", "table": "feed"})
    assert found.ms <= 0.5 * table.dense_ms
    small = compact(ticket, factory, X)
    assert table.network_ms(widths_of(small.module)) == pytest.approx(found.ms)
    origin = ticket.provenance
    assert origin.method == "oneshot"
    assert origin.metrics["predicted_ms"] == found.ms
    assert origin.metrics["predicted_dense_ms"] == pytest.approx(table.dense_ms)
    told = {key: origin.config[key] for key in ("budget", "latency", "table", "score", "worth", "multiple", "weights")}
    assert told == {
        "budget": "latency", "latency": "0.5x", "table": "feed", "score": "l1", "worth": "product", "multiple": 4,
        "weights": "random, seed 0",
    }  # fmt: skip
    assert origin.config["limit_ms"] == pytest.approx(0.5 * table.dense_ms)
    again, _ = source.ticket(budget_of(table, Asked.parse("0.5x")), {"latency": "0.5x", "table": "feed"})
    assert again.hash == ticket.hash
    assert all(torch.equal(ticket.weights[name], tensor) for name, tensor in factory().state_dict().items())


def test_a_pruned_ticket_is_refilled_and_named_as_the_parent():
    network = factory()
    name = "stages.1.0.conv1.weight"
    mask = torch.ones_like(network.state_dict()[name], dtype=torch.bool)
    mask[:24] = False
    pruned = Ticket(dict(network.state_dict()), {name: mask}, MODEL, Provenance("imp"))
    source = source_of(network, X, MODEL, ticket=pruned)
    ticket, _ = source.ticket(budget_of(Table(), Asked.parse("0.7x")), {})
    assert (ticket.provenance.method, ticket.provenance.parent) == ("refill", pruned.hash)
    kept = ticket.masks[name].flatten(1).any(dim=1)
    assert not bool(kept[:24].any())
    assert int(kept.sum()) in (4, 8)


@pytest.mark.parametrize("score", ["l2", "survivors", "random", "saliency"])
def test_scores(score):
    batches = [(X[0], torch.tensor([1, 2]))] if score == "saliency" else []
    ticket, found = source_of(factory(), X, MODEL, score=score, batches=batches).ticket(
        budget_of(Table(), Asked.parse("0.6x")), {}
    )
    assert found.ms <= 0.6 * Table().dense_ms
    assert ticket.provenance.config["score"] == score
    assert ticket.provenance.data == ({"samples": 2} if batches else {})


def test_excluded_layers_and_what_they_are_coupled_with_stay():
    source = source_of(factory(), X, MODEL, exclude=("stages.1.*",))
    ticket, found = source.ticket(budget_of(Table(), Asked.parse("0.7x")), {})
    assert found.widths["stages.1.0.conv1"][1] == 32
    assert found.widths["stages.1.0.conv2"] == (32, 32)
    small = widths_of(compact(ticket, factory, X).module)
    assert small["stages.1.0.conv1"][1] == small["stages.1.0.conv2"][1] == 32
    with pytest.raises(ConfigError, match=r"exclude pattern 'stage\.\*' matches no layer"):
        source_of(factory(), X, MODEL, exclude=("stage.*",))
    with pytest.raises(ConfigError, match="no layer can be narrowed"):
        source_of(factory(), X, MODEL, exclude=("*",))
    with pytest.raises(ConfigError, match=r"score 'salience'\n.*l1, l2.*\n.*did you mean 'saliency'"):
        source_of(factory(), X, MODEL, score="salience")


def test_a_slower_machine_than_the_tables_is_corrected_for(monkeypatch):
    """A sixth of the time does not shrink with the widths, which the table does not know."""
    table, described = Table(), []
    machine = Machine(table, extra=0.2)

    class Fake:
        def __init__(self, made_by, inputs, target, batch, seconds, scratch, poll):
            self.records, described[:] = [], [target.name, batch, seconds]

        def __call__(self, ticket):
            self.records += [record("dense", 1.0), record("ticket", 0.6)]
            return machine.timed(table.network_ms(widths_of(compact(ticket, factory, X).module)))

    monkeypatch.setattr(budget_ticket, "BesideDense", Fake)
    source, asked = source_of(factory(), X, MODEL), Asked.parse("0.6x")
    options = {"batch": 1, "digest": "feed", "duration_s": 0.5}
    ticket, landing, records = ticket_within(source, factory, X, load_target("cpu"), asked, table, **options)
    assert landing.landed
    assert 2 <= len(landing.passes) == machine.calls - 1
    assert landing.passes[0].timed.share > 0.63
    assert landing.chosen.limit_ms == ticket.provenance.config["limit_ms"] < 0.6 * table.dense_ms
    assert described == ["cpu", 1, 0.5]
    assert len(records) == 2 * machine.calls
    *_, none = ticket_within(source, factory, X, load_target("cpu"), asked, table, check=False, **options)
    assert none == ()


def test_the_dense_engine_is_built_once_and_the_ratio_turned_round(monkeypatch, tmp_path):
    built, asked = [], []

    def profile(engines, **options):
        asked.append((list(engines), options["batches"], options["duration_s"]))
        return SimpleNamespace(records=(record("dense", 4.0), record("ticket", 2.0)))

    monkeypatch.setattr(budget_timing, "build_engine", lambda *given, name, **_: built.append(name) or name)
    monkeypatch.setattr(budget_timing, "profile", profile)
    monkeypatch.setattr(
        budget_timing, "compare", lambda dense, own: SimpleNamespace(ratio=1.6, low=1.25, high=2.0)
    )  # fmt: skip
    ticket, _ = source_of(factory(), X, MODEL).ticket(budget_of(Table(), Asked.parse("0.6x")), {})
    beside = BesideDense(factory, X, load_target("cpu"), 2, 0.25, tmp_path)
    assert beside(ticket) == Timed(2.0, 4.0, 0.625, 0.5, 0.8)
    beside(ticket)
    assert built == ["dense", "ticket", "ticket"]
    assert asked == [(["dense", "ticket"], (2,), 0.25)] * 2
    assert len(beside.records) == 4


def test_a_missing_table_is_measured_and_one_of_something_else_refused(monkeypatch, tmp_path):
    calls = []

    def measure_table(network, inputs, target, **options):
        calls.append((target.name, options["batch"], sorted(options["cuts"](8)) if options["cuts"] else None))
        return Table(batch=options["batch"])

    monkeypatch.setattr(budget_table, "measure_table", measure_table)
    monkeypatch.setattr(budget_table, "read_table", lambda file: Table(batch=3))
    file = tmp_path / "t.json"
    cuts = even_cuts(source_of(factory(), X, MODEL), factory, X)
    assert table_for(file, factory(), X, "cpu", batch=2, cuts=cuts).batch == 2
    assert calls == [("cpu", 2, ["50% of the channels", "75% of the channels"])]
    assert file.is_file()
    assert table_for(file, factory(), X, "cpu").batch == 3
    assert len(calls) == 1
    with pytest.raises(ConfigError, match=r"t\.json is of batch 3\n.*a table of batch 1"):
        table_for(file, factory(), X, "cpu", batch=1)
    with pytest.raises(ConfigError, match="is of another network: its 10 layers"):
        table_for(file, factory(), (torch.zeros(2, 1, 16, 16),), "cpu")
    other = load_target("cpu").model_copy(update={"name": "cpu2", "threads": 2})
    with pytest.raises(ConfigError, match="is of target 'cpu', whose settings are not those of 'cpu2'"):
        table_for(file, factory(), X, other)


def test_even_cuts_keep_the_share_of_every_group():
    cut = even_cuts(source_of(factory(), X, MODEL), factory, X)(8)["50% of the channels"]
    dense = widths_of(factory())
    for path, (c_in, c_out) in widths_of(cut).items():
        assert c_in == (dense[path][0] / 2 if path != "conv1" else 1)
        assert c_out == (dense[path][1] / 2 if path != "fc" else 10)
