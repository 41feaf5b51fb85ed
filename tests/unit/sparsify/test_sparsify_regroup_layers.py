"""What regroup promises about single layers: planted blocks, budgets, layers without blocks, reports, refusals."""

import time

import pytest
import torch
from regroup_samples import layer, one
from torch import nn

from deploy_sparse.errors import TicketError
from deploy_sparse.sparsify.regroup import RegroupRule, grouped_convolutions, layer_table, regroup
from deploy_sparse.structure import Blocks, structure_of


def test_planted_blocks_come_back():
    weight, mask = (
        torch.randn(128, 64, generator=torch.Generator().manual_seed(1)),
        torch.zeros(128, 64, dtype=torch.bool),
    )
    order = torch.randperm(128, generator=torch.Generator().manual_seed(2))
    for group in range(4):
        mask[order[32 * group : 32 * group + 32], 16 * group : 16 * group + 16] = True
    for rule in (
        {"rule": "paper"},
        {"rule": "budget"},
        {"blocks": "equal"},
        {"blocks": "disjoint", "columns": "channel"},
        {"rule": "budget", "blocks": "disjoint", "columns": "channel"},
    ):
        after, report = one(weight, mask, **rule)
        assert torch.equal(after, mask)
        assert (report.blocks, report.in_block_share, report.fill_rate) == (4, 1.0, 1.0)
    after, report = one(weight, mask, rule="code")  # content with 10 columns of 16: 10 > 1.5 · 6
    assert bool((after <= mask).all())
    assert (report.blocks, report.columns, report.in_block_share) == (4, (10,) * 4, 10 / 16)


def test_narrow_layers_are_blocks_too():
    for rows in (6, 20, 40, 64):
        weight, mask = layer((rows, 16, 3, 3), 0.3, rows, groups=2)
        for rule in ({}, {"rule": "code"}, {"rule": "budget"}, {"rule": "budget", "blocks": "equal"}):
            after, report = one(weight, mask, **rule)
            assert report.outcome == "blocks", (rows, rule)
            assert isinstance(structure_of(after), Blocks)
            assert len(report.rows) == (2 if rows == 64 else 1)


def test_the_published_number_of_parts_finds_nothing_in_narrow_layers_and_says_so():
    weight, mask = layer((128, 16, 3, 3), 0.3, 0)
    after, report = one(weight, mask, rule="code", parts=8)
    assert after.all()
    assert (report.outcome, report.blocks, report.reason) == ("dense", 0, "each of 8 parts has fewer than 17 rows")
    wide, mask = layer((256, 16, 3, 3), 0.3, 0)
    assert one(wide, mask, rule="code", parts=8)[1].rows == (32,) * 8


@pytest.mark.parametrize("rule", [{"min_nonzeros": 32, "min_columns": 30}, {"rule": "code", "ratio": 100.0}])
def test_a_layer_without_a_block_is_kept_dense_or_pruned_as_asked(rule):
    weight, mask = layer((64, 8, 3, 3), 0.3, 5)
    after, dense = one(weight, mask, **rule)
    assert after.all()
    assert (dense.outcome, dense.in_block_share, dense.retained_magnitude) == ("dense", 0.0, 1.0)
    after, pruned = one(weight, mask, **rule, empty="prune")
    assert (pruned.outcome, pruned.rows, pruned.reason) == ("pruned", (32,), dense.reason)
    assert "no " in dense.reason
    assert pruned.columns == (rule.get("min_columns", 1),)
    best = (weight.abs() * mask).flatten(1)
    columns = best.sum(dim=0).argsort(descending=True, stable=True)[: pruned.columns[0]]
    rows = best[:, columns].sum(dim=1).argsort(descending=True, stable=True)[:32]
    expected = torch.zeros_like(best, dtype=torch.bool)
    expected[rows[:, None], columns] = True
    assert torch.equal(after.flatten(1), expected)


def test_layers_without_columns_to_choose_stay_dense():
    weight, mask = layer((64, 1, 3, 3), 0.5, 0)
    for rule in ({}, {"empty": "prune"}, {"rule": "budget", "columns": "channel"}):
        after, report = one(weight, mask, **rule)
        assert after.all()
        assert report.reason == "it reads one input channel: no columns to choose"


