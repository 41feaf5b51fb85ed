"""Masks that move: what is dropped, what grows, what never changes."""

import math
from itertools import pairwise

import pytest
import torch
from dst_samples import Training, masks, method
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.dst import DynamicMasks, initial_masks
from deploy_sparse.sparsify.exploration import Exploration, SoftBound
from deploy_sparse.sparsify.flops import flops
from deploy_sparse.sparsify.imp import dense_masks

shapes = st.lists(
    st.one_of(st.tuples(st.integers(1, 24), st.integers(1, 24)), st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3), st.just(3))),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    shapes=shapes,
    density=st.floats(0.05, 1.0),
    distribution=st.sampled_from(["erk", "uniform"]),
    seed=st.integers(0, 5),
)
def test_initial_masks_leave_exactly_the_density(shapes, density, distribution, seed):
    dense = {str(n): torch.ones(shape, dtype=torch.bool) for n, shape in enumerate(shapes)}
    found = initial_masks(dense, density, distribution, seed)
    left, total = sum(int(m.sum()) for m in found.values()), sum(m.numel() for m in dense.values())
    single = sum(int(mask.sum()) == 1 for mask in found.values())  # a layer keeps a weight even if its share is none
    assert all(bool(mask.any()) for mask in found.values())
    assert -0.5 - 1e-6 <= left - density * total <= 0.5 + 1e-6 + single
    if distribution == "uniform":
        assert all(abs(int(m.sum()) - density * m.numel()) <= 1 for m in found.values())


def test_initial_masks_depend_on_the_seed_only():
    assert all(torch.equal(a, masks(seed=1)[name]) for name, a in masks(seed=1).items())
    assert any(not torch.equal(a, masks(seed=2)[name]) for name, a in masks(seed=1).items())


def test_an_update_drops_the_smallest_weights_and_grows_where_the_gradient_is_largest():
    training = Training(method(fraction=0.25, final_fraction=0.25))
    training.steps(3)
    before = training.masks()
    gradients, weights = training.step()
    for name, mask in training.masks().items():
        alive = before[name].flatten().nonzero().flatten().tolist()
        drop = math.ceil(0.25 * len(alive))
        magnitude, slope = weights[name].flatten().abs(), gradients[name].flatten().abs()
        kept = set(sorted(alive, key=lambda i: float(magnitude[i]))[drop:])
        free = sorted(set(range(mask.numel())) - kept, key=lambda i: -float(slope[i]))
        assert set(mask.flatten().nonzero().flatten().tolist()) == kept | set(free[:drop]), name


def test_new_weights_start_at_zero_and_the_optimizer_forgets_dropped_ones():
    training = Training(method(fraction=0.5, decay="constant"))
    training.steps(3)
    before = training.masks()
    training.step()
    for name, parameter in training.model.named_parameters():
        if name in before:
            new, off = training.method.masks[name] & ~before[name], ~training.method.masks[name]
            momentum = training.optimizer.state[parameter]["momentum_buffer"]
            assert bool(new.any())
            assert bool((parameter[new | off] == 0).all())
            assert bool((momentum[new | off] == 0).all())
    training.step()
    assert any(
        bool((p != 0)[training.method.masks[n] & ~before[n]].any())
        for n, p in training.model.named_parameters()
        if n in before
    )


@settings(max_examples=15, deadline=None)
@given(
    density=st.floats(0.1, 0.9), fraction=st.floats(0.05, 0.9), growth=st.sampled_from(["gradient", "random"]),
    scope=st.sampled_from(["layer", "global"]), interval=st.integers(1, 5),
)  # fmt: skip
def test_the_budget_never_changes(density, fraction, growth, scope, interval):
    training = Training(method(density, fraction=fraction, growth=growth, scope=scope, interval=interval))
    first, budget = training.counts(), training.method.budget
    for _ in range(12):
        training.step()
        now = training.counts()
        assert sum(now.values()) == budget
        assert scope == "global" or now == first
        assert min(now.values()) > 0
        assert all(
            bool((p[~training.method.masks[n]] == 0).all()) for n, p in training.model.named_parameters() if n in now
        )


def test_globally_weights_move_between_layers():
    training = Training(method(0.4, scope="global", fraction=0.5, decay="constant"))
    first = training.counts()
    assert training.steps(12).counts() != first


def test_nothing_moves_from_the_stop_on():
    training = Training(method(stop=9))
    training.steps(8)
    before = training.masks()
    assert all(torch.equal(mask, before[name]) for name, mask in training.steps(12).masks().items())


