"""What the planner says of its choice."""

import pytest

from deploy_sparse.engine.target import load_target
from deploy_sparse.tune.choice import BatchTime, Choice, LayerTime, NetworkTime, planned_for


def test_lines_say_what_was_timed():
    layers = (LayerTime("a", "form", 0.5, 2.0, True), LayerTime("b", "form", 0.5, 0.7, False))
    networks = (NetworkTime("channels", 9, 0.98, 0.9, 1.0), NetworkTime("packed", 5, 1.523, 1.5, 1.6))
    again = (NetworkTime("packed", 5, 1.48, 1.4, 1.5, (BatchTime(32, 1.01, 0.99, 1.03),)),)
    assert Choice("packed", "cpu", 4, layers, networks).lines() == [
        "chosen for cpu at batch 4: packed",
        "  channels: 0.98x as fast as dense",
        "  packed: 1.52x as fast as dense",
        "  1 of 2 layers of blocks are faster packed",
    ]
    assert Choice("packed", "cpu", 4, layers, networks, again, (32,), (("x", "why"),)).lines() == [
        "chosen for cpu at batches 4, 32: packed",
        "  channels: 0.98x as fast as dense",
        "  packed: 1.52x as fast as dense",
        "  packed, timed once more: 1.48x as fast as dense, 1.01x at batch 32",
        "  1 of 2 layers of blocks are faster packed",
        "  left out: x: why",
    ]
    assert Choice("dense", "cpu", 1, (), ()).lines() == ["chosen for cpu at batch 1: dense"]


@pytest.mark.parametrize(
    ("low", "others", "wins"),
    [(1.02, (), True), (1.01, (), False), (None, (), False), (1.02, (0.98,), True), (1.02, (0.99, 0.97), False), (1.02, (None,), False)],
)  # fmt: skip
def test_what_wins(low, others, wins):
    times = tuple(BatchTime(2, 1.1, other, 1.2) for other in others)
    assert NetworkTime("packed", 1, 1.1, low, 1.2, times).wins is wins


def test_other_targets_batches_and_widths_need_another_choice():
    cpu = load_target("cpu")
    other = cpu.model_copy(update={"threads": 2})
    assert len({planned_for(t, b, a) for t in (cpu, other) for b in ((1,), (1, 32)) for a in (True, False)}) == 8
    assert planned_for(cpu, (1, 32), False) == f"cpu ({cpu.digest[:12]}) at batches 1, 32, widths not rounded up"
