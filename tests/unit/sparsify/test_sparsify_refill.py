"""Refill: budgets by the paper's formula, whole rows only, silence everywhere the channel is seen."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.channel_scores import weight_l1
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.sparsify.refill import refill, refill_report
from deploy_sparse.structure import ChannelGroup, Producer, Slice, density
from deploy_sparse.surgery.graph import channel_groups


def rows(name, size):
    return Slice(name, 0, tuple(range(size)))


def plain_group(size, **changes):
    """conv (with bias) -> norm -> conv2 that reads it."""
    values = {
        "name": "conv.weight", "size": size,
        "producers": (Producer(rows("conv.weight", size), rows("conv.bias", size), (rows("bn.weight", size), rows("bn.bias", size))),),
        "statistics": (rows("bn.running_mean", size),),
        "consumers": (Slice("next.weight", 1, tuple(range(size))),),
    }  # fmt: skip
    return ChannelGroup(**{**values, **changes})


def plain_weights(size, columns=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(size, columns, 3, 3, generator=generator),
        "conv.bias": torch.randn(size, generator=generator),
        "bn.weight": torch.randn(size, generator=generator),
        "bn.bias": torch.randn(size, generator=generator),
        "bn.running_mean": torch.zeros(size),
        "next.weight": torch.randn(5, size, 1, 1, generator=generator),
    }


@given(st.integers(1, 24), st.integers(1, 4), st.floats(0, 1), st.integers(0, 99), st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_budget_rows_and_silence(size, columns, share, seed, multiple):
    weights = plain_weights(size, columns, seed)
    mask = torch.rand(size, columns, 3, 3, generator=torch.Generator().manual_seed(seed)) < share
    result = refill({"conv.weight": mask}, weights, [plain_group(size)], multiple=multiple)

    kept = result["conv.weight"].reshape(size, -1)
    alive = kept.all(dim=1)
    assert torch.equal(alive, kept.any(dim=1))  # no partly filled row, ever
    expected = max(1, math.ceil(int(mask.sum()) / mask[0].numel()))
    assert int(alive.sum()) == min(size, math.ceil(expected / multiple) * multiple)
    scores = weight_l1(weights["conv.weight"], mask)
    if not bool(alive.all()):
        assert scores[alive].min() >= scores[~alive].max()
        for name in ("conv.bias", "bn.weight", "bn.bias"):
            assert torch.equal(result[name], alive)
        assert torch.equal(result["next.weight"], alive.reshape(1, size, 1, 1).expand(5, size, 1, 1))
    assert "bn.running_mean" not in result
    assert all(m.shape == weights[name].shape and m.dtype == torch.bool for name, m in result.items())


def test_the_score_is_of_surviving_weights_only():
    weights = {"conv.weight": torch.tensor([[9.0, 0.1], [1.0, 1.0], [0.5, 0.4]])}
    mask = torch.tensor([[False, True], [True, True], [True, False]])
    group = ChannelGroup("conv.weight", 3, (Producer(rows("conv.weight", 3)),))
    assert refill({"conv.weight": mask}, weights, [group])["conv.weight"].tolist() == [
        [False, False], [True, True], [True, True]
    ]  # fmt: skip


def test_an_empty_layer_keeps_one_channel():
    group = ChannelGroup("conv.weight", 4, (Producer(rows("conv.weight", 4)),))
    result = refill({"conv.weight": torch.zeros(4, 2, dtype=torch.bool)}, {"conv.weight": torch.randn(4, 2)}, [group])
    assert result["conv.weight"].any(dim=1).tolist() == [True, False, False, False]


def residual():
    """Two layers that write one stream of four channels, and one that reads it."""
    group = ChannelGroup(
        "a", 4, (Producer(rows("a", 4), None, (rows("an", 4),)), Producer(rows("b", 4), None, (rows("bn", 4),))),
        shared=(rows("sum_norm", 4),), consumers=(Slice("reader", 1, (0, 1, 2, 3)),),
    )  # fmt: skip
    weights = {
        "a": torch.tensor([[4.0, 4], [3, 3], [0.1, 0.1], [0.2, 0.2]]), "b": torch.tensor([[0.1, 0.1], [8.0, 8], [5, 5], [0.2, 0.2]]),
        "an": torch.ones(4), "bn": torch.ones(4), "sum_norm": torch.ones(4), "reader": torch.ones(3, 4),
    }  # fmt: skip
    half = torch.tensor([[True, False]] * 4)
    return {"a": half, "b": half}, weights, group


def test_by_layer_each_chooses_for_itself_and_the_stream_keeps_the_union():
    masks, weights, group = residual()
    result = refill(masks, weights, [group], coupling="layer")
    assert result["a"].any(dim=1).tolist() == [True, True, False, False]
    assert result["b"].any(dim=1).tolist() == [False, True, True, False]
    assert result["an"].tolist() == [True, True, False, False]
    assert result["bn"].tolist() == [False, True, True, False]
    assert result["reader"].any(dim=0).tolist() == [True, True, True, False]
    assert result["sum_norm"].tolist() == [True, True, True, False]


def test_by_group_they_choose_together():
    masks, weights, group = residual()
    result = refill(masks, weights, [group], coupling="group")
    for name in ("a", "b"):
        assert result[name].any(dim=1).tolist() == [False, True, True, False]
    assert result["reader"].any(dim=0).tolist() == [False, True, True, False]


def test_a_dense_layer_in_the_group_keeps_the_whole_stream():
    masks, weights, group = residual()
    del masks["b"]
    result = refill(masks, weights, [group], coupling="group")
    assert bool(result["a"].all())
    assert "reader" not in result


def test_a_pinned_group_stays_whole():
    weights = plain_weights(4)
    mask = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    result = refill({"conv.weight": mask}, weights, [plain_group(4, pinned="network output")])
    assert bool(result["conv.weight"].all())
    assert set(result) == {"conv.weight"}


def test_flattened_consumers_lose_every_position_of_a_channel():
    group = ChannelGroup(
        "conv", 2, (Producer(rows("conv", 2)),), consumers=(Slice("fc", 1, (0, 0, 0, 0, 1, 1, 1, 1, -1)),)
    )  # fmt: skip
    weights = {"conv": torch.tensor([[1.0], [9.0]]), "fc": torch.ones(3, 9)}
    result = refill({"conv": torch.tensor([[True], [False]])}, weights, [group])
    assert result["conv"].flatten().tolist() == [True, False]
    assert result["fc"][0].tolist() == [True] * 4 + [False] * 4 + [True]


def test_masks_of_another_network_and_bad_multiples_are_refused():
    with pytest.raises(TicketError, match=r"mask 'other' belongs to no layer[\s\S]*conv.weight"):
        refill({"other": torch.ones(2, 2, dtype=torch.bool)}, {"other": torch.ones(2, 2)}, [plain_group(2)])
    with pytest.raises(ConfigError, match=r"multiple 0[\s\S]*1 or more"):
        refill({}, {}, [], multiple=0)


def test_the_arguments_are_not_changed():
    weights = plain_weights(6)
    mask = torch.rand(6, 3, 3, 3) > 0.5
    before = mask.clone(), {k: v.clone() for k, v in weights.items()}
    refill({"conv.weight": mask}, weights, [plain_group(6)])
    assert torch.equal(mask, before[0])
    assert all(torch.equal(weights[k], v) for k, v in before[1].items())


def budgeted(survivors, size=16, per_channel=7, **rule):
    """How many channels a layer keeps whose mask has ``survivors`` entries."""
    mask = torch.zeros(size * per_channel, dtype=torch.bool)
    mask[:survivors] = True
    mask = mask[torch.randperm(len(mask), generator=torch.Generator().manual_seed(0))].reshape(size, per_channel)
    masks = {"w": mask}
    rows = refill(masks, {"w": torch.randn(size, per_channel)}, (), silent=False, **rule)["w"]
    return int(rows.any(dim=1).sum())


@pytest.mark.parametrize(
    ("survivors", "paper", "code"),
    [(83, 12, 12), (84, 12, 13), (85, 13, 13), (0, 1, 1), (7, 1, 2), (112, 16, 16), (111, 16, 16)],
)  # q = 11.86, 12, 12.14, 0, 1, 16, 15.86
def test_budgets_of_the_paper_and_of_the_public_code(survivors, paper, code):
    assert budgeted(survivors) == paper
    assert budgeted(survivors, budget="code") == code


@pytest.mark.parametrize(
    ("extra", "paper", "code"),
    [(0.0, 12, 12), (0.1, 13, 13), (0.5, 14, 14), (1.0, 16, 16)],  # 11.86 + extra · 4.14
)
def test_refill_plus_takes_a_share_of_the_dropped_channels_back(extra, paper, code):
    assert budgeted(83, extra=extra) == paper
    assert budgeted(83, extra=extra, budget="code") == code


def test_refill_plus_reckons_with_the_number_that_was_written():
    # q = 0 of 10: a tenth of the dropped is exactly one, though 0.1 as a float is a little more
    assert budgeted(0, size=10, extra=0.1) == 1
    assert budgeted(0, size=10, extra=0.1, budget="code") == 2


@pytest.mark.parametrize(("multiple", "kept"), [(1, 12), (8, 16), (5, 15), (32, 16)])
def test_widths_are_rounded_up_to_the_multiple(multiple, kept):
    assert budgeted(83, multiple=multiple) == kept


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 99), st.floats(0, 1), st.sampled_from(["paper", "code"]))
@settings(max_examples=60, deadline=None)
def test_any_budget_keeps_whole_rows_within_bounds(size, columns, seed, extra, budget):
    mask = torch.rand(size, columns, generator=torch.Generator().manual_seed(seed)) < 0.4
    weights = {"w": torch.randn(size, columns, generator=torch.Generator().manual_seed(seed))}
    found = refill({"w": mask}, weights, (), extra=extra, budget=budget, silent=False)["w"]
    kept = int(found.any(dim=1).sum())
    assert torch.equal(found.any(dim=1), found.all(dim=1))
    wanted = int(mask.sum()) / columns
    wanted += extra * (size - wanted)
    assert max(1, wanted) - 1e-6 <= kept <= min(size, wanted + 1 + 1e-6)


def test_given_scores_decide_instead():
    weights, mask = {"w": torch.tensor([[9.0, 9.0], [1.0, 1.0], [2.0, 2.0]])}, torch.tensor([[True, False]] * 3)
    scores = {"w": torch.tensor([0.0, 5.0, 1.0])}
    found = refill({"w": mask}, weights, (), scores=scores, silent=False)["w"]
    assert found.any(dim=1).tolist() == [False, True, True]
    with pytest.raises(TicketError, match=r"scores of 'w' have shape \(2,\)[\s\S]*shape \(3,\)"):
        refill({"w": mask}, weights, (), scores={"w": torch.zeros(2)}, silent=False)
    with pytest.raises(TicketError, match=r"not all finite"):
        refill({"w": mask}, weights, (), scores={"w": torch.tensor([0.0, torch.nan, 1.0])}, silent=False)


def test_the_published_variant_masks_rows_and_nothing_else():
    masks, weights, group = residual()
    found = refill(masks, weights, [group], silent=False)
    silent = refill(masks, weights, [group])
    assert set(found) == {"a", "b"}
    assert all(torch.equal(found[name], silent[name]) for name in found)
    assert "an" in silent
    assert "reader" in silent
    pinned = [ChannelGroup("a", 4, group.producers, pinned="network output")]
    assert all(torch.equal(refill(masks, weights, pinned, silent=False)[name], found[name]) for name in found)
    together = refill(masks, weights, [group], silent=False, coupling="group")
    assert together["a"].any(dim=1).tolist() == together["b"].any(dim=1).tolist() == [False, True, True, False]


def test_a_layer_whose_rows_lie_in_two_groups_gives_each_its_share():
    weights = {"w": torch.arange(1.0, 9.0).reshape(8, 1).repeat(1, 2)}
    groups = [
        ChannelGroup("w", 4, (Producer(Slice("w", 0, (0, 1, 2, 3, -1, -1, -1, -1))),)),
        ChannelGroup("w", 4, (Producer(Slice("w", 0, (-1, -1, -1, -1, 0, 1, 2, 3))),)),
    ]
    found = refill({"w": torch.tensor([[True, False]] * 8)}, weights, groups)["w"]
    assert found.any(dim=1).tolist() == [False, False, True, True] * 2


def test_rows_that_are_one_channel_stay_or_go_together():
    # a layer whose output is split in two halves that gate each other: rows j and j + 2 are channel j
    group = ChannelGroup("w", 2, (Producer(Slice("w", 0, (0, 1, 0, 1))),))
    weights = {"w": torch.tensor([[5.0], [1.0], [0.0], [4.5]])}  # channel 0: 5, channel 1: 5.5
    found = refill({"w": torch.tensor([[True], [True], [False], [False]])}, weights, [group])["w"]
    assert found.flatten().tolist() == [True, False, True, False]  # scores of survivors: 5 and 1


@pytest.fixture(scope="module")
def mobile():
    """A MobileNet, its channel groups, and one IMP-like mask of every convolution, depthwise ones included."""
    torch.manual_seed(0)
    model = zoo.build("mobilenet_v1", widths=(8, 12, 16), strides=(1, 2))
    masks = {n: torch.rand(m.shape) < 0.5 for n, m in dense_masks(model).items()}
    return model, masks, channel_groups(model, (torch.zeros(2, 3, 8, 8),))


def test_depthwise_filters_stay_exactly_where_their_channel_does(mobile):
    model, masks, groups = mobile
    found = refill(masks, dict(model.state_dict()), groups)
    for producer, filters, norm in (
        ("conv1", "blocks.0.conv1", "blocks.0.bn1"),
        ("blocks.0.conv2", "blocks.1.conv1", "blocks.1.bn1"),
    ):
        alive = found[f"{producer}.weight"].flatten(1).any(dim=1)
        assert 0 < int(alive.sum()) < len(alive)
        assert torch.equal(found[f"{filters}.weight"].flatten(1).all(dim=1), alive)
        assert torch.equal(found[f"{filters}.weight"].flatten(1).any(dim=1), alive)
        assert torch.equal(found[f"{norm}.bias"], alive)  # the constant behind a dropped filter goes too
    reader = found["blocks.0.conv2.weight"]
    assert torch.equal(reader.flatten(1).any(dim=0), found["conv1.weight"].flatten(1).any(dim=1))


def test_published_refill_treats_depthwise_layers_as_layers(mobile):
    model, masks, groups = mobile
    found = refill(masks, dict(model.state_dict()), groups, silent=False)
    assert set(found) == set(masks)
    for name, mask in masks.items():
        assert int(found[name].flatten(1).any(dim=1).sum()) == math.ceil(int(mask.sum()) / mask[0].numel())


def test_a_stream_some_layers_write_only_a_part_of():
    """A shortcut that pads with zeros: the stem writes 8 of the 16 channels of the stream."""
    torch.manual_seed(0)
    model = zoo.build("resnet20", blocks=(1, 1), widths=(8, 16))
    masks = {n: torch.rand(m.shape) < 0.5 for n, m in dense_masks(model).items()}
    groups = channel_groups(model, (torch.zeros(2, 3, 8, 8),))
    writers = ("conv1.weight", "stages.0.0.conv2.weight", "stages.1.0.conv2.weight")
    found = refill(masks, dict(model.state_dict()), groups)
    for name in writers:
        assert int(found[name].flatten(1).any(dim=1).sum()) == math.ceil(
            int(masks[name].sum()) / masks[name][0].numel()
        )
    alive = {name: found[name].flatten(1).any(dim=1) for name in writers}
    stream = alive[writers[2]].clone()
    stream[:8] |= alive[writers[0]] | alive[writers[1]]
    assert torch.equal(found["fc.weight"].any(dim=0), stream)
    together = refill(masks, dict(model.state_dict()), groups, coupling="group")
    stream = together["fc.weight"].any(dim=0)
    assert 0 < int(stream.sum()) < 16
    for name in writers:
        rows = together[name].flatten(1).any(dim=1)
        assert torch.equal(rows, stream[: len(rows)])


class Unknown(nn.Module):
    def forward(self, x):
        return x.cummax(1).values


def test_what_cannot_be_removed_stays_whole_and_the_report_says_so():
    """An operation without a rule needs all of its channels; the published variant masks their rows all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), Unknown(), nn.Conv2d(8, 8, 3), Unknown(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(96, 2)
    )  # fmt: skip
    masks = {n: torch.rand(m.shape) < 0.5 for n, m in dense_masks(model).items()}
    groups = channel_groups(model, (torch.zeros(2, 3, 8, 8),))
    found = refill(masks, dict(model.state_dict()), groups)
    report = {row.layer: row for row in refill_report(masks, found)}
    assert [(row.kept, row.channels) for row in report.values()] == [
        (8, 8),
        (8, 8),
        (math.ceil(6 * report["4.weight"].before), 6),
    ]
    assert report["4.weight"].kept < 6
    published = refill(masks, dict(model.state_dict()), (), silent=False)
    assert all(row.kept == math.ceil(row.before * row.channels) for row in refill_report(masks, published))


