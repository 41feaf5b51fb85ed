"""The planner: what loses stays dense, what fails is left out, the dense network is taken unless another wins twice."""

import pytest
import torch
from planner_samples import (
    CPU,
    LOST,
    WON,
    X,
    choose,
    gains,
    network,
    packed,
    ticket,
    with_a_cut,
)
from torch import nn

from deploy_sparse.engine.target import load_target
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.errors import BuildError, ConfigError, EngineError, ExportError, Interrupted, SurgeryError
from deploy_sparse.surgery import load_compact
from deploy_sparse.ticket import Ticket
from deploy_sparse.tune import formats, network_bench
from deploy_sparse.tune.choice import BatchTime, Choice, planned_for
from deploy_sparse.tune.formats import choose_format


def test_losers_stay_dense_and_the_rest_is_arranged_again(monkeypatch):
    """The layer that crosses needs a look-up and loses; the two others fit together without any."""
    found, choice, bench, _, said = choose(
        monkeypatch, lambda form: 0.7 if "look-up" in str(form) and "no look-up" not in str(form) else 2.0, lambda *_: WON
    )  # fmt: skip
    first, rivals, *later = bench.asked
    assert len(first) == len(rivals) == 3
    assert sum("no look-up" not in text for text in first) == 1
    assert all(text.startswith("2 free blocks") for text in rivals)
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
    found, choice, *_ = choose(monkeypatch, lambda form: 1 + formats.MARGIN / 2, lambda *_: WON)
    assert "packed" not in [network.name for network in choice.networks]
    assert not any(time.packed for time in choice.layers)
    assert choice.name == "dense"
    assert packed(found) == frozenset()


def test_times_that_never_settle_end(monkeypatch):
    """A layer loses each time the others are arranged again; what won in its last form is packed."""
    count = iter(range(100))

    def ratio(form):
        return 0.5 if form.packing.form == "free" or next(count) in (0, 4) else 2.0

    found, choice, bench, *_ = choose(monkeypatch, ratio, lambda *_: WON)
    assert [len(asked) for asked in bench.asked] == [3, 3, 2, 1]
    assert len(packed(found)) == 1
    assert choice.name == "packed"


@pytest.mark.parametrize(
    ("times", "name"),
    [
        (LOST, "dense"),
        ((1.1, 0.99, 1.2), "dense"),  # not surely faster
        ((1.1, 1.005, 1.2), "dense"),  # opening an engine again makes such a difference
        ((1.1, 1.02, 1.2), "packed"),
        ((1.1, None, None), "dense"),  # too few pairs to know
        ((1.1, 1.05, 1.2, (BatchTime(32, 1.0, 0.985, 1.01),)), "packed"),
        ((1.1, 1.05, 1.2, (BatchTime(32, 1.0, 0.97, 1.03),)), "dense"),
        ((1.1, 1.05, 1.2, (BatchTime(8, 1.2, 1.1, 1.3), BatchTime(32, 0.9, 0.88, 0.92))), "dense"),
        ((1.1, 1.05, 1.2, (BatchTime(8, 1.2, None, None),)), "dense"),
    ],
)
def test_the_dense_network_is_taken_unless_another_beats_it(monkeypatch, times, name):
    found, choice, _, built, _ = choose(monkeypatch, lambda form: 2.0, lambda *_: times)
    assert choice.name == name
    assert "packed" in built.built
    assert bool(packed(found)) == (name == "packed")
    assert found.plan.choice == tuple(choice.lines())
    assert found.plan.notes()[: len(found.plan.choice)] == choice.lines()
    if name == "dense":
        expected = ticket().masked_weights()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.module.state_dict().items())


def test_the_fastest_of_those_that_are_surely_faster_is_taken(monkeypatch):
    """A wider interval around a higher ratio does not hide a network that is faster for sure."""
    times = {"packed": (1.6, 0.9, 2.0)}
    _, choice, *_ = choose(
        monkeypatch, lambda form: 2.0, lambda name, _: times.get(name, (1.2, 1.1, 1.3)), made=with_a_cut()
    )
    assert choice.name.startswith("channels")


