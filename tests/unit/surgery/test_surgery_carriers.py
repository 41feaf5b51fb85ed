"""Constants that no bias can take up: one channel stays and carries those of all that go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_masks import cut, difference, ticket_of
from surgery_nets import masked, randomised, rows_masked
from torch import nn

from deploy_sparse.surgery import compact, load_compact
from deploy_sparse.surgery.parts import Carry, Stay

ROWS = (1, 2, 3)


def plain(reader=lambda: nn.Conv2d(4, 2, 3, padding=1)):
    """A live layer whose dead rows hold ``sigmoid(bias)``, and what reads them."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), reader()).double()


def emptied(factory, rows):
    """The dense network and the compact one, with rows of weights emptied and biases alive."""
    dense = randomised(factory())
    return dense, cut(ticket_of(dense, rows_masked(dense, rows)), factory)


def constants(layer):
    return torch.sigmoid(layer.bias.detach())


def largest(values, among):
    return max(among, key=lambda channel: abs(float(values[channel])))


def merged(weight, constant, gone, carrier):
    """The carrier's column of ``[rows, columns, …]`` with the columns that go in it, at the carrier's scale."""
    return weight[:, carrier] + sum(weight[:, c] * constant[c] / constant[carrier] for c in gone)


def test_one_channel_carries_the_constants_of_all_others_through_zero_padding():
    dense, result = emptied(plain, {"0.weight": ROWS})
    constant, weight = constants(dense[0]), dense[2].weight.detach()
    carrier = largest(constant, ROWS)
    gone = [c for c in ROWS if c != carrier]
    (group, _) = result.plan.groups
    assert group.kept == (0, carrier)
    assert group.stays == (Stay("carrier", (carrier,), "carries the constants of 2 others through layer '2'"),)
    assert result.plan.carries == (Carry("2.weight", carrier, 2),)
    assert result.plan.folds == ()
    assert f"0.weight: 1 of 4 channels stay (carrier): {group.stays[0].reason}" in result.plan.notes()
    made = result.module[2]
    assert torch.allclose(made.weight[:, 1], merged(weight, constant, gone, carrier), rtol=1e-14, atol=0)
    assert torch.equal(made.weight[:, 0], weight[:, 0])
    assert torch.equal(made.bias, dense[2].bias)


def test_zeros_and_columns_of_zeros_need_no_carrier():
    def factory():
        return nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 3, padding=1)).double()

    dense = randomised(factory())
    with torch.no_grad():
        dense[0].bias.copy_(torch.tensor([0.3, -0.2, 0.5, 0.4, 0.7], dtype=torch.float64))
        dense[2].weight[:, 3] = 0  # nobody reads channel 3
    result = cut(ticket_of(dense, rows_masked(dense, {"0.weight": [1, 2, 3, 4]})), factory)
    assert result.plan.groups[0].kept == (0, 4)  # channel 1 is zero behind the ReLU; 4 carries the 0.5 of channel 2
    assert result.plan.carries == (Carry("2.weight", 4, 1),)
    expected = dense[2].weight[:, 4] + dense[2].weight[:, 2] * (0.5 / 0.7)
    assert torch.allclose(result.module[2].weight[:, 1], expected, rtol=1e-14, atol=0)


def test_a_single_constant_carries_itself_and_is_called_a_leak():
    dense, result = emptied(plain, {"0.weight": [2]})
    (stay,) = result.plan.groups[0].stays
    value = float(constants(dense[0])[2])
    assert (stay.kind, stay.channels) == ("leak", (2,))
    assert stay.reason == f"constant {value:.3g} would leak through the zero padding of layer '2'"
    assert result.plan.carries == ()


class Readers(nn.Module):
    """Two readers that pad and one that does not."""

    def __init__(self):
        super().__init__()
        self.a, self.fold = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, bias=False)
        self.one, self.two = nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(4, 2, 5, padding=2, bias=False)
        self.double()

    def forward(self, x):
        x = torch.sigmoid(self.a(x))
        return self.one(x) + self.two(x) + self.fold(x)


def test_several_readers_share_one_carrier_and_biases_take_what_they_can():
    dense, result = emptied(Readers, {"a.weight": ROWS})
    constant = constants(dense.a)
    carrier = largest(constant, ROWS)
    gone = [c for c in ROWS if c != carrier]
    assert result.plan.groups[0].kept == (0, carrier)
    assert result.plan.carries == (Carry("one.weight", carrier, 2), Carry("two.weight", carrier, 2))
    for name in ("one", "two"):
        weight = dense.get_parameter(f"{name}.weight").detach()
        made = result.module.get_parameter(f"{name}.weight")
        assert torch.allclose(made[:, 1], merged(weight, constant, gone, carrier), rtol=1e-14, atol=0)
    (fold,) = result.plan.folds
    assert (fold.weight, fold.created, fold.channels) == ("fold.weight", True, 2)
    folded = dense.fold.weight.detach()[:, gone, 0, 0] @ constant[gone]
    assert torch.allclose(result.module.fold.bias, folded, rtol=1e-14, atol=0)


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(7, 2, 3, padding=1)
        self.double()

    def forward(self, x):
        return self.c(torch.cat([torch.sigmoid(self.a(x)), torch.sigmoid(self.b(x))], 1))


