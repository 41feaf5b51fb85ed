"""The channel schedule against the published values, and the choice of channels against the published loop."""

import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.channel_schedule import ChannelSchedule, floors, lowest, share_of

# the public commands: iterations an epoch × epochs with removals; offset is half of 1000 steps between mask updates
VGG19 = ChannelSchedule(0.5, interval=8000, offset=500, until=500 * 130)
RESNET50_CIFAR = ChannelSchedule(0.5, interval=1000, offset=500, until=500 * 130)
RESNET50_IMAGENET = ChannelSchedule(0.4, interval=2 * 2502, offset=500, until=2502 * 80)


def test_events_and_targets_of_vgg19_on_cifar():
    *events, last = VGG19.events()
    assert events == [7500, 15500, 23500, 31500, 39500, 47500, 55500, 63500]
    assert [VGG19.target(taken) for taken in events] == pytest.approx(
        [0.154, 0.279, 0.370, 0.432, 0.470, 0.490, 0.498, 0.500], abs=5e-4
    )
    assert VGG19.target(63500) < 0.5
    assert (last, VGG19.target(last)) == (65000, 0.5)


def test_events_and_targets_of_resnet50_on_cifar():
    *events, last = RESNET50_CIFAR.events()
    assert (len(events), events[0], events[-1], last) == (65, 500, 64500, 65000)
    assert RESNET50_CIFAR.target(500) == pytest.approx(0.011, abs=5e-4)


def test_events_and_targets_of_resnet50_on_imagenet():
    *events, last = RESNET50_IMAGENET.events()
    assert (len(events), events[0], events[-1], last) == (40, 4504, 199660, 200160)
    assert RESNET50_IMAGENET.target(4504) == pytest.approx(0.026, abs=5e-4)
    assert RESNET50_IMAGENET.target(199660) == pytest.approx(0.400, abs=5e-4)
    assert RESNET50_IMAGENET.target(199660) < RESNET50_IMAGENET.target(200160) == 0.4


@given(st.floats(0.01, 0.99), st.integers(1, 40), st.integers(0, 60), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_events_are_when_removal_is_due_and_the_target_rises_to_exactly_the_sparsity(sparsity, interval, offset, until):
    schedule = ChannelSchedule(sparsity, interval, offset, until)
    assert schedule.events() == tuple(taken for taken in range(1, until + 100) if schedule.due(taken))
    assert schedule.events()[-1] == until
    targets = [schedule.target(taken) for taken in range(until + 3)]
    assert targets == sorted(targets)
    assert (targets[0], *targets[-3:]) == (0.0, sparsity, sparsity, sparsity)


def test_without_channel_sparsity_nothing_is_ever_due():
    schedule = ChannelSchedule(0.0, 10, 5, 100)
    assert schedule.events() == ()
    assert not any(schedule.due(taken) for taken in range(1, 201))
    assert schedule.target(50) == schedule.target(100) == 0.0


def test_schedules_that_are_none_are_refused():
    for sparsity in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"channel sparsity (1.0|-0.1|nan)\n  expected: a number in \[0, 1\)"):
            ChannelSchedule(sparsity, 10, 5, 100)
    for what in ("interval", "offset", "until"):
        steps = {"interval": 10, "offset": 5, "until": 100} | {what: -1 if what == "offset" else 0}
        with pytest.raises(ConfigError, match=rf"{what} (0|-1) of the channel schedule[\s\S]*or more steps"):
            ChannelSchedule(0.5, **steps)


def test_shares_round_halves_up_and_are_decimal_numbers():
    assert [share_of(0.5, n) for n in range(6)] == [0, 1, 1, 2, 2, 3]
    assert share_of(0.145, 100) == 15  # in floating point 14.499999999999998
    assert share_of(0.3, 7552) == 2266
    assert share_of(0.4, 7552) == 3021


def test_floors_are_a_share_of_what_stays_and_at_least_one():
    assert floors([64], 0.5, 0.2) == [6]
    assert floors([64, 128, 256, 512], 0.5, 0.5) == [16, 32, 64, 128]
    assert floors([512, 64], 0.4, 0.2) == [61, 7]
    assert floors([100], 0.9, 0.5) == [5]  # in floating point 4.999999999999999
    assert floors([4, 8], 0.5, 0.0) == [1, 1]
    assert floors([], 0.5, 0.2) == []


def test_floors_that_keep_more_than_may_stay_are_refused():
    assert floors([2, 2, 6], 0.7, 0.2) == [1, 1, 1]
    with pytest.raises(
        ConfigError,
        match=r"channel sparsity 0.8 leaves 2 of 10 channels, for 3 layers that keep 3[\s\S]*a wider network",
    ):
        floors([2, 2, 6], 0.8, 0.2)
    for ratio in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=r"floor ratio (-0.1|1.1)[\s\S]*\[0, 1\]"):
            floors([4], 0.5, ratio)
    with pytest.raises(ConfigError, match=r"channel sparsity 1.0"):
        floors([4], 1.0, 0.2)