@pytest.mark.parametrize(("lost_at", "name"), [(None, "packed"), (1, "dense"), (2, "dense"), (3, "dense")])
def test_a_small_gain_has_to_come_back_three_times(monkeypatch, lost_at, name):
    """Engines that are opened again differ by a few percent, so that a small gain may be luck more often than once."""

    def times(network, count):
        return LOST if network != "packed" or count == lost_at else (1.04, 1.03, 1.05)

    _, choice, _, built, _ = choose(monkeypatch, lambda form: 2.0, times)
    assert choice.name == name
    timings = 4 if lost_at is None else lost_at + 1  # a lost one ends it
    assert sum("packed" in asked for asked in built.asked) == timings
    assert len(choice.again) == timings - 1


def test_the_fastest_has_to_win_twice(monkeypatch):
    """By luck the packed network is the fastest of several; timed again it is not, and the next one's turn comes."""
    second = {"packed": (1.0, 0.97, 1.03)}

    def times(name, count):
        first = (1.6, 1.5, 1.7) if name == "packed" else (1.2, 1.1, 1.3)
        return first if count == 0 else second.get(name, (1.15, 1.1, 1.2))

    found, choice, _, built, _ = choose(monkeypatch, lambda form: 2.0, times, made=with_a_cut())
    assert built.asked[1:] == [["packed"], [choice.name]]
    assert choice.name.startswith("channels")
    assert [(network.name, network.ratio) for network in choice.again] == [("packed", 1.0), (choice.name, 1.15)]
    assert "  packed, timed once more: 1.00x as fast as dense" in found.plan.choice
    for name in choice.networks:
        second[name.name] = LOST
    found, choice, *_ = choose(monkeypatch, lambda form: 2.0, times, made=with_a_cut())
    assert choice.name == "dense"
    assert not found.plan.cuts


def test_the_largest_gains_are_tried_alone_where_all_together_lose(monkeypatch):
    name = "packed where it gains most"
    ratios = gains({"3": 1.05, "6": 1.8, "9": 1.1})

    def times(asked, _):
        return WON if asked == name else LOST

    found, choice, _, built, _ = choose(monkeypatch, ratios, times)
    assert choice.name == name
    assert packed(found) == {"6"}
    assert packed(built.built["packed"]) == {"3", "6", "9"}
    assert choice.lines()[-1] == "  3 of 3 layers of blocks are faster packed"
    *_, built, _ = choose(monkeypatch, ratios, lambda *_: WON)
    assert name not in built.built  # all together win
    *_, built, _ = choose(monkeypatch, lambda form: 1.1, lambda *_: LOST)
    assert name not in built.built  # none gains much
    *_, built, _ = choose(monkeypatch, lambda form: 1.8, lambda *_: LOST)
    assert name not in built.built  # all of them do: they are all together


def refusing(monkeypatch, refused):
    """Surgery that fails for what ``refused`` says of its options."""
    real = formats.compact

    def compact(*given, **options):
        if refused(options):
            raise SurgeryError("not equal\nby far", expected="equal", fix="report it")
        return real(*given, **options)

    monkeypatch.setattr(formats, "compact", compact)


@pytest.mark.parametrize(
    ("refused", "name", "dropped"),
    [
        (lambda o: o["format"] == "packed", "channels", ["packed", "packed where it gains most"]),
        (lambda o: o["format"] == "packed" and len(o["layers"]) == 3, "packed where it gains most", ["packed"]),
        (lambda o: o["shortcuts"] == "spread", "packed", ["channels, multiples of 4, spread"]),
        (lambda o: o["multiple"] == 4, "channels", ["channels, multiples of 4", "channels, multiples of 4, spread"]),
        (lambda o: o["format"] != "dense", "dense", ["channels, multiples of 4", "channels", "channels, multiples of 4, spread"]),
    ],
)  # fmt: skip
def test_what_surgery_refuses_is_left_out_and_told(monkeypatch, refused, name, dropped):
    refusing(monkeypatch, refused)
    ratios = gains({"3": 1.05, "6": 1.8, "9": 1.8})
    times = {"packed": 1.7, "packed where it gains most": 1.6, "channels": 1.5}

    def faster(name, _):
        return times.get(name, 1.4), 1.3, 1.8

    if name == "channels" and dropped[0] != "packed":
        del times["packed"]
    found, choice, *_, said = choose(monkeypatch, ratios, faster, made=with_a_cut())
    assert choice.name == name
    assert choice.dropped == tuple((each, "not equal") for each in dropped)
    for each in dropped:
        assert f"  left out: {each}: not equal" in found.plan.choice
        assert f"left out: {each}: not equal" in said


