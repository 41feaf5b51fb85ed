"""Data sets by name: what is known without files, what loading gives, what is refused."""

from pathlib import Path

import pytest
import torch

from deploy_sparse import data
from deploy_sparse.data import Augmentation, Description, Split
from deploy_sparse.data.memory import channel_statistics, hold_out
from deploy_sparse.errors import ConfigError


def whole(split):
    return split.read(torch.arange(len(split)))


def test_digits_are_whole_disjoint_stratified_and_seeded():
    splits = data.load("digits", seed=0)
    assert splits.sizes() == {"train": 1167, "validation": 270, "test": 360}
    images = torch.cat([whole(splits.train), whole(splits.validation), whole(splits.test)]).flatten(1)
    assert len(torch.unique(images, dim=0)) == 1797  # every picture once: nothing lost, nothing shared
    for part in (splits.train, splits.validation, splits.test):
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        assert shares.min() > 0.08
    assert torch.equal(whole(splits.train), whole(data.load("digits", seed=0).train))
    assert not torch.equal(whole(splits.test), whole(data.load("digits", seed=1).test))
    assert abs(float(whole(splits.train).mean())) < 1e-5


@pytest.mark.parametrize(
    ("seed", "begins"),
    [(0, [260769777457, 35977529724, 623982377367]), (7, [107233648329, 116943143294, 878299484649])],
)
def test_digits_are_split_as_ever(seed, begins):
    splits = data.load("digits", seed=seed)
    parts = (splits.train, splits.validation, splits.test)
    assert [int(part.labels[:12].dot(10 ** torch.arange(12))) for part in parts] == begins  # twelve labels as digits


def test_descriptions_need_no_files():
    assert data.DATA_SETS == ("digits", "synthetic", "cifar10", "cifar100", "tiny-imagenet", "imagenet")
    described = {name: data.describe(name) for name in data.DATA_SETS}
    assert described == {
        "digits": Description((1, 8, 8), 10, 1167, Augmentation(shift=1)),
        "synthetic": Description((3, 32, 32), 10, 5000, Augmentation(shift=2)),
        "cifar10": Description((3, 32, 32), 10, 45_000, Augmentation(shift=4, flip=True)),
        "cifar100": Description((3, 32, 32), 100, 45_000, Augmentation(shift=4, flip=True)),
        "tiny-imagenet": Description((3, 64, 64), 200, 90_000, Augmentation(flip=True, rotation=20.0)),
        "imagenet": Description((3, 224, 224), 1000, 1_255_544, Augmentation(flip=True, crop=224)),
    }


def test_arguments_change_the_description():
    assert data.describe("synthetic", {"classes": 20, "train_images": 40}) == Description(
        (3, 32, 32), 20, 40, Augmentation(shift=2)
    )
    part = data.describe("imagenet", {"classes": 100})
    assert (part.classes, part.train_images) == (100, 125_554)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_descriptions_agree_with_what_is_loaded(name):
    splits, described = data.load(name, seed=0), data.describe(name)
    assert splits.name == name
    assert splits.image_shape == described.image_shape == tuple(splits.validation.head(2).shape[1:])
    assert splits.classes == described.classes == int(splits.test.labels.max()) + 1
    assert len(splits.train) == described.train_images
    assert splits.augmentation == described.augmentation


@pytest.mark.parametrize(
    "ask", [data.describe, lambda name: data.load(name, seed=0), lambda name: data.check_files(name, Path("data"))]
)
def test_an_unknown_data_set_names_the_known(ask):
    with pytest.raises(
        ConfigError, match=r"unknown data set 'cifar-10'[\s\S]*one of digits[\s\S]*did you mean 'cifar10'"
    ):
        ask("cifar-10")


def test_unknown_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"unknown key 'clases'[\s\S]*data.arguments[\s\S]*did you mean 'classes'"):
        data.load("synthetic", seed=0, arguments={"clases": 3})
    with pytest.raises(ConfigError, match=r"data.arguments classes for 'digits'[\s\S]*no arguments"):
        data.describe("digits", {"classes": 3})


def test_sets_without_files_need_no_folder(tmp_path):
    data.check_files("digits", tmp_path / "nowhere")
    data.check_files("synthetic", tmp_path / "nowhere")


def test_reading_normalises_by_channel_and_head_is_the_beginning():
    pixels = torch.randint(0, 256, (20, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[:, 1] //= 2
    mean, deviation = channel_statistics(pixels)
    split = Split(pixels, torch.arange(20), mean, deviation)
    images = whole(split)
    assert images.dtype == torch.float32
    assert torch.allclose(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(images.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    assert torch.equal(split.read(torch.tensor([7, 2])), images[[7, 2]])
    assert torch.equal(split.head(3), images[:3])
    assert torch.equal(split.head(99), images)


def test_holding_out_is_stratified_disjoint_and_seeded():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    kept, held = hold_out(labels, 0.1, 5, name="toy")
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(100))
    assert torch.bincount(labels[held]).tolist() == [6, 3, 1]
    assert torch.equal(held, hold_out(labels, 0.1, 5, name="toy")[1])
    assert not torch.equal(held, hold_out(labels, 0.1, 6, name="toy")[1])


def test_holding_out_needs_two_images_of_each_class():
    with pytest.raises(ConfigError, match=r"toy has 1 training images of class 2[\s\S]*at least two"):
        hold_out(torch.tensor([0, 0, 1, 1, 2]), 0.1, 0, name="toy")