def published_loop(scores, alive, count, floors):
    """Take the lowest; a layer that would fall under its floor keeps its best and is frozen; again, until none does."""
    gone, frozen = set(), set()
    while True:
        ranked = sorted(
            (float(score[c]), p, c)
            for p, score in enumerate(scores)
            for c in range(len(score))
            if alive[p][c] and p not in frozen
        )
        candidates = ranked[: count - len(gone)]
        hit = []
        for p in range(len(scores)):
            losing = sum(1 for _, pool, _ in candidates if pool == p)
            if p not in frozen and int(alive[p].sum()) - losing < floors[p]:
                hit.append(p)
        if not hit:
            return gone | {(p, c) for _, p, c in candidates}
        for p in hit:
            own = [(pool, c) for _, pool, c in ranked if pool == p]
            gone |= set(own[: max(0, len(own) - floors[p])])
            frozen.add(p)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 10**6), st.floats(0, 1), st.data())
@settings(max_examples=150, deadline=None)
def test_the_lowest_are_what_the_published_loop_removes(sizes, seed, share, data):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(sizes), generator=generator).double()  # no ties
    scores = list(order.split(sizes))
    alive = [torch.rand(size, generator=generator) < 0.8 for size in sizes]
    least = [data.draw(st.integers(1, size)) for size in sizes]
    spare = sum(max(0, int(a.sum()) - floor) for a, floor in zip(alive, least, strict=True))
    count = round(share * spare)
    found = lowest(scores, alive, count, least)
    assert {(p, c) for p, gone in enumerate(found) for c in gone.nonzero().flatten().tolist()} == published_loop(
        scores, alive, count, least
    )
    assert sum(int(gone.sum()) for gone in found) == count


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_ties_go_by_pool_then_by_channel_and_floors_hold(sizes, seed, values):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(values, (size,), generator=generator).float() for size in sizes]
    alive = [torch.ones(size, dtype=torch.bool) for size in sizes]
    least = [1 + size // 3 if size > 1 else 1 for size in sizes]
    spare = sum(size - floor for size, floor in zip(sizes, least, strict=True))
    assume(spare > 0)
    count = (spare + 1) // 2
    wanted, left = [torch.zeros_like(a) for a in alive], list(sizes)
    for _, p, c in sorted((float(s[c]), p, c) for p, s in enumerate(scores) for c in range(len(s))):
        if left[p] > least[p] and sum(sizes) - sum(left) < count:
            wanted[p][c] = True
            left[p] -= 1
    assert all(torch.equal(a, b) for a, b in zip(lowest(scores, alive, count, least), wanted, strict=True))


def test_what_is_gone_is_not_chosen_again_and_the_arguments_stay():
    scores = [torch.tensor([0.0, 5.0, 1.0, 2.0]), torch.tensor([torch.nan, 3.0, 4.0])]
    alive = [torch.tensor([False, True, True, True]), torch.tensor([False, True, True])]
    found = lowest(scores, alive, 3, [1, 1])
    assert [gone.tolist() for gone in found] == [[False, False, True, True], [False, True, False]]
    assert [pool.tolist() for pool in alive] == [[False, True, True, True], [False, True, True]]
    assert not any(bool(gone.any()) for gone in lowest(scores, alive, 0, [3, 2]))
    assert lowest([], [], 0, []) == []


def test_a_choice_that_cannot_be_made_is_refused():
    scores, alive = [torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([True, True, True])]
    with pytest.raises(TicketError, match=r"3 channels to remove, of 3[\s\S]*0 to 2[\s\S]*lower the floors"):
        lowest(scores, alive, 3, [1])
    with pytest.raises(TicketError, match="-1 channels to remove"):
        lowest(scores, alive, -1, [1])
    for bad in (torch.nan, torch.inf):
        with pytest.raises(TicketError, match=r"NaN or infinite[\s\S]*lower the learning rate"):
            lowest([torch.tensor([1.0, bad, 3.0])], alive, 1, [1])


def test_ten_thousand_channels_take_little_time():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(200, generator=generator) for _ in range(50)]
    alive = [torch.ones(200, dtype=torch.bool) for _ in range(50)]
    times = []
    for _ in range(3):
        before = time.process_time()
        found = lowest(scores, alive, 5000, [20] * 50)
        times.append(time.process_time() - before)
    assert sum(int(gone.sum()) for gone in found) == 5000
    assert min(times) < 0.1