@pytest.mark.parametrize("problem", [ExportError, BuildError])
def test_networks_that_do_not_build_are_left_out_and_told(monkeypatch, problem):
    found, choice, *_ = choose(monkeypatch, lambda form: 2.0, lambda *_: WON, fails={"packed": problem})
    assert choice.name == "dense"
    assert choice.networks == ()
    assert found.plan.choice[-1] == "  left out: packed: no engine of packed"
    with pytest.raises(problem, match="no engine of dense"):  # there is nothing to fall back to
        choose(monkeypatch, lambda form: pytest.fail("timed"), lambda *_: WON, fails={"dense": problem})


@pytest.mark.parametrize("first", [0, 1])
def test_networks_that_do_not_run_are_left_out_and_told(monkeypatch, first):
    """At once, or not until it is timed once more."""

    def times(name, count):
        if name in failing and (name == "dense" or count >= first):
            raise EngineError(f"{name} is not finite\nat all", expected="numbers", fix="none")
        return (1.6, 1.5, 1.7) if name == "packed" else (1.2, 1.1, 1.3)

    failing = {"packed"}
    found, choice, *_ = choose(monkeypatch, lambda form: 2.0, times, made=with_a_cut())
    assert choice.name.startswith("channels")
    assert choice.dropped == (("packed", "packed is not finite"),)
    assert found.plan.choice[-1] == "  left out: packed: packed is not finite"
    failing.add("dense")
    with pytest.raises(EngineError, match="dense is not finite"):  # there is nothing to fall back to
        choose(monkeypatch, lambda form: 2.0, times, made=with_a_cut())


def test_layers_without_a_time_stay_dense_and_that_is_told(monkeypatch):
    found, choice, bench, *_ = choose(monkeypatch, gains({"3": 1.5, "6": "no such operator", "9": 1.5}), lambda *_: WON)
    assert packed(found) == {"3", "9"}
    assert [time.layer for time in choice.layers] == ["3", "9"]
    assert [len(asked) for asked in bench.asked] == [3, 3, 2]
    assert "  left out: layer 6 packed: no such operator" in found.plan.choice
    _, choice, *_ = choose(monkeypatch, lambda form: "no such operator", lambda *_: WON)
    assert (choice.name, choice.layers, len(choice.dropped)) == ("dense", (), 6)


def test_layers_that_cannot_be_looked_at_are_left_out(monkeypatch):
    problem = SurgeryError("cannot be traced", expected="it could", fix="none")
    monkeypatch.setattr(formats, "layer_forms", lambda *_: (_ for _ in ()).throw(problem))
    _, choice, *_ = choose(monkeypatch, lambda form: 2.0, lambda *_: WON, made=with_a_cut())
    assert choice.name.startswith("channels")
    assert choice.dropped == (("packed", "cannot be traced"),)


def names(monkeypatch, **options):
    *_, built, _ = choose(monkeypatch, lambda form: 2.0, lambda *_: WON, made=with_a_cut(), **options)
    return built.built


def test_names_tell_widths_and_shortcuts(monkeypatch):
    made = names(monkeypatch)
    assert [*made] == ["dense", "channels, multiples of 4", "channels", "packed"]
    assert [network.plan.multiple for network in made.values()] == [1, 4, 1, 4]
    made = names(monkeypatch, align=False)
    assert [*made] == ["dense", "channels", "packed"]
    assert [network.plan.multiple for network in made.values()] == [1, 1, 1]
    real, seen = formats.compact, []
    monkeypatch.setattr(formats, "compact", lambda *given, **how: seen.append(how) or real(*given, **how))
    made = names(monkeypatch, shortcuts="spread", norms="leave")
    assert [*made] == ["dense", "channels, multiples of 4, spread", "channels, spread", "packed, spread"]
    assert {(how["shortcuts"], how["norms"]) for how in seen} == {("spread", "leave")}


