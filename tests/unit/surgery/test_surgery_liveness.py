"""Which channels go, judged from weights and constants on networks small enough to reckon by hand."""

from __future__ import annotations

import pytest
import torch
from surgery_nets import masked, outputs, randomised, rows_masked, ticket
from torch import nn

from deploy_sparse.surgery import compact

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def conv(c_in, c_out, kernel=1, **options):
    return nn.Conv2d(c_in, c_out, kernel, **options)


def cut(factory, rows, **options):
    """The compact network of ``factory`` (in float64) with rows of weights masked, checked against the masked one."""

    def double():
        return factory().double()

    made = ticket(randomised(double()), rows_masked(double(), rows))
    result = compact(made, double, X, **options)
    reference, output = outputs(masked(double, made), X), outputs(result.module, X)
    assert torch.allclose(output, reference, rtol=0, atol=1e-12 * float(reference.abs().max()))
    return result, {group.name: group for group in result.plan.groups}


def test_dead_row_without_bias_goes_and_costs_nothing():
    result, groups = cut(
        lambda: nn.Sequential(conv(3, 4, bias=False), nn.ReLU(), conv(4, 2, 3, padding=1)), {"0.weight": [1]}
    )
    assert groups["0.weight"].kept == (0, 2, 3)
    assert result.plan.folds == ()
    assert result.module[0].weight.shape == (3, 3, 1, 1)
    assert (result.module[0].out_channels, result.module[2].in_channels) == (3, 3)


def test_constant_behind_a_live_norm_leaks_through_zero_padding_and_stays():
    def factory():
        return nn.Sequential(conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.Sigmoid(), conv(4, 2, 3, padding=1))

    result, groups = cut(factory, {"0.weight": [1]})
    assert groups["0.weight"].kept == (0, 1, 2, 3)
    (stay,) = groups["0.weight"].stays
    bn = randomised(factory().double())[1]
    with torch.no_grad():
        shift = bn.bias[1] - bn.weight[1] * bn.running_mean[1] / (bn.running_var[1] + bn.eps).sqrt()
        constant = float(torch.sigmoid(shift))
    assert (stay.kind, stay.channels) == ("leak", (1,))
    assert stay.reason == f"constant {constant:.3g} would leak through the zero padding of layer '3'"
    assert any("would leak through the zero padding" in note for note in result.plan.notes())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_consumer_without_padding_takes_the_constant_into_its_bias(kernel, bias):
    result, groups = cut(
        lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Sigmoid(), conv(4, 2, kernel, bias=bias)),
        {"0.weight": [1, 3]},
    )
    assert groups["0.weight"].kept == (0, 2)
    (fold,) = result.plan.folds
    assert (fold.weight, fold.bias, fold.created, fold.channels) == ("3.weight", "3.bias", not bias, 2)
    assert result.module[3].bias is not None


def test_linear_takes_constants_of_a_flattened_map():
    result, groups = cut(
        lambda: nn.Sequential(
            conv(3, 4), nn.BatchNorm2d(4), nn.Sigmoid(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 5, bias=False),
            nn.ReLU(), nn.Linear(5, 2),
        ),
        {"0.weight": [0], "5.weight": [2]},
    )  # fmt: skip
    assert groups["0.weight"].kept == (1, 2, 3)
    assert result.module[5].in_features == 12
    assert groups["5.weight"].kept == (0, 1, 3, 4)
    assert result.module[5].bias.shape == (4,)


def test_constant_of_a_dead_row_travels_through_a_second_layer():
    """A row that reads only constants is constant itself, and folds further."""

    def factory():
        return nn.Sequential(conv(3, 2), nn.Sigmoid(), conv(2, 3), nn.Sigmoid(), conv(3, 2)).double()

    dense = randomised(factory())
    masks = rows_masked(dense, {"0.weight": [0]})
    masks["2.weight"] = torch.ones_like(dense[2].weight, dtype=torch.bool)
    masks["2.weight"][1, 1] = False  # row 1 of layer 2 reads only the dead channel 0
    result = compact(ticket(dense, masks), factory, X)
    groups = {group.name: group for group in result.plan.groups}
    assert groups["0.weight"].kept == (1,)
    assert groups["2.weight"].kept == (0, 2)
    assert [f.weight for f in result.plan.folds] == ["2.weight", "4.weight"]