def test_the_report_says_what_became_of_each_layer():
    masks, weights, group = residual()
    masks["reader"] = torch.ones(3, 4, dtype=torch.bool)
    found = refill({"a": masks["a"], "b": masks["b"]}, weights, [group])
    rows = {row.layer: row for row in refill_report(masks, found)}
    assert list(rows) == ["a", "b", "reader"]
    assert (rows["a"].kept, rows["a"].channels, rows["a"].before, rows["a"].refilled) == (2, 4, 0.5, 0.5)
    assert (rows["reader"].kept, rows["reader"].refilled, rows["reader"].after) == (3, 1.0, 0.75)
    assert all(row.partly_filled == 0 for row in rows.values())
    torn = {"w": torch.tensor([[True, True], [True, False], [False, False]])}
    assert refill_report(torn, torn)[0].partly_filled == 1
    assert refill_report({"bias": torch.ones(2, dtype=torch.bool), **torn}, torn)[0].layer == "w"


@pytest.mark.parametrize("network", ["vgg16_bn", "wrn32_2", "resnet18"])
def test_refill_density_tracks_imp_from_just_above(network):
    """Chen et al. 2022, tables A3 to A7: 80.17, 64.06, 51.31 … % where IMP has 80.00, 64.00, 51.20 … %."""
    with torch.device("meta"):
        shapes = {n: m.shape for n, m in dense_masks(zoo.build(network)).items()}
    generator = torch.Generator().manual_seed(0)
    total = sum(math.prod(shape) for shape in shapes.values())
    slack = sum(math.prod(shape[1:]) for shape in shapes.values()) / total  # one channel in every layer
    chance = {n: torch.rand(shape, generator=generator) for n, shape in shapes.items()}
    for number in (1, 2, 4, 9):
        masks = {n: drawn < 0.8**number for n, drawn in chance.items()}
        scores = {n: drawn.flatten(1).sum(dim=1) for n, drawn in chance.items()}
        found = refill(masks, {}, (), scores=scores, silent=False)
        assert density(masks) <= density(found) <= density(masks) + slack
        for row in refill_report(masks, found):
            assert row.before <= row.after < row.before + 1 / row.channels
            assert row.partly_filled == 0