def test_a_soft_bound_holds_the_surplus_between_updates_and_ends_at_the_budget():
    soft = SoftBound(0.2, 18)
    training = Training(method(0.3, soft=soft, scope="global"))
    budget, total = training.method.budget, training.method.total
    for taken in range(1, 25):
        training.step()
        alive = sum(training.counts().values())
        if taken < 4:
            assert alive == budget
        elif taken < 18:
            assert alive == budget + round(soft.at(taken - taken % 4) * total)
        else:
            assert alive == budget
        assert training.method.ready(taken - 1) == (taken >= 18)


def test_layer_by_layer_the_surplus_is_spread_as_the_weights_are():
    training = Training(method(0.3, soft=SoftBound(0.2, 18)))
    first = training.counts()
    training.steps(4)
    now, room = training.counts(), {name: mask.numel() for name, mask in training.masks().items()}
    assert sum(now.values()) == training.method.budget + round(SoftBound(0.2, 18).at(4) * training.method.total)
    scales = [now[name] / first[name] for name in now if now[name] < room[name]]
    assert max(scales) - min(scales) < 0.1
    assert training.steps(16).counts() == first


def test_layers_keep_their_numbers_wherever_the_masks_come_from():
    generator = torch.Generator().manual_seed(0)
    odd = {name: torch.rand(m.shape, generator=generator) < 0.2 for name, m in masks().items()}
    odd["0.weight"][:, :4] = True
    training = Training(DynamicMasks(odd, Exploration(2, 100), distribution="erk"))
    first = training.counts()
    assert training.steps(6).counts() == first


def test_many_tiny_layers_do_not_inflate_the_budget():
    shapes = {f"tiny{number}": (3, 3) for number in range(12)} | {"wide": (3, 400)}
    dense = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    own = DynamicMasks(initial_masks(dense, 0.05, "uniform", 0), Exploration(2, 100, growth="random"))
    model = nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    own.start_(model)
    for step in range(4):
        own.after_step_(model, torch.optim.SGD(model.parameters(), lr=0.1), step)
    assert sum(int(mask.sum()) for mask in own.masks.values()) == own.budget


def test_no_layer_is_emptied_by_a_large_fraction_over_all_layers():
    weights = {name: torch.zeros_like(mask) for name, mask in masks().items()}
    for mask in weights.values():
        mask[0, 0] = True  # one weight a layer is the whole budget
    training = Training(DynamicMasks(weights, Exploration(2, 100, scope="global", fraction=0.9, decay="constant")))
    for _ in range(6):
        training.step()
        assert min(training.counts().values()) > 0


def test_growth_takes_the_gradient_averaged_over_the_last_batches():
    training = Training(method(0.2, gradient_batches=3, fraction=0.5, decay="constant"))
    training.step()
    gradients = [training.step()[0] for _ in range(3)]
    one = Training(method(0.2, fraction=0.5, decay="constant")).steps(4)
    assert any(not torch.equal(mask, one.method.masks[name]) for name, mask in training.masks().items())
    for name in training.counts():
        mean = sum(g[name] for g in gradients).abs()
        now, grown = (
            training.method.masks[name],
            training.method.masks[name] & (training.model.get_parameter(name) == 0),
        )
        assert bool(grown.any())
        assert float(mean[grown].min()) >= float(mean[~now].max())


def test_each_update_takes_gradients_of_its_own():
    training = Training(method(0.2, fraction=0.5, decay="constant"))
    training.steps(7)
    before = training.masks()
    gradients, weights = training.step()
    for name, mask in training.masks().items():
        alive = before[name].flatten().nonzero().flatten().tolist()
        magnitude, slope = weights[name].flatten().abs(), gradients[name].flatten().abs()
        kept = set(sorted(alive, key=lambda i: float(magnitude[i]))[math.ceil(0.5 * len(alive)) :])
        free = sorted(set(range(mask.numel())) - kept, key=lambda i: -float(slope[i]))
        grown = set(free[: len(alive) - len(kept)])
        assert set(mask.flatten().nonzero().flatten().tolist()) == kept | grown


def test_random_growth_draws_anew_at_every_update():
    own = DynamicMasks(masks(0.1), Exploration(1, 100, growth="random", fraction=1.0, decay="constant"))
    training = Training(own, lr=1e-9)
    drawn = []
    for _ in range(4):
        training.step()
        drawn.append(torch.cat([mask.flatten() for mask in own.masks.values()]))
    overlap = [float((a & b).sum() / b.sum()) for a, b in pairwise(drawn)]
    assert max(overlap) < 0.5  # the same draw would give the same weights again


