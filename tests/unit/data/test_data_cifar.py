"""CIFAR from the published layout: 45k / 5k / 10k in proportion, checked before it is opened."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from deploy_sparse import data
from deploy_sparse.data import Augmentation
from deploy_sparse.errors import ConfigError

KINDS = {"cifar10": (datasets.CIFAR10, 10, "labels"), "cifar100": (datasets.CIFAR100, 100, "fine_labels")}


def make(name, folder, monkeypatch, per_class=10):
    """A small set in the published layout, whose checksums torchvision takes for the published ones."""
    kind, classes, key = KINDS[name]
    place = folder / kind.base_folder
    place.mkdir(parents=True)
    random, made = np.random.default_rng(0), {}

    def write(file, content):
        blob = pickle.dumps(content)
        (place / file).write_bytes(blob)
        return hashlib.md5(blob).hexdigest()

    def part(files):
        sums = []
        for file, _ in files:
            labels = random.permutation(np.arange(classes * per_class) % classes)
            pixels = random.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
            pixels[:, 0] = labels  # the first pixel's red tells the label
            made[file] = pixels
            sums.append([file, write(file, {"data": pixels, key: labels.tolist()})])
        return sums

    monkeypatch.setattr(kind, "train_list", part(kind.train_list))
    monkeypatch.setattr(kind, "test_list", part(kind.test_list))
    meta = write(kind.meta["filename"], {kind.meta["key"]: [str(number) for number in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta})
    return made


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_validation_is_a_stratified_tenth_of_train_and_test_is_the_published_one(tmp_path, monkeypatch, name):
    made = make(name, tmp_path, monkeypatch)
    kind, classes, _ = KINDS[name]
    data.check_files(name, tmp_path)
    splits = data.load(name, seed=0, folder=tmp_path)
    count = len(kind.train_list) * classes * 10
    assert splits.sizes() == {"train": count * 9 // 10, "validation": count // 10, "test": classes * 10}
    assert (splits.name, splits.classes, splits.image_shape) == (name, classes, (3, 32, 32))
    assert splits.augmentation == Augmentation(shift=4, flip=True)
    assert torch.bincount(splits.validation.labels).tolist() == [count // classes // 10] * classes

    parts = [splits.train, splits.validation, splits.test]
    assert all(torch.equal(part.images[:, 0, 0, 0].long(), part.labels) for part in parts)
    read = [{row.tobytes() for row in part.images.flatten(1).numpy()} for part in parts]
    published = [
        {row.tobytes() for file, _ in files for row in made[file]} for files in (kind.train_list, kind.test_list)
    ]
    assert read[0] | read[1] == published[0]
    assert not read[0] & read[1]
    assert read[2] == published[1]

    images = splits.train.read(torch.arange(len(splits.train)))
    assert torch.allclose(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(images.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4)


def test_the_seed_decides_what_is_held_out(tmp_path, monkeypatch):
    make("cifar10", tmp_path, monkeypatch)
    one, again, other = (data.load("cifar10", seed=seed, folder=tmp_path) for seed in (0, 0, 1))
    assert torch.equal(one.validation.images, again.validation.images)
    assert not torch.equal(one.validation.images, other.validation.images)
    assert torch.equal(one.test.images, other.test.images)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_files_say_what_belongs_where(tmp_path, monkeypatch, name):
    base = KINDS[name][0].base_folder
    message = rf"{name}: \S+{base}/\S+ does not exist[\s\S]*put {base}/ under {tmp_path}/[\s\S]*--data.folder DIR"
    with pytest.raises(ConfigError, match=message):
        data.check_files(name, tmp_path)
    make(name, tmp_path, monkeypatch)
    lost = tmp_path / base / KINDS[name][0].test_list[0][0]
    lost.unlink()
    with pytest.raises(ConfigError, match=rf"{name}: {lost} does not exist"):
        data.load(name, seed=0, folder=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_unpacked_folder_itself_will_do(tmp_path, monkeypatch, name):
    make(name, tmp_path, monkeypatch)
    inner = tmp_path / KINDS[name][0].base_folder
    data.check_files(name, inner)
    one, other = (data.load(name, seed=0, folder=folder) for folder in (tmp_path, inner))
    assert torch.equal(one.train.images, other.train.images)
    assert torch.equal(one.test.labels, other.test.labels)
    lost = inner / KINDS[name][0].test_list[0][0]
    lost.unlink()
    with pytest.raises(ConfigError, match=rf"{name}: {lost} does not exist[\s\S]*unpack \S+ anew, or name another"):
        data.check_files(name, inner)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_an_altered_file_is_named_and_never_opened(tmp_path, monkeypatch):
    make("cifar10", tmp_path, monkeypatch)
    altered = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    altered.write_bytes(pickle.dumps(Bomb()))
    message = (
        rf"{altered} is not the published file[\s\S]*unpack cifar-10-python.tar.gz anew, then continue with --resume"
    )
    with pytest.raises(ConfigError, match=message):
        data.load("cifar10", seed=0, folder=tmp_path)


def test_home_is_understood(tmp_path, monkeypatch):
    make("cifar100", tmp_path / "sets", monkeypatch, per_class=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(data.load("cifar100", seed=0, folder="~/sets").test) == 200
