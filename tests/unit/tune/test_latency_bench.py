"""Layers in turns: cold weights, a written input, a quartile that others on the machine do not move."""

import contextlib

import numpy as np
import pytest
from latency_samples import CONV

from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import EngineError
from deploy_sparse.measure.timing import Clock
from deploy_sparse.tune.latency import bench as module
from deploy_sparse.tune.latency.bench import LayerCall, TargetBench, clock_of, pace_of, timed_in_turns
from deploy_sparse.tune.latency.shapes import LayerShape


class Machine:
    """A machine whose clocks move by what a call takes; ``slower`` is a factor on everything."""

    def __init__(self):
        self.wall = self.cpu = 0
        self.slower = 1.0
        self.log = []
        self.clock = Clock(lambda: self.wall, lambda: self.cpu)

    def call(self, name, *ms, cpu=None):
        times = iter(())

        def run():
            nonlocal times
            took = next(times, None)
            if took is None:
                times = iter(ms)
                took = next(times)
            self.log.append(name)
            self.wall += round(took * self.slower * 1e6)
            self.cpu += round((took if cpu is None else cpu) * self.slower * 1e6)

        return LayerCall(run, lambda: self.log.append(f"write {name}"))


def test_calls_take_turns_and_every_input_is_written_before():
    machine = Machine()
    timed_in_turns({"a": machine.call("a", 1), "b": machine.call("b", 2)}, rounds=2, clock=machine.clock)
    assert machine.log == ["a", "b", *["write a", "a", "write b", "b"] * 2]


def test_a_time_is_the_lower_quartile_by_the_clock_that_was_asked_for():
    machine = Machine()
    disturbed = machine.call("a", 9, 3, 3, 90, 3, 50, 4, 60, 70, cpu=2.5)  # the first call warms up
    found = timed_in_turns({"a": disturbed}, rounds=8, clock=machine.clock)
    assert found == {"a": 3.0}
    assert timed_in_turns({"a": disturbed}, rounds=8, by="cpu", clock=machine.clock) == {"a": 2.5}


def test_polls_before_every_round():
    machine, polls = Machine(), []
    timed_in_turns({"a": machine.call("a", 1)}, rounds=5, poll=lambda: polls.append(1), clock=machine.clock)
    assert len(polls) == 5


@pytest.mark.parametrize(("target", "by"), [("cpu", "cpu"), ("torch-cpu", "cpu"), ("rtx-sm89", "wall")])
def test_cpu_time_counts_where_one_thread_does_the_work(target, by):
    assert clock_of(load_target(target)) == by


def test_several_threads_are_timed_by_the_wall_clock():
    assert clock_of(load_target("cpu").model_copy(update={"threads": 4})) == "wall"


class Fake(TargetBench):
    """Layers that take as many ms as they have output channels on a machine that may slow down."""

    machine = Machine()

    @contextlib.contextmanager
    def _opened(self, shape, folder):
        yield self.machine.call(str(shape), shape.c_out)


def test_a_machine_that_slows_down_between_chunks_does_not_show():
    pace = LayerShape("linear", 8, 100)
    bench = Fake(load_target("cpu"), 1, (pace,), clock=Fake.machine.clock)
    first = bench.times([LayerShape("linear", 8, 10)])
    Fake.machine.slower = 3.0
    assert bench.times([LayerShape("linear", 8, 10)]) == first == {LayerShape("linear", 8, 10): 10.0}
    assert bench.times([pace]) == {pace: 100.0}


def test_the_heaviest_layers_that_fill_the_caches_run_beside():
    conv = LayerShape("conv", 64, 64, (3, 3), height=30, width=30)
    wide = [LayerShape("linear", 4096, count) for count in (2048, 2047, 1)]  # 32 MiB, nearly as much, 16 KiB
    assert pace_of([*wide, conv, conv]) == (conv, wide[0])
    assert pace_of([LayerShape("linear", 1 << 13, 1 << 13)]) == (LayerShape("linear", 1 << 13, 1 << 13),)


def test_chunks_hold_what_fits_into_memory_together():
    bench = TargetBench(load_target("cpu"), 1, ())
    small = [LayerShape("linear", 8, count) for count in range(1, 201)]
    assert [len(chunk) for chunk in bench.chunks([*small, *small])] == [96, 96, 8]
    wide = [LayerShape("linear", 4096, 4096 + count) for count in range(4)]  # 64 MiB each
    assert [len(chunk) for chunk in bench.chunks(wide)] == [1, 1, 1, 1]
    assert list(bench.chunks([])) == []


@pytest.mark.parametrize("target", ["cpu", "torch-cpu"])
@pytest.mark.parametrize(
    "shape",
    [
        LayerShape("conv", 16, 24, (3, 3), padding=(1, 1), height=6, width=6),
        LayerShape("depthwise", 16, 16, (3, 3), groups=16, height=6, width=6),
        LayerShape("linear", 12, 8, tokens=5),
    ],
    ids=str,
)
def test_layers_are_timed_on_real_targets(target, shape):
    found = TargetBench(load_target(target), 2, (), rounds=3).times([shape])
    assert 0 < found[shape] < 1e3


def test_a_precision_below_fp32_goes_through_the_engines_builder():
    target = load_target("cpu").model_copy(update={"name": "cpu-int8", "precision": "int8"})
    shape = LayerShape("conv", 16, 24, height=6, width=6)
    assert TargetBench(target, 1, (), rounds=3).times([shape])[shape] > 0


def test_an_engine_that_does_not_run_here_is_refused(monkeypatch):
    class Elsewhere:
        def runnable(self):
            return "compiled, not timed here: no NVIDIA GPU"

    monkeypatch.setattr(module, "build_engine", lambda *_, **__: Elsewhere())
    with pytest.raises(EngineError) as problem:
        TargetBench(load_target("rtx-sm89"), 1, ()).times([CONV.with_counts(4, 4)])
    assert "target 'rtx-sm89' cannot be timed on this machine: compiled, not timed here: no NVIDIA GPU" in str(
        problem.value
    )
    assert "make the table on the machine that the target describes" in str(problem.value)


def test_inputs_stay_bounded_however_often_they_are_written():
    array = np.ones(3, np.float32)
    write = module._written_again(array)
    for _ in range(4):
        write()
    np.testing.assert_array_equal(array, np.ones(3))
    whole = np.ones(3, np.int64)
    module._written_again(whole)()
    np.testing.assert_array_equal(whole, np.ones(3))
