"""Surgery on random networks of every kind: the compact network is the masked one, and what is dead is gone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_graphs import ALONE, NETWORKS, OTHER, TRACED, dense_of
from random_masks import both, difference, drops, masks_for, samples, scattered, stale, ticket_of
from random_pieces import Rows
from surgery_nets import masked, randomised

from deploy_sparse.api import oneshot_ticket
from deploy_sparse.surgery import SurgeryPlan, channel_groups, compact, load_compact

LIMIT = 1e-10
X = torch.randn(TRACED, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LIVE_OR_SILENT = pytest.mark.parametrize("silent", [True, False], ids=["silent", "live"])


def few(examples):
    return settings(
        phases=(Phase.explicit, Phase.generate),  # a failing network is small already; shrinking traces for minutes
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def cut(drawn, made):
    """The compact network, compared with the masked one in float64 at every size it takes; plan and flags are kept."""
    result = compact(made, drawn.build, X)
    reference, network = masked(drawn.build, made), drawn.build()
    assert not any(part.training for part in result.module.modules())
    for shape in (TRACED, (1, *TRACED[1:]), OTHER):
        if network.takes(shape):
            assert difference(reference, result.module, shape) <= LIMIT
    assert SurgeryPlan.from_json(json.loads(json.dumps(result.plan.to_json()))) == result.plan
    assert stale(result.module) == []
    flags, dense_flags = ({n: p.requires_grad for n, p in m.named_parameters()} for m in (result.module, network))
    assert {name: flags[name] for name in dense_flags} == dense_flags  # a bias may have come besides
    return result


def lengths(module, must):
    state = module.state_dict()
    return {name: state[name].shape[rows.dim] for name, rows in must.items()}


def emptied(drawn, seed, silent, unit="dims"):
    """The dense network, its groups, drawn channels, and the ticket that empties them."""
    network = dense_of(drawn, seed)
    groups = channel_groups(network, X, unit=unit)
    gone = drops(network, groups, seed, least=1 if silent else 2)
    live = frozenset() if silent else frozenset(gone.channels)
    return network, gone, ticket_of(network, masks_for(network, groups, gone.channels, live))


def one_more(rows: Rows) -> int:
    """Rows of one channel that may stay to carry the constants of all that went."""
    return 1 if not rows.axes else max(torch.Size(rows.shape).numel() // rows.shape[a] for a in rows.axes.values())


def check_silent(drawn, seed, unit="dims"):
    network, gone, made = emptied(drawn, seed, True, unit)
    result = cut(drawn, made)
    assert lengths(result.module, network.shrinks()) == gone.survive
    assert all(gone.survive[name] < length for name, length in lengths(network, network.shrinks()).items())
    if not network.is_random():  # removed channels are silent in training mode too
        assert difference(masked(drawn.build, made).train(), copy.deepcopy(result.module).train()) <= LIMIT
    return result


def check_live(drawn, seed, carriers=1):
    """``carriers`` channels may stay for the constants of the others: readers behind one another may need several."""
    network, gone, made = emptied(drawn, seed, silent=False)
    result = cut(drawn, made)
    must = {name: rows for name, rows in network.shrinks().items() if rows.live}
    found, dense = lengths(result.module, must), lengths(network, must)
    for name, rows in must.items():
        assert found[name] <= gone.survive[name] + carriers * one_more(rows), (name, result.plan.notes())
        assert found[name] < dense[name] or carriers > 1
    assert result.plan.cost_after.parameters < result.plan.cost_before.parameters


def check_mixture(drawn, seed, density):
    network = dense_of(drawn, seed)
    groups = channel_groups(network, X)
    gone = drops(network, groups, seed)
    live = frozenset(name for number, name in enumerate(sorted(gone.channels)) if (number + seed) % 2)
    masks = masks_for(network, groups, gone.channels, live)
    cut(drawn, ticket_of(network, both(masks, scattered(network, density, seed))))


def check_oneshot(drawn, silent):
    """Live channels: half of three is one, which stays as its own carrier; readers in a row may need two carriers."""
    network = dense_of(drawn, 1)
    result = cut(drawn, oneshot_ticket(network, X, "channels", 0.5, silent=silent))
    assert result.plan.cost_after.parameters < result.plan.cost_before.parameters
    must = {n: rows for n, rows in network.shrinks().items() if silent or (rows.live and narrowest(rows) > 5)}
    found, dense = lengths(result.module, must), lengths(network, must)
    assert [name for name in must if found[name] >= dense[name]] == []


def narrowest(rows: Rows) -> int:
    """The smallest number of channels that a weight's rows may be seen as."""
    return min([rows.shape[axis] for axis in rows.axes.values()] or rows.shape)