def test_unknown_rules_are_refused():
    mask, weights = {"w": torch.ones(2, 2, dtype=torch.bool)}, {"w": torch.ones(2, 2)}
    for rule, message in (
        ({"coupling": "stream"}, r"coupling 'stream'[\s\S]*layer, group"),
        ({"budget": "exact"}, r"budget 'exact'[\s\S]*paper, code"),
        ({"extra": 1.5}, r"extra 1.5[\s\S]*\[0, 1\]"),
        ({"extra": -0.1}, r"extra -0.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            refill(mask, weights, (), silent=False, **rule)


def test_given_shares_are_the_budget_in_the_place_of_the_masks_densities():
    mask, weights = torch.ones(10, 3, dtype=torch.bool), {"conv.weight": torch.randn(10, 3)}
    group = ChannelGroup("conv.weight", 10, (Producer(rows("conv.weight", 10)),))
    for share, budget, kept in (
        (0.31, "paper", 4),
        (0.3, "paper", 3),
        (0.3, "code", 4),
        (1.0, "paper", 10),
        (0, "paper", 1),
    ):
        found = refill({"conv.weight": mask}, weights, [group], shares={"conv.weight": share}, budget=budget)
        assert int(found["conv.weight"].all(dim=1).sum()) == kept
    masks, weights, group = residual()
    together = refill(masks, weights, [group], shares={"a": 0.25, "b": 0.75}, coupling="group")
    assert torch.equal(together["a"], together["b"])
    for shares, message in (({}, "no share for 'a'"), ({"a": 1.5, "b": 0}, r"share 1.5 of 'a'[\s\S]*\[0, 1\]")):
        with pytest.raises(ConfigError, match=message):
            refill(masks, weights, [group], shares=shares)
