"""Batches are pure functions of (seed, epoch, index), whatever the number of processes and workers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deploy_sparse.data import Augmentation, Split, batch_count, eval_batches, train_batches
from deploy_sparse.data.files import ImageFiles
from deploy_sparse.errors import ConfigError

AUGMENTATION = Augmentation(shift=1, flip=True, rotation=20.0)


def split(count=10):
    return Split(torch.arange(count * 9, dtype=torch.float32).reshape(count, 1, 3, 3), torch.arange(count))


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(left, right, strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(0, 40), share=st.integers(1, 5), world=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 300), start=st.integers(0, 5),
)  # fmt: skip
def test_ranks_share_the_batches_of_one_process(count, share, world, seed, epoch, start):
    options = {"seed": seed, "epoch": epoch, "augmentation": AUGMENTATION}
    alone = list(train_batches(split(count), share * world, **options))
    assert len(alone) == batch_count(split(count), share * world) == count // (share * world)
    ranks = [
        list(train_batches(split(count), share * world, **options, start=start, rank=r, world=world))
        for r in range(world)
    ]
    for number, batch in enumerate(alone[start:]):
        parts = [rank[number] for rank in ranks]
        assert same([batch], [tuple(torch.cat(both) for both in zip(*parts, strict=True))])
    assert all(len(rank) == max(0, len(alone) - start) for rank in ranks)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 40), batch=st.integers(1, 7), world=st.integers(1, 5))
def test_evaluation_sees_every_image_once_over_all_ranks(count, batch, world):
    source = split(count)
    seen = [pair for rank in range(world) for pair in eval_batches(source, batch, rank=rank, world=world)]
    assert all(len(labels) <= batch and torch.equal(images, source.read(labels)) for images, labels in seen)
    labels = [label for _, part in seen for label in part.tolist()]
    assert sorted(labels) == list(range(count))
    if world == 1:
        assert labels == list(range(count))


def test_epochs_and_seeds_differ_and_no_image_comes_twice():
    orders = {
        tuple(torch.cat([y for _, y in train_batches(split(), 5, seed=s, epoch=e)]).tolist())
        for s in (0, 1)
        for e in (0, 1)
    }
    assert len(orders) == 4
    assert all(sorted(order) == list(range(10)) for order in orders)


def test_augmentation_differs_between_epochs_and_seeds():
    source = Split(torch.arange(9.0).reshape(1, 1, 3, 3), torch.zeros(1, dtype=torch.int64))
    shown = {
        tuple(images.flatten().tolist())
        for seed in range(3)
        for epoch in range(6)
        for images, _ in train_batches(source, 1, seed=seed, epoch=epoch, augmentation=Augmentation(shift=1))
    }
    assert len(shown) >= 6


def test_without_augmentation_images_stay_as_they_are():
    for images, labels in train_batches(split(), 5, seed=0, epoch=0):
        assert torch.equal(images, split().read(labels))


def test_bytes_are_normalised_after_zeros_moved_in():
    source = Split(torch.full((1, 1, 3, 3), 200, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 100.0, 50.0)
    values = {
        value
        for epoch in range(10)
        for images, _ in train_batches(source, 1, seed=0, epoch=epoch, augmentation=Augmentation(shift=1))
        for value in images.flatten().tolist()
    }
    assert values == {-2.0, 2.0}


def test_a_batch_that_the_processes_cannot_share_is_refused_at_once():
    with pytest.raises(
        ConfigError, match=r"a batch of 10 images on 4 processes[\s\S]*multiple of 4[\s\S]*batch_size 12"
    ):
        train_batches(split(), 10, seed=0, epoch=0, world=4)


def test_crops_of_images_in_memory_are_refused():
    with pytest.raises(ConfigError, match=r"crop = 3 of images in memory[\s\S]*leave crop out"):
        train_batches(split(), 5, seed=0, epoch=0, augmentation=Augmentation(crop=3))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Nine pictures of different shapes, as files."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(9):
        pixels = random.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    names = np.array([f"{number}.png".encode() for number in range(9)])
    return Split(ImageFiles(folder, names, resize=18, size=16), torch.arange(9), 120.0, 60.0)


@pytest.mark.parametrize("augmentation", [Augmentation(flip=True, crop=12), AUGMENTATION])
def test_files_give_the_same_pixels_whatever_the_ranks(pictures, augmentation):
    options = {"seed": 1, "epoch": 2, "augmentation": augmentation}
    alone = list(train_batches(pictures, 4, **options))
    ranks = [list(train_batches(pictures, 4, **options, start=1, rank=rank, world=2)) for rank in range(2)]
    assert len(alone) == 2
    size = augmentation.crop or 16
    assert alone[0][0].shape == (4, 3, size, size)
    assert same(alone[1:], [tuple(torch.cat(both) for both in zip(ranks[0][0], ranks[1][0], strict=True))])
    assert not same(alone, list(train_batches(pictures, 4, **(options | {"epoch": 3}))))


def test_workers_change_no_pixel_and_draw_no_global_numbers(pictures):
    options = {"seed": 1, "epoch": 2, "augmentation": Augmentation(flip=True, crop=12)}
    alone = list(train_batches(pictures, 2, **options))
    before = torch.get_rng_state()
    assert same(alone, list(train_batches(pictures, 2, **options, workers=2)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named(pictures, tmp_path, workers):
    (tmp_path / "0.png").write_bytes(pictures.images.path(0).read_bytes()[:200])
    damaged = Split(ImageFiles(tmp_path, pictures.images.names[:1], 18, 16), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(
        ConfigError,
        match=r"0\.png cannot be decoded \(.*truncated[\s\S]*copy that file again.*then continue with --resume$",
    ):
        list(eval_batches(damaged, 1, workers=workers))
