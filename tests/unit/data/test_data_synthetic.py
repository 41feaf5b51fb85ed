"""The synthetic pictures: a function of their seeds, balanced, learnable, and too hard for a network cut too far."""

import copy
import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from deploy_sparse import data
from deploy_sparse.data import synthetic
from deploy_sparse.data.draws import Stream, uniforms
from deploy_sparse.data.synthetic import SyntheticConfig, pictures, task_of
from deploy_sparse.errors import ConfigError

SMALL = {"train_images": 300, "validation_images": 40, "test_images": 40}


def test_the_seed_decides_the_pictures_bit_for_bit():
    one, again, other = (data.load("synthetic", seed=seed, arguments=SMALL) for seed in (3, 3, 4))
    assert one.sizes() == {"train": 300, "validation": 40, "test": 40}
    assert one.train.images.dtype == torch.uint8
    assert one.train.images.shape == (300, 3, 32, 32)
    assert torch.equal(one.train.images, again.train.images)
    assert not (one.train.images == other.train.images).flatten(1).all(1).any()
    every = torch.cat([part.images for part in (one.train, one.validation, one.test, other.train)]).flatten(1)
    assert len(torch.unique(every, dim=0)) == 680


def test_each_picture_depends_on_its_own_number_only():
    config = SyntheticConfig()
    many, few = (pictures(config, task_of(config), seed=1, split=0, count=count)[0] for count in (260, 7))
    assert torch.equal(many[:7], few)


def test_the_task_seed_decides_the_motifs_and_the_seed_does_not():
    tasks = [task_of(SyntheticConfig(task_seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(tasks[0].motifs, tasks[1].motifs)
    assert not torch.equal(tasks[0].motifs, tasks[2].motifs)
    alike, unlike = (data.load("synthetic", seed=0, arguments=SMALL | {"task_seed": seed}) for seed in (0, 1))
    assert not torch.equal(alike.train.images, unlike.train.images)


@pytest.mark.parametrize("classes", [2, 10, 11, 100])
def test_every_class_is_a_pair_of_its_own_and_no_motif_tells_a_class(classes):
    config = SyntheticConfig(classes=classes, train_images=classes * 3, validation_images=classes, test_images=classes)
    task = task_of(config)
    assert len({tuple(pair) for pair in task.pairs.tolist()}) == classes
    assert all(first != second for first, second in task.pairs.tolist())
    assert math.comb(len(task.motifs) - 1, 2) < classes <= math.comb(len(task.motifs), 2)
    if classes >= 10:
        assert torch.bincount(task.pairs.flatten(), minlength=len(task.motifs)).min() > 1
    splits = synthetic.load_synthetic(config, 0)
    assert torch.bincount(splits.train.labels).tolist() == [3] * classes


def test_pictures_show_their_two_motifs_and_nothing_else_without_clutter():
    config = SyntheticConfig(clutter=0, noise=0, contrast=0.8, classes=3)
    task = task_of(config)
    drawn, labels = pictures(config, task, seed=0, split=0, count=60)
    grey = drawn.to(torch.float32).mean(1, keepdim=True)
    grey = grey - grey.mean(dim=(2, 3), keepdim=True)
    found = torch.stack([functional.conv2d(grey, motif[:, None]).amax(dim=(1, 2, 3)) for motif in task.motifs], dim=1)
    best = found.topk(2, dim=1).indices.sort(dim=1).values  # [60, 2]
    assert (best == task.pairs[labels]).all(1).to(torch.float32).mean() > 0.9


def test_the_knobs_do_what_they_say():
    def spread(**options):
        config = SyntheticConfig(**options)
        return float(pictures(config, task_of(config), seed=0, split=0, count=200)[0].to(torch.float32).std())

    assert spread(clutter=0, noise=0) < spread(clutter=2, noise=0) < spread(clutter=2, noise=0.25)
    assert spread(noise=0, contrast=0.1) < spread(noise=0, contrast=0.5)


def test_numbers_next_to_one_stay_in_the_tables():
    config = SyntheticConfig()
    numbers = torch.full((2, sum(synthetic._widths(config))), 1 - 2**-53, dtype=torch.float64)
    drawn = synthetic._drawn(config, task_of(config), torch.tensor([0, 9]), numbers)
    assert drawn.shape == (2, 3, 32, 32)


def test_noise_is_uniform_and_its_pixels_are_unrelated():
    noise = synthetic._noise(uniforms(500, Stream.PICTURES, 0, torch.arange(200))).flatten(0, 1)  # [100 000, 4]
    assert noise.min() == -1
    assert noise.max() == 1
    assert torch.allclose(noise.mean(0), torch.zeros(4), atol=0.01)
    assert torch.allclose(noise.std(0), torch.full((4,), 3**-0.5), atol=0.01)
    assert torch.corrcoef(noise.T).sub(torch.eye(4)).abs().max() < 0.015


def test_a_shift_cuts_no_motif():
    config = SyntheticConfig(noise=0, clutter=20, contrast=1.0)
    task = task_of(config)
    bare = synthetic.Task(torch.zeros_like(task.motifs), torch.zeros_like(task.clutter), task.pairs)
    shown, empty = (pictures(config, each, seed=0, split=0, count=300)[0].int() for each in (task, bare))
    changed = (shown != empty).any(dim=0).any(dim=0)  # [32, 32]
    edge = synthetic.EDGE
    assert changed[edge:-edge, edge:-edge].all()
    assert int(changed.sum()) == (32 - 2 * edge) ** 2


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"classes = 1 in \[data.arguments\] of 'synthetic'"):
        data.describe("synthetic", {"classes": 1})


def test_the_default_set_is_drawn_within_three_seconds_of_one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        before = time.process_time()
        data.load("synthetic", seed=0)
        assert time.process_time() - before < 3.0
    finally:
        torch.set_num_threads(threads)


def network(widths):
    torch.manual_seed(0)
    layers, before = [], 3
    for width in widths:
        layers += [
            nn.Conv2d(before, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def trained(model, splits, masks=()):
    """Test accuracy after eight epochs of SGD under masks [(weight, mask)]."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps, step = 8 * data.batch_count(splits.train, 64), 0
    for epoch in range(8):
        model.train()
        for images, labels in data.train_batches(
            splits.train, 64, seed=0, epoch=epoch, augmentation=splits.augmentation
        ):
            warm = min(1.0, 8 * step / steps + 1e-3)
            optimizer.param_groups[0]["lr"] = 0.1 * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            with torch.no_grad():
                for weight, mask in masks:
                    weight.mul_(mask)
            step += 1
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.eval_batches(splits.test, 500))
    return right / len(splits.test)


@pytest.mark.slow
def test_a_small_network_learns_it_and_one_cut_too_far_does_not():
    splits = data.load("synthetic", seed=0)
    model = network((16, 32, 64))
    start = copy.deepcopy(model.state_dict())
    dense = trained(model, splits)
    assert 0.85 < dense < 0.96

    weights = [layer.weight for layer in model if isinstance(layer, nn.Conv2d)]
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights])
    least = magnitudes.topk(int(0.03 * len(magnitudes))).values[-1]
    masks = [(weight, (weight.detach().abs() >= least).to(torch.float32)) for weight in weights]
    model.load_state_dict(start)
    with torch.no_grad():
        for weight, mask in masks:
            weight.mul_(mask)
    assert trained(model, splits, masks) < dense - 0.1
    assert trained(network((2, 4, 8)), splits) < dense - 0.1
