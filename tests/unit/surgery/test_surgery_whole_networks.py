"""Small networks that do what real ones do around their layers: compile, containers, hooks, buffers, casts, ties."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_networks import conv, exactly_cut, kept, linear, net, noise, reasons, ticket_without
from surgery_nets import masked, outputs
from torch import nn

from deploy_sparse.errors import SurgeryError, TicketError
from deploy_sparse.surgery import compact, load_compact

DEAD, ALIVE = {"a.weight": [1, 4]}, (0, 2, 3, 5)


SILENT = {**DEAD, "a.bias": [1, 4]}


MAPS = {"a": conv(3, 6), "c": conv(6, 4)}


X, SEQUENCE = noise(2, 3, 8, 8), noise(2, 7, 5)


@pytest.mark.parametrize("which", ["b", ""])
def test_modules_compiled_in_place_run_with_the_compact_weights(which):
    def factory():
        parts = {"b": lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), **MAPS}
        made = net(lambda self, x: self.c(self.b(torch.relu(self.a(x)))), **parts)()
        made.get_submodule(which).compile(backend="eager")
        return made

    result = exactly_cut(factory, {**DEAD, "b.0.weight": [0]}, X)
    assert kept(result, "a.weight") == ALIVE
    assert kept(result, "b.0.weight") == (1, 2, 3, 4, 5)


@dataclass
class Found:
    logits: torch.Tensor
    features: torch.Tensor


def features(self, x):
    y = torch.relu(self.a(x))
    return self.c(y), Found(y, 2 * y)


CONTAINERS = {
    "dataclass": lambda self, x: Found(self.c(torch.relu(self.a(x))), self.c(2 * torch.relu(self.a(x)))),
    "namespace": lambda self, x: SimpleNamespace(y=self.c(torch.relu(self.a(x)))),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_outputs_in_containers_are_outputs(container):
    result = exactly_cut(net(CONTAINERS[container], **MAPS), SILENT, X)
    assert kept(result, "a.weight") == ALIVE


def test_features_in_a_container_keep_their_channels():
    result = exactly_cut(net(features, **MAPS), SILENT, X)
    assert result.plan.cuts == ()
    assert any(stay.reason == "network output" for group in result.plan.groups for stay in group.stays)


def test_a_network_without_tensors_in_its_output_is_refused_by_name():
    factory = net(lambda self, x: str(self.c(self.a(x)).shape), **MAPS)
    with pytest.raises(SurgeryError, match="returns str, in which no tensor can be found"):
        compact(ticket_without(factory(), DEAD), factory, X)


def score(self, x):
    return self.a(torch.relu(self.b(x)))


def filled(self, x):
    return x.new_zeros(x.shape[0], 4).fill_(score(self, x)[0, 0, 0, 0]) + self.c(self.e.weight)[0, 0]


INDICES = {
    "embedding": (lambda self, x: self.c(self.e((score(self, x)[:, 0] > 0).long())), "positions in a table"),
    "table": (
        lambda self, x: self.c(self.e.weight[(score(self, x)[:, 0] > 0).long()]),
        "positions in aten.index.Tensor",
    ),
    "fill": (filled, "fills tensors"),
}


@pytest.mark.parametrize("how", INDICES)
@pytest.mark.parametrize("rows", [{}, {"b.weight": [1], "b.bias": [1]}])
def test_channels_used_as_indices_stay(how, rows):
    forward, said = INDICES[how]
    parts = {"b": conv(3, 5), "a": conv(5, 6), "c": linear(5, 4), "e": lambda: nn.Embedding(2, 5)}
    result = exactly_cut(net(forward, **parts), rows, X)
    assert kept(result, "a.weight") == (0,)
    assert kept(result, "b.weight") == ((0, 2, 3, 4) if rows else ())
    assert "pinned [0]" in reasons(result)
    assert said in reasons(result)


def test_rows_that_stay_without_need_keep_the_constants_they_read():
    def once(self, x):
        return self.c(torch.sigmoid(self.m(torch.sigmoid(self.a(x)))))

    parts = {"a": conv(3, 4), "m": conv(4, 4), "c": conv(4, 4)}
    factory = net(lambda self, x: once(self, x) + once(self, 2 * x), **parts)
    result = exactly_cut(factory, {"a.weight": [0, 1], "m.weight": (1, [2, 3])}, X)
    assert kept(result, "a.weight") == (0, 1)
    assert "cannot be folded into layer 'm': 'm.weight' is used several times" in reasons(result)


def multiplied(left, right):
    found = torch.zeros_like(left)
    torch.mul(left, right, out=found)
    return found


@pytest.mark.parametrize("join", [torch.max, torch.min, multiplied])
def test_constants_pass_operations_on_two_tensors(join):
    def forward(self, x):
        return self.c(join(torch.sigmoid(self.a(x)), torch.sigmoid(self.b(x))))

    result = exactly_cut(net(forward, b=conv(3, 6), **MAPS), {**DEAD, "b.weight": [1, 4]}, X)
    assert kept(result, "a.weight") == kept(result, "b.weight") == ALIVE
    assert reasons(result) == ""


@pytest.mark.parametrize("cast", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constants_are_not_folded_through_a_rounding_cast(cast, dtype):
    factory = net(lambda self, x: self.c(torch.sigmoid(self.a(x)).to(cast).to(x.dtype)), **MAPS)
    limit = 1e-12 if dtype is torch.float64 else 1e-5
    result = exactly_cut(lambda: factory().to(dtype), DEAD, X.to(dtype), limit=limit)
    rounds = cast is not dtype
    assert kept(result, "a.weight") == (() if rounds else ALIVE)
    assert ("leak [1, 4]" in reasons(result)) is rounds
    assert ("aten.to.dtype" in reasons(result)) is rounds


def test_a_cast_that_changes_nothing_in_single_precision_is_no_obstacle():
    factory = net(lambda self, x: self.c(torch.relu(self.a(x)).float()), **MAPS)
    result = exactly_cut(lambda: factory().float(), SILENT, X.float(), limit=1e-5)
    assert kept(result, "a.weight") == ALIVE


def largest(self, x):
    return self.c(F.max_pool2d(torch.sigmoid(self.a(x)), 2, return_indices=True)[0])


def unpooled(self, x):
    return self.c(F.max_unpool2d(*F.max_pool2d(torch.sigmoid(self.a(x)), 2, return_indices=True), 2))


POOLS = {
    "adaptive": (lambda self, x: self.c(F.adaptive_max_pool2d(torch.sigmoid(self.a(x)), 1)), ALIVE),
    "with indices": (largest, ALIVE),
    "unpooled": (unpooled, ()),
}


@pytest.mark.parametrize("pool", POOLS)
def test_indices_of_pooling_have_the_channels_of_its_values(pool):
    forward, alive = POOLS[pool]
    result = exactly_cut(net(forward, **MAPS), DEAD, X, [noise(2, 3, 12, 10)])
    assert kept(result, "a.weight") == alive
    unknown = () if alive else ("unknown operation aten.max_unpool2d.default in the network itself",)
    assert result.plan.unknown == unknown


def computed_by_a_hook():
    made = net(lambda self, x: self.c(torch.relu(self.a(x))) * self.scale, **MAPS)()
    made.scale = 1.0
    made.register_load_state_dict_post_hook(lambda m, _: setattr(m, "scale", float(m.a.weight.detach().abs().mean())))
    return made


def viewed():
    made = net(lambda self, x: self.c(torch.relu(self.a(x))) + self.first.sum(), **MAPS)()
    made.first = made.a.bias.data[:1]
    return made


@pytest.mark.parametrize("factory", [computed_by_a_hook, viewed])
def test_what_follows_from_loaded_weights_is_that_of_the_ticket(factory):
    assert kept(exactly_cut(factory, SILENT, X), "a.weight") == ALIVE


@pytest.mark.parametrize(("act", "tiny"), [(F.silu, -80.0), (F.gelu, -7.0), (F.softplus, -20.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiny_constants_carry_no_large_ones(act, tiny, dtype):
    def padded():
        return nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        y = act(self.a(x))
        return self.c(y) + self.d(y)

    float64 = net(forward, a=conv(3, 8), c=padded, d=padded)
    made = ticket_without(float64().to(dtype), {"a.weight": [1, 2, 3], "d.weight": (1, [2, 3])})
    made.weights["a.bias"][1:4] = torch.tensor([tiny, 0.5, 0.7])
    result = exactly_cut(lambda: float64().to(dtype), {}, X.to(dtype), made=made, limit=1e-5)
    assert kept(result, "a.weight") == (0, 1, 3, 4, 5, 6, 7)
    assert "carrier [3]" in reasons(result)
    assert float(result.module.c.weight.detach().abs().max()) < 10 * float(made.weights["c.weight"].abs().max())


def test_hooks_of_replaced_norms_are_called_still():
    calls = []

    def factory():
        parts = {"a": linear(5, 6), "n": lambda: nn.LayerNorm(6), "c": linear(6, 4)}
        made = net(lambda self, x: self.c(self.n(torch.sigmoid(self.a(x)))), **parts)()
        made.n.register_forward_hook(lambda module, inputs, found: calls.append(module))
        return made

    result = exactly_cut(factory, {"a.weight": [1], "c.weight": (1, [1])}, SEQUENCE)
    assert kept(result, "n.weight") == (0, 2, 3, 4, 5)
    calls.clear()
    outputs(result.module, SEQUENCE)
    assert calls == [result.module.n]


def tied():
    parts = {"e": lambda: nn.Embedding(9, 6), "h": lambda: nn.Linear(6, 9, bias=False)}
    made = net(lambda self, i: self.h(torch.relu(self.e(i))), **parts)()
    made.h.weight = made.e.weight
    return made


@pytest.mark.parametrize("name", ["e.weight", "h.weight"])
def test_copies_of_a_tied_weight_are_masked_by_the_mask_of_one_name(name):
    ids, made = torch.arange(14).reshape(2, 7) % 9, ticket_without(tied(), {name: (1, [1, 4])})
    assert made.weights["e.weight"].data_ptr() != made.weights["h.weight"].data_ptr()
    dense = tied()
    dense.load_state_dict(made.weights)
    with torch.no_grad():
        dense.e.weight.mul_(made.masks[name])
    result = compact(made, tied, ids)
    assert result.module.e.weight is result.module.h.weight
    assert result.module.e.weight.shape == (9, 4)
    assert torch.allclose(outputs(result.module, ids), outputs(dense, ids), atol=1e-12)


def test_tied_names_with_different_weights_are_refused_by_both_names():
    made = ticket_without(tied(), {})
    made.weights["h.weight"].add_(1)
    with pytest.raises(TicketError, match=r"'h\.weight' and 'e\.weight' differ in the ticket"):
        compact(made, tied, torch.zeros(2, 7, dtype=torch.long))


def pooled_dead(self, x):
    y = torch.sigmoid(self.a(x))
    self.d(y.mean((2, 3)))
    return self.c(y)


def mapped_dead(self, x):
    y = torch.sigmoid(self.a(x))
    self.d(y)
    return self.c(y)


def live_in_dead(self, x):
    y = torch.sigmoid(self.a(x))
    self.c(torch.sigmoid(self.d(y)))
    return self.c(y)


DEAD_CODE = {
    "linear": (pooled_dead, linear(6, 10)),
    "gru": (pooled_dead, lambda: nn.GRU(6, 5)),
    "transposed": (mapped_dead, lambda: nn.ConvTranspose2d(6, 3, 2)),
    "norm": (mapped_dead, lambda: nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))),
    "a live layer too": (live_in_dead, conv(6, 6)),
}


@pytest.mark.parametrize("what", DEAD_CODE)
def test_code_whose_result_goes_nowhere_is_run_and_named(what):
    forward, part = DEAD_CODE[what]
    result = exactly_cut(net(forward, d=part, **MAPS), DEAD, X, [noise(2, 3, 12, 9)])
    assert outputs(result.module, X).shape == (2, 4, 8, 8)
    assert kept(result, "a.weight") == ()
    assert "in layer 'd" in reasons(result)


@pytest.mark.parametrize("real", [False, True])
def test_parameters_in_lists_and_dictionaries_are_loaded_too(real, tmp_path):
    def factory():
        made = net(lambda self, x: F.conv2d(torch.relu(F.conv2d(x, *self.pair)), self.table["w"]), **MAPS)()
        made.pair, made.table = [made.a.weight, made.a.bias], {"w": made.c.weight}
        return made.double() if real else made

    result = exactly_cut(factory, SILENT, X)
    assert kept(result, "a.weight") == ALIVE
    result.save(tmp_path / "small", program=False)
    loaded = load_compact(tmp_path / "small", factory)
    assert torch.equal(outputs(loaded, X), outputs(result.module, X))
    assert loaded.pair[0] is loaded.a.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_that_are_plain_attributes_take_part(dtype):
    def factory():
        parts = {"a": linear(4, 6), "c": linear(6, 4)}
        made = net(lambda self, x: self.c(torch.sigmoid(self.a(x @ self.bank))), **parts)().to(dtype)
        made.bank = torch.linspace(-1, 1, 20, dtype=dtype).reshape(5, 4)
        return made

    result = exactly_cut(factory, DEAD, SEQUENCE.to(dtype), limit=1e-5)
    assert kept(result, "a.weight") == ALIVE


def one_number(self, x):
    y = torch.sigmoid(self.a(x))
    self.seen.copy_(y.abs().mean())
    return self.c(y)


def one_each(self, x):
    y = torch.sigmoid(self.a(x))
    self.seen.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
    return self.c(y)


@pytest.mark.parametrize(("forward", "shape"), [(one_number, ()), (one_each, (6,))])
def test_buffers_that_forward_writes_are_outputs(forward, shape):
    def factory():
        made = net(forward, **MAPS)()
        made.register_buffer("seen", torch.zeros(shape, dtype=torch.float64))
        return made

    made = ticket_without(factory(), DEAD)
    result = compact(made, factory, X)
    assert result.plan.cuts == ()
    assert [stay.kind for group in result.plan.groups for stay in group.stays]
    dense = masked(factory, made)
    assert torch.equal(outputs(result.module, X), outputs(dense, X))
    assert torch.allclose(result.module.seen, dense.seen, atol=1e-12)
    assert not torch.equal(result.module.seen, made.weights["seen"])


@pytest.mark.parametrize("how", ["union", "spread"])
def test_a_bias_that_folding_creates_follows_the_spread_rows(how):
    def forward(self, x):
        return self.c(torch.relu(self.a(x) + self.b(torch.sigmoid(self.h(x)))))

    parts = {"h": conv(3, 6), "b": lambda: nn.Conv2d(6, 6, 1, bias=False), **MAPS}
    rows = {"h.weight": [1, 2], "b.weight": [0, 1, 2, 3]}
    result = exactly_cut(net(forward, **parts), rows, X, [noise(1, 3, 9, 9)], shortcuts=how)
    assert kept(result, "h.weight") == (0, 3, 4, 5)
    assert [(fold.bias, fold.created) for fold in result.plan.folds] == [("b.bias", True)]
    assert len(result.module.b.bias) == result.module.b.weight.shape[0] == (6 if how == "union" else 3)


@pytest.mark.parametrize("columns", [(), (0, 2)])
def test_a_head_of_zeros_counts_but_for_what_its_mask_hides(columns):
    factory = net(lambda self, x: self.c(torch.relu(self.b(torch.relu(self.a(x))))), b=conv(6, 6), **MAPS)
    made = ticket_without(factory(), {"c.weight": (1, columns)} if columns else {"a.weight": [5], "a.bias": [5]})
    made.weights["c.weight"].zero_()
    result = exactly_cut(factory, {}, X, made=made)
    assert kept(result, "b.weight") == ((1, 3, 4, 5) if columns else ())
    assert kept(result, "a.weight") == (() if columns else (0, 1, 2, 3, 4))


@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_two_layers_of_one_weight_masked_once_are_both_masked(name):
    def factory():
        made = net(
            lambda self, x: self.c(torch.relu(self.b(torch.relu(self.a(x))))), a=conv(3, 3), b=conv(3, 3), c=conv(3, 4)
        )()
        made.b.weight = made.a.weight
        return made

    made = ticket_without(factory(), {name: [1], "a.bias": [1], "b.bias": [1]})
    dense = factory()
    shared = made.masked_weights()[name]
    dense.load_state_dict({**made.masked_weights(), "a.weight": shared, "b.weight": shared})
    result = compact(made, factory, X)
    assert torch.allclose(outputs(result.module, X), outputs(dense, X), atol=1e-12)
    assert result.plan.cuts == ()
    assert "'a.weight' is used in several places" in reasons(result)
