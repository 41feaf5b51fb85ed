"""Sources of masks: the density that was asked for, the entries that the source's score says."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify import entry_scores
from deploy_sparse.sparsify.distribution import erk
from deploy_sparse.sparsify.imp import dense_masks, prune_lowest
from deploy_sparse.sparsify.oneshot import SOURCES, source_masks
from deploy_sparse.sparsify.patterns import unstructured
from deploy_sparse.structure import density


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


def given(seed=1):
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(8, 2, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)
    return {"batches": [(images, labels)], "example_inputs": (images[:2],)}


@pytest.mark.parametrize("kind", ["global", "uniform", "erk"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_reaches_the_density_under_every_distribution(source, kind):
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    masks = dense_masks(model)
    found = source_masks(source, model, masks, 0.3, **given(), distribution=kind)
    assert found.keys() == masks.keys()
    assert density(found) == pytest.approx(0.3, abs=2 / sum(m.numel() for m in masks.values()))
    if kind == "erk":
        for name, share in erk({n: m.shape for n, m in masks.items()}, 0.3).items():
            assert float(found[name].float().mean()) == pytest.approx(share, abs=1 / masks[name].numel())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(bool(m.all()) for m in masks.values())


def test_sources_follow_their_scores():
    model, masks = network(), dense_masks(network())
    weights = dict(model.named_parameters())
    expected = {
        "magnitude": entry_scores.magnitude(weights, masks),
        "random": entry_scores.random(masks, 5),
        "snip": entry_scores.snip(model, masks, given()["batches"]),
        "grasp": entry_scores.grasp(model, masks, given()["batches"]),
    }
    for source, scores in expected.items():
        found = source_masks(source, model, masks, 0.5, **given(), seed=5)
        assert all(torch.equal(found[n], m) for n, m in unstructured(scores, masks, 0.5).items())


def test_one_shot_magnitude_is_one_round_of_imp():
    model, masks = network(), dense_masks(network())
    found = source_masks("magnitude", model, masks, 0.8)
    expected = prune_lowest(dict(model.named_parameters()), masks, 0.2)
    assert all(torch.equal(found[n], m) for n, m in expected.items())


def test_random_masks_differ_by_seed_only():
    model, masks = network(), dense_masks(network())
    first, again, other = (source_masks("random", model, masks, 0.5, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in masks)
    assert not all(torch.equal(first[n], other[n]) for n in masks)


def test_synflow_scores_anew_in_a_hundred_steps_and_so_keeps_every_layer():
    """Tanaka et al. 2020: pruned at once, the score empties whole layers long before it must."""
    torch.manual_seed(0)
    layers = [part for a, b in pairwise((4, 40, 40, 40, 4)) for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers)
    masks = {n: torch.ones_like(p) > 0 for n, p in model.named_parameters() if p.dim() > 1}
    inputs = (torch.zeros(1, 4),)
    found = source_masks("synflow", model, masks, 0.01, example_inputs=inputs)
    step = masks
    for number in range(1, 101):
        step = unstructured(entry_scores.synflow(model, step, inputs), step, 0.01 ** (number / 100))  # no layer spared
    assert all(torch.equal(found[n], step[n]) for n in masks)
    # every surviving weight lies on a path from input to output
    flow = entry_scores.synflow(model, found, inputs)
    assert all(bool((flow[n][found[n]] > 0).all()) for n in masks)
    once = source_masks("synflow", model, masks, 0.01, example_inputs=inputs, steps=1)
    assert int(once["2.weight"].sum()) == 1  # spared


def test_no_layer_loses_its_best_weight():
    model, masks = network(), dense_masks(network())
    with torch.no_grad():
        model[8].weight.mul_(1e-6)
    found = source_masks("magnitude", model, masks, 0.5)
    assert density(found) == pytest.approx(0.5, abs=1e-3)
    assert found["8.weight"].nonzero().tolist() == [list(divmod(int(model[8].weight.abs().argmax()), 12))]
    with pytest.raises(TicketError, match=r"leaves layer '\S+' without a weight"):
        source_masks("magnitude", model, masks, 2 / sum(m.numel() for m in masks.values()))


def test_densities_layer_by_layer():
    model, masks = network(), dense_masks(network())
    wanted = {"0.weight": 1.0, "3.weight": 0.25, "8.weight": 0.5}
    for source in ("magnitude", "synflow"):
        found = source_masks(source, model, masks, wanted, **given(), distribution="layer")
        assert {n: float(m.float().mean()) for n, m in found.items()} == wanted


def test_masked_entries_stay_masked():
    model = network()
    masks = {n: torch.rand(m.shape) < 0.6 for n, m in dense_masks(model).items()}
    for source in SOURCES:
        found = source_masks(source, model, masks, 0.3, **given())
        assert not any(bool((found[n] & ~masks[n]).any()) for n in masks)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("snap", {}, r"unknown source of masks 'snap'[\s\S]*did you mean 'snip'"),
        ("synflow", {}, r"'synflow' without example inputs[\s\S]*example_inputs=\(x,\)"),
        ("snip", {}, r"score 'snip' without data"),
        ("grasp", {}, r"score 'grasp' without data"),
        ("random", {"distribution": "even"}, r"unknown distribution 'even'"),
        ("random", {"density": 0.0}, r"density 0.0"),
        ("random", {"steps": 0}, r"0 pruning steps"),
    ],
)
def test_what_is_missing_or_unknown_is_said(source, options, message):
    model = network()
    with pytest.raises(ConfigError, match=message):
        source_masks(source, model, dense_masks(model), **{"density": 0.5, **options})


def test_the_schedule_says_how_the_density_falls_over_the_steps(monkeypatch):
    model, masks = network(), dense_masks(network())
    seen = []

    def score(source, *_):
        seen.append(density(_[1]))
        return entry_scores.random(masks, 0)

    monkeypatch.setattr("deploy_sparse.sparsify.oneshot._scores", score)
    for schedule, half_way in (("exponential", 0.5), ("cubic", 0.34375), ("one_shot", 0.25)):
        seen.clear()
        found = source_masks("random", model, masks, 0.25, steps=2, schedule=schedule)
        assert seen == [1.0, pytest.approx(half_way, abs=0.001)]
        assert density(found) == pytest.approx(0.25, abs=0.001)
    with pytest.raises(ConfigError, match=r"unknown schedule 'linear'[\s\S]*one_shot, exponential, cubic"):
        source_masks("random", model, masks, 0.25, schedule="linear")