def test_one_carrier_serves_all_parts_of_a_concatenation():
    dense, result = emptied(Concatenated, {"a.weight": [1, 2], "b.weight": [0, 1]})
    constant = torch.cat([constants(dense.a), constants(dense.b)])
    carrier = largest(constant, (1, 2, 4, 5))
    first, second = (group.kept for group in result.plan.groups[:2])
    assert [*first, *(4 + channel for channel in second)] == sorted({0, 3, 6, carrier})
    assert result.plan.carries == (Carry("c.weight", carrier, 3),)


def test_a_channel_that_stays_with_its_constant_anyway_carries_the_others():
    """No further channel is kept for them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=1)
            self.d = nn.Conv2d(4, 2, 1)
            self.double()

        def forward(self, x):
            y = torch.sigmoid(self.a(x))
            return self.c(y) + self.d(y + self.b(x))

    dense = randomised(Net())
    masks = rows_masked(dense, {"a.weight": ROWS, "b.weight": [1, 2]})
    result = cut(ticket_of(dense, masks), Net)
    assert result.plan.groups[0].kept == (0, 3)  # channel 3 of the sum is alive, what c reads there is a constant
    assert result.plan.carries == (Carry("c.weight", 3, 2),)
    assert not any(stay.kind == "carrier" for stay in result.plan.groups[0].stays)


class Functional(nn.Module):
    """Parameters of its own: there is no layer whose bias could be made."""

    def __init__(self):
        super().__init__()
        self.a, self.kernel = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(3, 4, 1, 1))
        self.matrix = nn.Parameter(torch.ones(2, 3))
        self.double()

    def forward(self, x):
        y = torch.sigmoid(F.conv2d(torch.sigmoid(self.a(x)), self.kernel))
        return F.linear(y.mean((2, 3)), self.matrix)


def test_functional_layers_without_bias_use_carriers():
    _, result = emptied(Functional, {"a.weight": [1, 2], "kernel": [0, 2]})
    assert [len(group.kept) for group in result.plan.groups[:2]] == [3, 2]
    assert [(c.weight, c.channels) for c in result.plan.carries] == [("kernel", 1), ("matrix", 1)]
    assert result.plan.folds == ()
    _, alone = emptied(Functional, {"a.weight": [1]})
    assert "'kernel' has no layer that could take a bias" in alone.plan.groups[0].stays[0].reason


@pytest.mark.parametrize(
    "reader",
    [lambda: nn.ConvTranspose2d(4, 2, 2, 2), lambda: nn.ConvTranspose2d(4, 2, 3, padding=1, bias=False)],
    ids=["doubling", "same size"],
)
def test_transposed_convolutions_use_carriers(reader):
    dense, result = emptied(lambda: plain(reader), {"0.weight": ROWS})
    constant = constants(dense[0])
    carrier = largest(constant, ROWS)
    gone = [c for c in ROWS if c != carrier]
    assert result.plan.groups[0].kept == (0, carrier)
    assert result.plan.carries == (Carry("2.weight", carrier, 2),)
    rows = merged(dense[2].weight.detach().transpose(0, 1), constant, gone, carrier)
    assert torch.allclose(result.module[2].weight[1], rows, rtol=1e-14, atol=0)


def test_every_group_of_a_convolution_needs_its_own_carrier():
    def factory():
        layers = [nn.Conv2d(3, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.Sigmoid()]
        return nn.Sequential(*layers, nn.Conv2d(4, 2, 1)).double()

    dense = randomised(factory())
    with torch.no_grad():
        dense[0].bias.copy_(torch.tensor([0.1, 0.2, 0.9, 0.1, 0.3, 0.8]))
    result = cut(ticket_of(dense, rows_masked(dense, {"0.weight": [1, 2, 4, 5]})), factory)
    assert result.plan.cuts[0].kept == (0, 2, 3, 5)  # the first position of both groups lives, the last one carries
    assert result.plan.carries == (Carry("2.weight", 2, 1), Carry("2.weight", 5, 1))
    assert (result.module[2].groups, result.module[2].in_channels) == (2, 4)


def test_a_weight_used_twice_carries_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
            self.double()

        def forward(self, x):
            return self.c(torch.sigmoid(self.b(torch.sigmoid(self.b(torch.sigmoid(self.a(x)))))))

    _, result = emptied(Net, {"a.weight": ROWS, "b.weight": ROWS})
    assert result.plan.groups[0].kept == (0, 1, 2, 3)
    assert result.plan.carries == ()
    assert "would leak through the zero padding of layer 'b'" in result.plan.groups[0].stays[0].reason


def test_carried_weights_in_single_precision_are_rounded_once_and_told():
    def factory():
        return plain().float()

    dense = randomised(factory())
    made = ticket_of(dense, rows_masked(dense, {"0.weight": ROWS}))
    result = compact(made, factory)
    constant = constants(dense[0].double())
    carrier = largest(constant, ROWS)
    exact = merged(dense[2].weight.detach().double(), constant, [c for c in ROWS if c != carrier], carrier)
    assert torch.equal(result.module[2].weight[:, 1], exact.float())
    assert result.parity.float64.max_rel < 1e-14
    assert result.parity.rounding is not None
    assert difference(masked(factory, made), result.module) < 1e-6


def test_a_saved_network_with_carriers_comes_back(tmp_path):
    _, result = emptied(Readers, {"a.weight": ROWS})
    loaded = load_compact(result.save(tmp_path / "small"), Readers)
    assert difference(result.module, loaded) == 0.0