def test_norm_with_scale_zero_silences_a_live_row():
    def factory():
        return nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2, 3, padding=1)).double()

    dense = randomised(factory())
    keep = torch.tensor([True, False, True, True])
    result = compact(ticket(dense, {"1.weight": keep, "1.bias": keep}), factory, X)
    assert result.plan.groups[0].kept == (0, 2, 3)


def test_zero_times_a_live_gate_is_zero():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate, self.c = conv(3, 4, bias=False), conv(3, 4), conv(4, 2, 3, padding=1)

        def forward(self, x):
            return self.c(self.a(x) * torch.sigmoid(self.gate(x)))

    _, groups = cut(Gated, {"a.weight": [1]})
    assert groups["a.weight"].kept == (0, 2, 3)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4, bias=False), conv(3, 4, bias=False), conv(4, 2, 3, padding=1)

    def forward(self, x):
        return self.c(torch.relu(self.a(x)) + self.b(x))


def test_stream_channel_goes_only_when_every_producer_lets_it_go():
    result, groups = cut(Residual, {"a.weight": [0, 1], "b.weight": [1, 2]})
    assert groups["a.weight"].kept == (0, 2, 3)
    assert {(c.name, c.dim): c.kept for c in result.plan.cuts} == {
        (name, dim): (0, 2, 3) for name, dim in (("a.weight", 0), ("b.weight", 0), ("c.weight", 1))
    }


def test_ignored_columns_free_a_live_channel():
    def factory():
        return nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2, 3, padding=1)).double()

    dense = randomised(factory())
    masks = {"2.weight": torch.ones_like(dense[2].weight, dtype=torch.bool)}
    masks["2.weight"][:, 2] = False
    result = compact(ticket(dense, masks), factory, X)
    assert result.plan.groups[0].kept == (0, 1, 3)


@pytest.mark.parametrize(
    ("pool", "goes"),
    [
        (nn.AvgPool2d(3, 1, padding=1), False),
        (nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), True),
        (nn.MaxPool2d(3, 1, padding=1), True),
        (nn.ZeroPad2d(1), False),
        (nn.ReflectionPad2d(1), True),
    ],
)
def test_a_constant_survives_a_pool_only_where_no_zeros_come_in(pool, goes):
    _, groups = cut(lambda: nn.Sequential(conv(3, 4), nn.Sigmoid(), pool, conv(4, 2)), {"0.weight": [1]})
    assert groups["0.weight"].kept == ((0, 2, 3) if goes else (0, 1, 2, 3))


def test_constant_that_differs_from_place_to_place_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = conv(3, 2), conv(2, 2), nn.Linear(2 * 8 * 16, 2)

        def forward(self, x):
            x = self.a(x)
            return self.fc(self.b(torch.cat([torch.sigmoid(x), torch.tanh(x)], 3)).flatten(1))

    _, groups = cut(Net, {"a.weight": [0]})
    assert groups["a.weight"].stays[0].reason == "its constant changes from place to place before layer 'b'"


def test_depthwise_passes_constants_on():
    def factory():
        return nn.Sequential(conv(3, 4), nn.Sigmoid(), conv(4, 8, 3, groups=4), nn.ReLU(), conv(8, 2))

    result, groups = cut(factory, {"0.weight": [1]})
    assert groups["0.weight"].kept == (0, 2, 3)
    assert (result.module[2].groups, result.module[2].in_channels, result.module[2].out_channels) == (3, 3, 6)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {}])
def test_norms_without_affine_or_statistics(options):
    result, _ = cut(
        lambda: nn.Sequential(conv(3, 4, bias=False), nn.BatchNorm2d(4, **options), nn.ReLU(), conv(4, 2)),
        {"0.weight": [3]},
    )
    assert result.module[0].out_channels == 3
    assert result.module[1].num_features == 3


