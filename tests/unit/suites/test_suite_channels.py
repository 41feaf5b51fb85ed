"""Which channels the forms keep: counts by hand, widths in multiples, and tickets that surgery cuts exactly."""

import pytest
import torch

from deploy_sparse import zoo
from deploy_sparse.errors import ConfigError
from deploy_sparse.suites.channels import channel_masks
from deploy_sparse.suites.config import Form

X = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)
INNER = [f"stages.{n}.0.conv1.weight" for n in range(3)]
STREAM = [f"stages.{n}.0.conv2.weight" for n in range(3)]


def network(**arguments):
    torch.manual_seed(0)
    return zoo.build("resnet_digits", **{"widths": (16, 32, 64), **arguments}).eval()


def masks_of(multiple=1, **values):
    return channel_masks(network(), X, Form(structure="channels", multiple=multiple, **values), multiple)


def widths(masks, names):
    """How many rows of each weight survive; all of one without a mask."""
    sizes = dict(network().named_parameters())
    return [int(masks[n].flatten(1).any(dim=1).sum()) if n in masks else len(sizes[n]) for n in names]


@pytest.mark.parametrize(("multiple", "expected"), [(1, [12, 23, 45]), (16, [16, 32, 48]), (4, [12, 24, 48])])
def test_an_even_share_is_rounded_up_then_up_to_the_multiple(multiple, expected):
    masks = masks_of(multiple, keep=0.7)
    assert widths(masks, INNER) == expected
    assert widths(masks, STREAM) == expected, "layers of one residual stream keep the same channels"


def test_inner_layers_leave_the_residual_stream_whole():
    masks = masks_of(keep=0.5, layers="inner")
    assert widths(masks, INNER) == [8, 16, 32]
    assert widths(masks, STREAM) == [16, 32, 64]
    assert widths(masks, ["conv1.weight"]) == [16]


def test_the_channels_with_the_largest_mean_magnitude_stay():
    model = network()
    masks = channel_masks(model, X, Form(structure="channels", keep=0.25, layers="inner"), 1)
    magnitude = model.get_parameter(INNER[0]).detach().abs().flatten(1).mean(dim=1)
    kept = masks[INNER[0]].flatten(1).any(dim=1).nonzero().flatten().tolist()
    assert kept == sorted(magnitude.argsort(descending=True)[:4].tolist())


def test_chase_takes_the_share_of_all_channels_from_the_layers_with_the_lowest_scores():
    masks = masks_of(keep=0.5, layers="inner", rule="chase", floor=0.25)
    left = widths(masks, INNER)
    assert sum(left) == 56  # of 16 + 32 + 64
    assert left[0] == 16, "a narrow layer starts with larger weights and keeps its channels"
    assert left[2] < 32, "a wide one loses more than its even part"
    assert all(count >= floor for count, floor in zip(left, (2, 4, 8), strict=True))
    assert widths(masks, STREAM) == [16, 32, 64]


def test_chase_with_prune_skip_takes_them_from_the_stream_too():
    masks = masks_of(keep=0.5, layers="all", rule="chase")
    assert sum(widths(masks, STREAM)) < 16 + 32 + 64


def test_by_magnitude_layers_differ_as_global_pruning_leaves_them():
    even, global_ = masks_of(keep=0.4), masks_of(keep=0.4, rule="magnitude")
    narrow, *_, wide = widths(global_, INNER)
    assert narrow / 16 > wide / 64, "initial weights of narrow layers are larger"
    assert narrow > widths(even, INNER)[0]
    model = network()
    weights = {
        n: model.get_parameter(n).detach().abs()
        for n, _ in model.named_parameters()
        if "conv" in n or "shortcut.0" in n
    }
    pooled = torch.cat([w.flatten() for w in weights.values()]).sort(descending=True).values
    threshold = pooled[int(0.4 * len(pooled))]
    share = float((weights[INNER[2]] > threshold).float().mean())
    assert wide == pytest.approx(share * 64, abs=1.01)


def test_a_share_that_takes_nothing_is_refused():
    with pytest.raises(ConfigError) as caught:
        masks_of(16, keep=0.99)
    assert caught.value.given == "keep = 0.99, by which no channel goes once widths are in multiples of 16"


def test_a_network_without_inner_channels_says_what_to_take():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)).eval()
    with pytest.raises(ConfigError) as caught:
        channel_masks(model, X, Form(structure="channels", keep=0.5, layers="inner"), 1)
    assert caught.value.given == "no channels of layers = 'inner' can go"
    assert "layers = 'all'" in caught.value.fix
