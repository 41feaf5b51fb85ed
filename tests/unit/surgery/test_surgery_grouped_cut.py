"""Grouped, depthwise and transposed convolutions: whole groups go, or the same positions of every group."""

from __future__ import annotations

import pytest
import torch
from random_masks import X, cut, ticket_of
from surgery_nets import masked, outputs, randomised, rows_masked
from torch import nn

from deploy_sparse.surgery import load_compact


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, **options, bias=False)


def grouped(mid=lambda: conv(8, 12, kernel_size=3, padding=1, groups=4)):
    """8 channels in 4 groups of 2, written to 12 channels in 4 groups of 3; nothing is added anywhere."""
    return nn.Sequential(conv(3, 8, kernel_size=1), nn.ReLU(), mid(), nn.ReLU(), nn.Conv2d(12, 2, 1)).double()


def emptied(rows, factory=grouped):
    dense = randomised(factory())
    return dense, cut(ticket_of(dense, rows_masked(dense, rows)), factory)


def sizes(layer):
    return layer.groups, layer.in_channels, layer.out_channels, tuple(layer.weight.shape[:2])


def kept(result):
    return {(c.name, c.dim): c.kept for c in result.plan.cuts}


def test_a_group_without_outputs_goes_with_its_inputs():
    dense, result = emptied({"2.weight": [3, 4, 5]})
    assert sizes(result.module[2]) == (3, 6, 9, (9, 2))
    assert kept(result) == {
        ("0.weight", 0): (0, 1, 4, 5, 6, 7),
        ("2.weight", 0): (0, 1, 2, 6, 7, 8, 9, 10, 11),
        ("4.weight", 1): (0, 1, 2, 6, 7, 8, 9, 10, 11),
    }
    assert [(a.module, a.name, a.dense, a.compact) for a in result.plan.shape.attributes] == [("2", "groups", 4, 3)]
    assert torch.equal(result.module[2].weight[3:6], dense[2].weight[6:9])


def test_a_group_without_inputs_goes_with_its_outputs():
    _, result = emptied({"0.weight": [0, 1, 6, 7]})
    assert sizes(result.module[2]) == (2, 4, 6, (6, 2))


def test_the_same_position_of_every_group_goes():
    dense, result = emptied({"0.weight": [1, 3, 5, 7], "2.weight": [0, 3, 6, 9]})
    assert sizes(result.module[2]) == (4, 4, 8, (8, 1))
    assert kept(result)["2.weight", 1] == (0,)
    assert result.plan.shape.attributes == ()
    assert torch.equal(result.module[2].weight[0], dense[2].weight[1, :1])


def test_groups_and_positions_go_together():
    _, result = emptied({"0.weight": [0, 1, 2, 4, 6], "2.weight": [0, 1, 2, 5, 8, 11]})
    assert sizes(result.module[2]) == (3, 3, 6, (6, 1))


def test_other_positions_in_every_group_stay_and_say_so():
    _, result = emptied({"0.weight": [0, 2, 4, 7]})
    assert sizes(result.module[2]) == (4, 8, 12, (12, 2))
    (stay,) = result.plan.groups[0].stays
    assert (stay.kind, stay.channels) == ("product", (0, 2, 4, 7))
    assert stay.reason == "others at the same position of the split axis stay"


def test_the_outputs_of_a_group_that_reads_constants_only_are_folded_further():
    """All inputs of the group are dead but hold constants: so do its outputs, and the last bias takes them up."""

    def factory():
        layers = [nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1, groups=2), nn.Sigmoid(), nn.Conv2d(4, 2, 1)]
        return nn.Sequential(*layers).double()

    dense, result = emptied({"0.weight": [2, 3]}, factory)
    assert sizes(result.module[2]) == (1, 2, 2, (2, 2))
    assert torch.equal(result.module[2].bias, dense[2].bias[:2])
    assert [f.channels for f in result.plan.folds if f.bias == "4.bias"] == [2]
    hidden = torch.sigmoid(dense[2].weight[2:, :, 0, 0] @ torch.sigmoid(dense[0].bias[2:]) + dense[2].bias[2:])
    assert torch.allclose(result.module[4].bias, dense[4].bias + dense[4].weight[:, 2:, 0, 0] @ hidden)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_filters_go_with_their_channel(multiplier):
    def factory():
        mid = conv(4, 4 * multiplier, kernel_size=3, padding=1, groups=4)
        return nn.Sequential(conv(3, 4, kernel_size=1), mid, nn.ReLU(), nn.Conv2d(4 * multiplier, 2, 1)).double()

    _, result = emptied({"0.weight": [1, 2]}, factory)
    assert sizes(result.module[1]) == (2, 2, 2 * multiplier, (2 * multiplier, 1))
    assert sizes(result.module[3])[1] == 2 * multiplier