def test_layers_of_one_shape_do_not_grow_alike():
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    dense = dense_masks(model, head=True)
    first = {name: torch.zeros_like(mask) for name, mask in dense.items()}
    for mask in first.values():
        mask[:3] = True
    own = DynamicMasks(first, Exploration(1, 100, growth="random", fraction=1.0, decay="constant"))
    own.start_(model)
    own.after_step_(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    one, other = own.masks.values()
    assert float((one & other).sum() / one.sum()) < 0.5


def test_random_growth_needs_no_gradient_and_is_the_same_wherever_it_runs():
    def grown(seed):
        own = DynamicMasks(masks(), Exploration(4, 100, growth="random"), seed=seed)
        return Training(own).steps(4)

    first, again, other = grown(1), grown(1), grown(2)
    assert not first.method.state().keys() & {f"gradient/{name}" for name in first.counts()}
    assert all(torch.equal(mask, again.method.masks[name]) for name, mask in first.masks().items())
    assert any(not torch.equal(mask, other.method.masks[name]) for name, mask in first.masks().items())


@pytest.mark.parametrize("batches", [1, 2])
def test_an_update_without_a_finite_gradient_waits_for_one(batches):
    training = Training(method(gradient_batches=batches))
    training.steps(4 - batches)
    before = training.masks()
    for _ in range(batches):
        training.step(spoil=True)
    assert all(torch.equal(mask, before[name]) for name, mask in training.masks().items())
    assert not training.method.ready(3)
    training.step()
    assert any(not torch.equal(mask, before[name]) for name, mask in training.masks().items())
    assert training.method.ready(4)


def test_weights_that_are_all_zero_do_not_open_the_masks():
    training = Training(method(scope="global", fraction=0.5, decay="constant"))
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.zero_()
    training.steps(8)
    assert sum(training.counts().values()) == training.method.budget


def test_before_the_start_figures_are_those_of_the_first_masks():
    own = method(0.3)
    assert own.figures()["density"] == pytest.approx(own.budget / own.total, abs=1e-6)


def test_dense_gradients_are_counted_where_they_are_computed():
    macs = {"0.weight": 120, "2.weight": 320, "4.weight": 64}
    own = DynamicMasks(masks(0.3), Exploration(4, 100, gradient_batches=3), macs=macs)
    Training(own).steps(10)  # gradients of steps 2, 3, 4, of 6, 7, 8 and of 10
    found = flops(macs, masks(0.3))
    spent = (3 * 3 * found.theoretical + 7 * (2 * found.theoretical + found.dense)) / (10 * 3 * found.dense)
    assert own.figures()["training_flops"] == pytest.approx(spent, abs=1e-6)


def test_with_adamw_moments_of_dropped_weights_are_forgotten():
    training = Training(method(), torch.optim.AdamW, lr=1e-2, weight_decay=0.1).steps(9)
    for name, mask in training.masks().items():
        state = training.optimizer.state[training.model.get_parameter(name)]
        assert all(bool((state[key][~mask] == 0).all()) for key in ("exp_avg", "exp_avg_sq"))


def test_the_masks_given_are_not_changed():
    own = masks()
    before = {name: mask.clone() for name, mask in own.items()}
    Training(DynamicMasks(own, Exploration(2, 100))).steps(6)
    assert all(torch.equal(mask, before[name]) for name, mask in own.items())


def test_figures_say_what_was_explored_and_what_it_costs():
    macs = {"0.weight": 120, "2.weight": 320, "4.weight": 64}
    own = DynamicMasks(masks(0.3), Exploration(4, 100, fraction=0.5, decay="constant"), macs=macs)
    training = Training(own)
    at_first = own.figures()
    assert at_first["density"] == at_first["explored"] == pytest.approx(own.budget / 504, abs=1e-6)
    first = flops(macs, masks(0.3))
    ever = {name: mask.clone() for name, mask in training.masks().items()}
    for _ in range(10):
        training.step()
        ever = {name: mask | training.method.masks[name] for name, mask in ever.items()}
    found = own.figures()
    assert found["explored"] == pytest.approx(sum(int(m.sum()) for m in ever.values()) / 504, abs=1e-6)
    assert found["explored"] > found["density"] == at_first["density"]
    assert found["supported_flops"] == 1.0  # no channel was removed, whatever rows are empty
    # layers keep their numbers, so every step costs the same: 3 f_S, and 2 f_S + f_D at the two updates (RigL, appendix H)
    spent = (8 * 3 * first.theoretical + 2 * (2 * first.theoretical + first.dense)) / (10 * 3 * first.dense)
    assert found["training_flops"] == pytest.approx(spent, abs=1e-6)
    assert {"sparser_channels", "amenable_channels", "theoretical_flops"} <= found.keys()


def test_without_costs_there_are_no_figures_in_flops():
    training = Training(method()).steps(5)
    assert not any("flops" in name for name in training.method.figures())


def test_fewer_weights_than_layers_are_refused():
    with pytest.raises(ConfigError, match="0 weights for 1 layers"):
        DynamicMasks({"0.weight": torch.zeros(2, 2, dtype=torch.bool)}, Exploration(2, 10))