@pytest.mark.parametrize("kind", ALONE)
def test_every_kind_builds_runs_and_gives_the_same_twice(kind):
    drawn = ALONE[kind]
    network, again = dense_of(drawn, 3), dense_of(drawn, 3)
    for shape in (TRACED, OTHER):
        if network.takes(shape):
            assert difference(network.eval(), again.eval(), shape) == 0.0
    if not network.is_random():
        assert difference(network.train(), again.train()) == 0.0
    with torch.no_grad():
        outputs = network.eval()(samples(TRACED))
    for y in outputs.values() if isinstance(outputs, dict) else [outputs]:
        assert (y - y.mean(0)).abs().max() > 1e-3 * y.abs().max()  # else "equal" would say nothing
    names = set(network.state_dict())
    assert set(network.shrinks()) <= names
    rows = network.shrinks()
    assert lengths(network, rows) == {name: torch.Size(r.shape).numel() for name, r in rows.items()}


@pytest.mark.parametrize("kind", ALONE)
def test_silent_channels_of_every_kind_go_exactly(kind):
    check_silent(ALONE[kind], seed=5)


@pytest.mark.parametrize("kind", ["FusedSoftmax", "FusedSdpa", "ThreeSdpa", "Multihead", "EncoderLayer", "Windows"])
def test_whole_heads_of_every_attention_go_exactly(kind):
    check_silent(ALONE[kind], seed=7, unit="heads")


@pytest.mark.parametrize("kind", ALONE)
def test_live_channels_of_every_kind_go_where_they_are_constant(kind):
    check_live(ALONE[kind], seed=6)


@LIVE_OR_SILENT
@pytest.mark.parametrize("kind", ["Residual", "ConvNeXt", "TwoGroups", "FusedSdpa", "Multihead", "Grouped", "Chunk"])
def test_one_shot_pruning_makes_every_kind_smaller(kind, silent):
    check_oneshot(ALONE[kind], silent)


@few(15)
@given(NETWORKS, st.integers(0, 99))
def test_silent_channels_of_random_networks_go_exactly(drawn, seed):
    check_silent(drawn, seed)


@few(10)
@given(NETWORKS, st.integers(0, 99))
def test_live_channels_of_random_networks_go_where_they_are_constant(drawn, seed):
    check_live(drawn, seed, carriers=2)


@few(10)
@given(NETWORKS, st.integers(0, 99), st.sampled_from([0.1, 0.5, 0.9]))
def test_mixed_and_scattered_masks_stay_exact(drawn, seed, density):
    check_mixture(drawn, seed, density)


@few(3)
@given(NETWORKS, st.integers(0, 99))
def test_a_saved_random_network_comes_back_bit_by_bit(tmp_path_factory, drawn, seed):
    result = check_silent(drawn, seed)
    loaded = load_compact(result.save(tmp_path_factory.mktemp("compact") / "small"), drawn.build)
    assert difference(result.module, loaded) == 0.0
    assert {n: tuple(t.shape) for n, t in loaded.state_dict().items()} == {
        n: tuple(t.shape) for n, t in result.module.state_dict().items()
    }


@few(5)
@given(NETWORKS, st.integers(0, 99))
def test_random_networks_in_single_precision_are_proved_before_rounding(drawn, seed):
    def build():
        return drawn.build().float()

    network = build()
    randomised(network, seed)
    groups = channel_groups(network, X.float())
    gone = drops(network, groups, seed)
    made = ticket_of(network, masks_for(network, groups, gone.channels, frozenset(gone.channels)))
    result = compact(made, build, X.float())
    assert result.parity.float64.max_rel <= LIMIT
    assert difference(masked(build, made), result.module) <= 1e-5
    assert {p.dtype for p in (*result.module.parameters(), *result.module.buffers()) if p.is_floating_point()} == {
        torch.float32
    }


@pytest.mark.slow
@few(300)
@given(NETWORKS, st.integers(0, 9999), st.sampled_from([0.1, 0.5, 0.9]))
def test_many_random_networks(drawn, seed, density):
    check_silent(drawn, seed)
    check_live(drawn, seed, carriers=2)
    check_mixture(drawn, seed, density)
    check_oneshot(drawn, silent=bool(seed % 2))
