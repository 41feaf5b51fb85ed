"""Splits are disjoint and complete; batches are pure functions of (seed, epoch, index)."""

import pytest
import torch

from deploy_sparse import data
from deploy_sparse.data.splits import Split, batch_count, train_batches
from deploy_sparse.errors import ConfigError


def test_digits_are_whole_disjoint_stratified_and_seeded():
    splits = data.load("digits", seed=0)
    assert splits.sizes() == {"train": 1167, "validation": 270, "test": 360}
    images = torch.cat([splits.train.images, splits.validation.images, splits.test.images]).flatten(1)
    assert len(torch.unique(images, dim=0)) == 1797  # every picture once: nothing lost, nothing shared
    for part in (splits.train, splits.validation, splits.test):
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        assert shares.min() > 0.08
    assert torch.equal(splits.train.images, data.load("digits", seed=0).train.images)
    assert not torch.equal(splits.test.images, data.load("digits", seed=1).test.images)
    assert abs(float(splits.train.images.mean())) < 1e-5


def test_an_unknown_data_set_names_the_known():
    with pytest.raises(ConfigError, match=r"unknown data set 'digit'[\s\S]*did you mean 'digits'"):
        data.load("digit", seed=0)


def split(count=10):
    return Split(torch.arange(count * 9, dtype=torch.float32).reshape(count, 1, 3, 3), torch.arange(count))


def test_starting_later_gives_the_same_batches():
    whole = list(train_batches(split(), 3, seed=1, epoch=2, shift=1))
    late = list(train_batches(split(), 3, seed=1, epoch=2, shift=1, start=1))
    assert len(whole) == batch_count(split(), 3) == 3
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(whole[1:], late, strict=True))


def test_epochs_and_seeds_differ_and_no_image_comes_twice():
    orders = {
        tuple(torch.cat([y for _, y in train_batches(split(), 5, seed=s, epoch=e)]).tolist())
        for s in (0, 1)
        for e in (0, 1)
    }
    assert len(orders) == 4
    assert all(sorted(order) == list(range(10)) for order in orders)


def test_shifts_move_whole_images_by_up_to_the_given_pixels_and_fill_with_zeros():
    source = split()
    seen = set()
    for epoch in range(20):
        for images, labels in train_batches(source, 5, seed=0, epoch=epoch, shift=1):
            for image, label in zip(images, labels, strict=True):
                padded = torch.nn.functional.pad(source.images[label], (1, 1, 1, 1))
                moves = [
                    (i, j) for i in range(3) for j in range(3) if torch.equal(padded[:, i : i + 3, j : j + 3], image)
                ]
                assert moves
                seen.add(moves[0])
    assert len(seen) == 9