def test_constants_are_not_folded_into_a_layer_used_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 4), conv(4, 4)
            self.c = conv(4, 2)

        def forward(self, x):
            return self.c(self.b(torch.sigmoid(self.b(torch.sigmoid(self.a(x))))))

    _, groups = cut(Net, {"a.weight": [1], "b.weight": [1]})
    assert groups["a.weight"].kept == (0, 1, 2, 3)
    assert "cannot be folded into layer 'b': 'b.weight' is used several times" in groups["a.weight"].stays[0].reason


def test_functional_layer_without_bias_keeps_the_channel_and_says_so():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.kernel = conv(3, 4), nn.Parameter(torch.zeros(2, 4, 1, 1))

        def forward(self, x):
            return torch.nn.functional.conv2d(torch.sigmoid(self.a(x)), self.kernel)

    _, groups = cut(Net, {"a.weight": [1]})
    assert groups["a.weight"].kept == (0, 1, 2, 3)
    assert "'kernel' has no layer that could take a bias" in groups["a.weight"].stays[0].reason


def test_width_is_rounded_up_with_dead_channels_and_never_above_the_dense_one():

    def factory():
        return nn.Sequential(conv(3, 10, bias=False), nn.ReLU(), conv(10, 6, bias=False), nn.ReLU(), conv(6, 2))

    result, groups = cut(factory, {"0.weight": [0, 1, 2, 3, 4], "2.weight": [5]}, multiple=4)
    assert groups["0.weight"].kept == (0, 1, 2, 5, 6, 7, 8, 9)
    assert [(s.kind, s.channels) for s in groups["0.weight"].stays] == [("aligned", (0, 1, 2))]
    assert groups["2.weight"].kept == (0, 1, 2, 3, 4, 5)
    assert result.plan.multiple == 4


def test_all_dead_group_keeps_one_channel():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3, 4, bias=False), conv(4, 3, 3, padding=1), conv(3, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x))) + self.c(x)

    dense = randomised(Net().double())
    masks = {"b.weight": torch.zeros_like(dense.b.weight, dtype=torch.bool)}
    masks["b.weight"][0, 0, 1, 1] = True  # the only weight left reads channel 0 …
    dense.a.weight.data[0] = 0  # … which is zero by itself
    result = compact(ticket(dense, masks), lambda: Net().double(), X)
    group = result.plan.groups[0]
    assert (group.name, group.kept) == ("a.weight", (0,))
    assert group.stays[0].kind == "last"
    assert "every channel is dead" in group.stays[0].reason


def test_unknown_operation_is_named_left_alone_and_the_rest_is_compacted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 4, bias=False), conv(4, 4, bias=False)
            self.c = conv(4, 2)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)).cummax(1)[0])))

    result, groups = cut(Net, {"a.weight": [0, 3], "b.weight": [1, 2]})
    assert groups["a.weight"].kept == (0, 1, 2, 3)
    assert groups["b.weight"].kept == (0, 3)
    assert result.plan.unknown == ("unknown operation aten.cummax.default in the network itself",)
    assert groups["a.weight"].stays[0].kind == "pinned"
    assert any("aten.cummax" in note for note in result.plan.notes())


def test_size_written_into_a_view_is_found_out_and_pinned():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = conv(3, 4, bias=False), conv(3, 4, bias=False), nn.Linear(8, 2)

        def forward(self, x):
            left = torch.relu(self.a(x)).mean((2, 3)).view(-1, 4)
            return self.fc(torch.cat([left, torch.relu(self.b(x)).mean((2, 3)).view(x.size(0), -1)], 1))

    _, groups = cut(Net, {"a.weight": [0], "b.weight": [1, 2]})
    assert groups["a.weight"].kept == (0, 1, 2, 3)
    (stay,) = groups["a.weight"].stays
    assert (stay.kind, stay.channels) == ("size", (0,))
    assert stay.reason == "the size is stated by aten.view.default in the network itself"
    assert groups["b.weight"].kept == (0, 3)