def test_one_of_two_depthwise_filters_of_a_channel_cannot_go_alone():
    def factory():
        mid = conv(4, 8, kernel_size=3, padding=1, groups=4)
        return nn.Sequential(conv(3, 4, kernel_size=1), mid, nn.ReLU(), nn.Conv2d(8, 2, 1)).double()

    _, result = emptied({"1.weight": [0, 2, 4, 6]}, factory)
    assert sizes(result.module[1]) == (4, 4, 8, (8, 1))
    _, both = emptied({"1.weight": [0, 1, 4, 5]}, factory)
    assert sizes(both.module[1]) == (2, 2, 4, (4, 1))
    assert both.module[0].out_channels == 2


@pytest.mark.parametrize("options", [{"kernel_size": 2, "stride": 2}, {"kernel_size": 3, "padding": 1}])
def test_transposed_convolutions_lose_rows_and_columns_along_their_own_axes(options):
    def factory():
        layers = [nn.ConvTranspose2d(3, 6, **options, bias=False), nn.ReLU(), nn.ConvTranspose2d(6, 4, **options)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(4, 2, 1)).double()

    dense = randomised(factory())
    masks = {name: torch.ones_like(dense.get_parameter(name), dtype=torch.bool) for name in ("0.weight", "2.weight")}
    masks["0.weight"][:, [1, 4]] = masks["2.weight"][:, [0]] = False
    masks["2.bias"] = torch.tensor([False, True, True, True])
    result = cut(ticket_of(dense, masks), factory)
    assert tuple(result.module[0].weight.shape[:2]) == (3, 4)
    assert tuple(result.module[2].weight.shape[:2]) == (4, 3)
    assert (result.module[0].out_channels, result.module[2].in_channels, result.module[2].out_channels) == (4, 4, 3)
    assert result.plan.carries == result.plan.folds == ()


def test_a_grouped_transposed_convolution_loses_positions_and_groups():
    def factory():
        return grouped(lambda: nn.ConvTranspose2d(8, 12, 3, padding=1, groups=4, bias=False))

    dense = randomised(factory())
    mask = torch.ones_like(dense[2].weight, dtype=torch.bool)  # [groups · inputs, outputs of one group, …]
    mask[:, 1] = False  # position 1 of the outputs of every group
    mask[4:6] = False  # group 2
    result = cut(ticket_of(dense, {"2.weight": mask}), factory)
    layer = result.module[2]
    assert (layer.groups, layer.in_channels, layer.out_channels) == (3, 6, 6)
    assert tuple(layer.weight.shape[:2]) == (6, 2)
    assert result.module[0].out_channels == 6


def test_a_saved_network_with_fewer_groups_comes_back(tmp_path):
    _, result = emptied({"2.weight": [3, 4, 5]})
    loaded = load_compact(result.save(tmp_path / "small"), grouped)
    assert sizes(loaded[2]) == (3, 6, 9, (9, 2))
    assert torch.equal(outputs(loaded, X), outputs(result.module, X))


def test_what_is_compared_is_the_masked_network():
    dense = randomised(grouped())
    made = ticket_of(dense, rows_masked(dense, {"2.weight": [3, 4, 5]}))
    assert not torch.allclose(outputs(dense.eval(), X), outputs(masked(grouped, made), X))