@pytest.mark.parametrize("option", [{"multiple": 2}, {"layers": ["3"]}, {"format": "packed"}])
def test_what_the_planner_decides_itself_is_no_option(monkeypatch, option):
    monkeypatch.setattr(formats, "compact", lambda *_, **__: pytest.fail("surgery first"))
    with pytest.raises(TypeError, match=next(iter(option))):
        choose_format(ticket(), network, CPU, X, **option)


def test_layers_are_timed_at_the_first_batch_and_networks_at_all(monkeypatch):
    times = (1.5, 1.4, 1.6, (BatchTime(1, 1.1, 1.05, 1.15),))
    found, choice, bench, built, _ = choose(monkeypatch, lambda form: 2.0, lambda *_: times, batch=(32, 1))
    assert (bench.batch, built.batches) == (32, (32, 1))
    assert (choice.batch, choice.others) == (32, (1,))
    assert found.plan.choice[:2] == (
        "chosen for cpu at batches 32, 1: packed",
        "  packed: 1.50x as fast as dense, 1.10x at batch 1",
    )


def test_the_plan_tells_what_the_choice_holds_for(monkeypatch):
    found, *_ = choose(monkeypatch, lambda form: 2.0, lambda *_: WON)
    assert (found.plan.format, found.plan.target) == ("auto", planned_for(CPU, (1,), True))


@pytest.mark.parametrize(
    ("batch", "message"),
    [(0, "0"), (257, "257, which target 'cpu' does not take"), ((1, 300), "300"), ((1, 1), "1, 1"), ((), "none"), (1.5, "1.5")],
)  # fmt: skip
def test_batches_are_checked_before_anything_else(monkeypatch, batch, message):
    monkeypatch.setattr(formats, "compact", lambda *_, **__: pytest.fail("surgery first"))
    with pytest.raises(ConfigError, match=message):
        choose_format(ticket(), network, CPU, X, batch=batch)


def test_a_stop_is_heard_before_each_candidate(monkeypatch):
    stop = Interrupted("stopped", signal_number=15, fix="go on")
    monkeypatch.setattr(formats, "compact", lambda *_, **__: pytest.fail("went on"))
    with pytest.raises(Interrupted):
        choose_format(ticket(), network, CPU, X, poll=lambda: (_ for _ in ()).throw(stop))


def test_a_ticket_is_timed_and_the_choice_is_loaded_again(tmp_path):
    """The whole of it, on ONNX Runtime; which one wins is not for a test to say."""
    said = []
    found, choice = choose_format(
        ticket(crossing=()), network, CPU, X, batch=(1, 3), duration_s=0.1, cache=tmp_path / "times", say=said.append
    )
    assert [time.layer for time in choice.layers] == ["3", "6", "9"]
    assert all(time.share == 0.5 and time.ratio > 0 for time in choice.layers)
    assert len(said) >= 3
    assert list((tmp_path / "times").iterdir())
    names = [other.name for other in choice.networks]
    assert ("packed" in names) == any(time.packed for time in choice.layers)
    assert choice.dropped == ()
    for other in choice.networks:
        assert other.ratio > 0
        assert other.low <= other.ratio <= other.high  # however short the time
        assert [time.batch for time in other.others] == [3]
    assert choice.name in ("dense", *names)
    assert found.plan.choice[0] == f"chosen for cpu at batches 1, 3: {choice.name}"
    loaded = load_compact(found.save(tmp_path / "found", program=False), network)
    with torch.no_grad():
        assert torch.equal(loaded(X), found.module(X))


def test_a_ticket_without_any_structure_is_deployed_dense_and_nothing_is_timed(monkeypatch):
    made = ticket()
    scattered = {name: torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5 for name, mask in made.masks.items()}  # fmt: skip
    monkeypatch.setattr(network_bench, "build_engine", lambda *_, **__: pytest.fail("built"))
    found, choice = choose_format(Ticket(made.weights, scattered, made.model, made.provenance), network, CPU, X)
    assert choice == Choice("dense", "cpu", 1, (), ())
    assert found.plan.choice == ("chosen for cpu at batch 1: dense",)


def test_a_target_that_does_not_run_here_is_refused_before_anything_else(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    if trt_bindings.local_gpu() is not None:
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