def test_unpruned_layers_stay_dense_unless_the_rule_says_how_much_goes():
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(weight, dtype=torch.bool)
    for rule in ({}, {"rule": "code"}, {"rule": "budget"}, {"blocks": "disjoint", "columns": "channel"}):
        assert one(weight, mask, **rule)[1].reason == "nothing was pruned"
    assert one(weight, mask, rule="budget", density=0.25)[1].density_after == 0.25
    assert one(weight, mask, blocks="disjoint", columns="channel", parts=2)[1].density_after == 0.5


def test_rows_in_which_nothing_survives_are_in_no_free_block():
    weight, mask = layer((96, 32), 0.4, 3)
    mask[::3] = False
    for rule in ("paper", "code", "budget"):
        after, report = one(weight, mask, rule=rule)
        assert not after[::3].any()
        assert sum(report.rows) == 64


def test_equal_blocks_are_filled_up_with_empty_rows():
    weight, mask = layer((64, 32), 0.4, 3)
    mask[5] = False
    after, report = one(weight, mask, rule="budget", blocks="equal")
    assert report.rows == (32, 32)
    assert after[5].any()


def test_disjoint_blocks_come_near_the_density_and_divide_evenly():
    for density, c_in, parts in ((0.27, 64, 4), (0.5, 64, 2), (0.05, 64, 16), (0.9, 64, 1), (0.3, 48, 4)):
        weight, mask = layer((256, c_in, 3, 3), density, 0)
        _, report = one(weight, mask, blocks="disjoint", columns="channel", tile=16)
        assert report.rows == ((256 // parts,) * parts if parts > 1 else ())
        assert report.columns == ((c_in // parts * 9,) * parts if parts > 1 else ())
    weight, mask = layer((100, 7), 0.3, 0)
    assert sorted(one(weight, mask, blocks="disjoint", columns="channel", tile=16)[1].columns) == [2, 2, 3]


def test_the_first_layer_of_a_colour_image_is_handled():
    weight, mask = layer((64, 3, 7, 7), 0.6, 0)
    assert one(weight, mask)[1].rows == (32, 32)
    for rule in ({"blocks": "equal"}, {"blocks": "disjoint", "parts": 2}, {"empty": "prune"}):
        budget = {} if rule.get("blocks") == "disjoint" else {"rule": "budget", "density": 0.67}
        after, report = one(weight, mask, columns="channel", **rule, **budget)
        assert after.all()
        assert (report.outcome, report.reason) == ("dense", "it reads 3 input channels: too few to run as blocks")
    weight, mask = layer((64, 4, 7, 7), 0.6, 0)
    _, report = one(weight, mask, rule="budget", columns="channel", density=0.5)
    assert (report.outcome, report.density_after) == ("blocks", pytest.approx(0.5))


def test_masks_of_one_dimension_are_handed_on_and_devices_kept():
    weight, mask = layer((64, 16), 0.3, 0)
    masks = {"a": torch.tensor([True, False]), "w": mask}
    found = regroup(masks, {"w": weight.to(torch.float16)})
    assert list(found.masks) == ["a", "w"]
    assert torch.equal(found.masks["a"], masks["a"])
    assert [report.name for report in found.layers] == ["w"]


def test_weights_that_do_not_fit_are_refused():
    weight, mask = layer((16, 8), 0.5, 0)
    with pytest.raises(TicketError, match=r"mask 'conv.wieght' belongs to no weight[\s\S]*did you mean 'conv.weight'"):
        regroup({"conv.wieght": mask}, {"conv.weight": weight})
    with pytest.raises(TicketError, match=r"mask 'w' has shape \(16, 8\), its weight \(16, 4\)"):
        regroup({"w": mask}, {"w": weight[:, :4]})


def test_the_table_has_a_row_for_every_layer_and_one_for_all():
    weight, mask = layer((64, 16, 3, 3), 0.3, 0, groups=2)
    stem, half = layer((8, 1, 3, 3), 0.5, 0)
    found = regroup({"conv.weight": mask, "stem.weight": half}, {"conv.weight": weight, "stem.weight": stem})
    titles, rows = layer_table(found.layers)
    assert titles == ("layer", "shape", "outcome", "blocks", "density", "in blocks", "fill", "magnitude", "why")
    conv = found.layers[0]
    assert rows[0] == (
        "conv.weight", "64×16×3×3", "blocks", "2", f"30.0% → {conv.density_after:.1%}", f"{conv.in_block_share:.1%}",
        f"{conv.fill_rate:.1%}", f"{conv.retained_magnitude:.1%}", "",
    )  # fmt: skip
    assert rows[1][2:8] == ("dense", "0", "50.0% → 100.0%", "-", "-", "100.0%")
    assert (rows[2][0], rows[2][2], rows[2][3]) == ("all", "1 blocks, 1 dense", "2")
    total = found.total
    assert total.in_block_share == pytest.approx(conv.inside / (conv.before + 36))
    assert total.fill_rate == conv.fill_rate
    assert total.density_after == pytest.approx((conv.after + 72) / (conv.positions + 72))


@pytest.mark.slow
def test_resnet50_takes_under_ten_seconds_of_one_core():
    from torchvision.models import resnet50

    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in resnet50().named_parameters() if p.dim() == 4}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    masks = {name: weight.abs() > 1.3 for name, weight in weights.items()}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        started = time.process_time()
        found = regroup(masks, weights)
        assert time.process_time() - started < 10
    finally:
        torch.set_num_threads(threads)
    assert {report.outcome for report in found.layers} == {"blocks"}


@pytest.mark.parametrize("rule", [{"tile": 16}, {"tile": 16, "blocks": "disjoint", "columns": "channel", "parts": 1}])
def test_blocks_that_would_be_the_whole_layer_give_way_where_pruning_is_asked_for(rule):
    weight, mask = layer((32, 16, 1, 1), 0.99, 0)
    rule = {"min_nonzeros": 1, "parts": 1} | rule
    if "blocks" in rule:
        del rule["min_nonzeros"]
    after, report = one(weight, mask, **rule)
    assert (report.outcome, report.reason, bool(after.all())) == ("dense", "its blocks would be the whole layer", True)
    after, report = one(weight, mask, **rule, empty="prune")
    assert (report.outcome, report.rows, report.reason) == ("pruned", (16,), "its blocks would be the whole layer")
    assert int(after.flatten(1).any(dim=1).sum()) == 16
    after, report = one(weight, mask, **rule, empty="prune", min_rows=32, min_columns=16)
    assert after.all()
    assert report.reason == "its blocks would be the whole layer, as would the smallest block allowed"


def test_reasons_name_limits_that_the_layer_caps():
    weight, mask = layer((8, 12), 0.3, 0)
    reason = one(weight, mask, min_rows=1000, min_nonzeros=8, min_columns=12)[1].reason
    assert reason.startswith("no 8 or more rows share 12")
    assert reason.endswith("(min_rows = 1000, capped at the layer's 8)")
    mask[0] = False
    reason = one(weight, mask, min_rows=1000, min_columns=99, min_nonzeros=8)[1].reason
    assert "min_rows = 1000, capped at the layer's 7 left; min_columns = 99, capped at the layer's 12)" in reason


def test_convolutions_in_groups_stay_whole_by_name():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8))
    assert grouped_convolutions(model) == ("1.weight",)
    assert grouped_convolutions(model[1]) == ("weight",)
    weight, mask = layer((64, 8, 3, 3), 0.3, 5)
    found = regroup({"a": mask, "b": mask}, {"a": weight, "b": weight}, rule=RegroupRule("budget"), dense=("a", "none"))
    assert found.masks["a"].all()
    assert not found.masks["b"].all()
    assert found.layers[0].reason == "a convolution in groups: its columns are other channels for each group"


def test_a_budget_too_small_for_one_block_of_whole_multiples_has_that_block():
    weight, mask = layer((32, 8), 0.05, 0)
    report = one(weight, mask, rule="budget", multiple=4)[1]
    assert (len(report.rows), report.columns) == (1, (4,))
    assert report.density_after > report.density_before
