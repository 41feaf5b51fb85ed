"""Tiny-ImageNet and ImageNet from folders, as unpacked and sorted by class."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from deploy_sparse import data
from deploy_sparse.data import Augmentation, train_batches
from deploy_sparse.errors import ConfigError

CLASSES = ("n01", "n02", "n03")
PART = {"classes": 3}


def picture(path, label, number, size=(64, 64), kind="RGB"):
    """A picture whose red tells the label and whose green tells the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (60 * label + 30, 10 * number + 20, 128)).convert(kind).save(path, quality=95)


def tiny(folder, flat=True, per_class=10):
    root = folder / "tiny-imagenet-200"
    lines = []
    for label, name in enumerate(CLASSES):
        for number in range(per_class):
            picture(root / "train" / name / "images" / f"{name}_{number}.JPEG", label, number)
        (root / "train" / name / f"{name}_boxes.txt").write_text("a box\n")
    for number, label in enumerate((2, 0, 1, 0, 2, 1)):
        file = f"val_{number}.JPEG"
        picture(root / "val" / ("images" if flat else CLASSES[label]) / file, label, number)
        lines.append(f"{file}\t{CLASSES[label]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def imagenet(root):
    for label, name in enumerate(CLASSES):
        for number in range(6):
            picture(root / "train" / name / f"{name}_{number}.JPEG", label, number, (300 + 10 * number, 280))
        picture(root / "val" / name / f"val_{label}.JPEG", label, 0, (400, 200), "L" if label == 0 else "RGB")


def raw(split, channel):
    """The mean of a channel of each image of one colour, in bytes."""
    return split.images.read(range(len(split)))[:, channel].to(torch.float32).mean(dim=(1, 2))


def reds_tell_labels(split):
    return torch.allclose(raw(split, 0), 60.0 * split.labels + 30, atol=4)


@pytest.mark.parametrize("flat", [True, False], ids=["as unpacked", "sorted by class"])
def test_tiny_imagenet_has_a_tenth_held_out_and_the_official_val_as_test(tmp_path, flat):
    root = tiny(tmp_path, flat)
    if not flat:
        (root / "val" / "images").mkdir()  # left behind by the sorting
    (root / "train" / ".ipynb_checkpoints").mkdir()
    data.check_files("tiny-imagenet", tmp_path)
    splits = data.load("tiny-imagenet", seed=0, folder=tmp_path, arguments=PART)
    assert splits.sizes() == {"train": 27, "validation": 3, "test": 6}
    assert (splits.name, splits.classes, splits.image_shape) == ("tiny-imagenet", 3, (3, 64, 64))
    assert splits.augmentation == Augmentation(flip=True, rotation=20.0)
    assert splits.validation.labels.tolist() == [0, 1, 2]
    assert all(reds_tell_labels(part) for part in (splits.train, splits.validation, splits.test))
    names = [{*part.images.names} for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in names] == [27, 3, 6]
    assert len(set.union(*names)) == 36
    assert all(name.startswith(b"val/") for name in names[2])


def test_the_seed_decides_what_is_held_out(tmp_path):
    tiny(tmp_path)
    held = [
        tuple(data.load("tiny-imagenet", seed=seed, folder=tmp_path, arguments=PART).validation.images.names)
        for seed in (0, 0, 1)
    ]
    assert held[0] == held[1] != held[2]


def test_imagenet_is_resized_and_cropped_and_two_percent_held_out(tmp_path):
    imagenet(tmp_path)  # the folder itself is the data set
    splits = data.load("imagenet", seed=0, folder=tmp_path, arguments=PART)
    assert splits.sizes() == {"train": 15, "validation": 3, "test": 3}
    assert splits.image_shape == tuple(splits.test.head(1).shape[1:]) == (3, 224, 224)
    assert splits.augmentation == Augmentation(flip=True, crop=224)
    assert reds_tell_labels(splits.train)
    grey = splits.test.images.read([0])
    assert torch.equal(grey[:, 0], grey[:, 1])
    seen, expected = (
        splits.test.read(torch.tensor([2])),
        (torch.tensor([150, 20, 128]) / 255 - torch.tensor([0.485, 0.456, 0.406])),
    )
    assert torch.allclose(seen.mean(dim=(0, 2, 3)), expected / torch.tensor([0.229, 0.224, 0.225]), atol=0.05)
    images, labels = next(train_batches(splits.train, 4, seed=0, epoch=0, augmentation=splits.augmentation))
    assert images.shape == (4, 3, 224, 224)
    assert len(labels) == 4


def test_evaluation_takes_the_middle_of_a_picture_brought_to_size(tmp_path):
    root = tmp_path / "imagenet"
    imagenet(root)
    pixels = np.zeros((256, 512, 3), dtype=np.uint8)
    pixels[:, 144:368] = 255  # the middle 224 columns
    Image.fromarray(pixels).save(root / "val" / "n01" / "val_0.png")
    (root / "val" / "n01" / "val_0.JPEG").unlink()
    splits = data.load("imagenet", seed=0, folder=tmp_path, arguments=PART)
    assert int(splits.test.images.read([0]).min()) == 255


def test_missing_folders_say_what_belongs_where(tmp_path):
    for name, folder in (("tiny-imagenet", "tiny-imagenet-200"), ("imagenet", "imagenet")):
        with pytest.raises(
            ConfigError,
            match=rf"{name}: {tmp_path}/{folder}/train does not exist[\s\S]*put {folder}/ under {tmp_path}/, or name another folder: --data.folder DIR",
        ):
            data.check_files(name, tmp_path)
    root = tiny(tmp_path)
    shutil.rmtree(root / "val")
    with pytest.raises(ConfigError, match=r"tiny-imagenet-200/val does not exist[\s\S]*val_annotations.txt"):
        data.load("tiny-imagenet", seed=0, folder=tmp_path, arguments=PART)


def test_a_part_of_a_data_set_must_be_called_one(tmp_path):
    tiny(tmp_path)
    with pytest.raises(ConfigError, match=r"train has 3 class folders[\s\S]*200[\s\S]*--data.arguments.classes 3"):
        data.load("tiny-imagenet", seed=0, folder=tmp_path)


def test_a_class_without_pictures_is_named(tmp_path):
    imagenet(tmp_path)
    for name in CLASSES[1:]:
        shutil.rmtree(tmp_path / "val" / name)
    with pytest.raises(
        ConfigError, match=r"val has no pictures of class n02 and 1 more[\s\S]*sort the pictures into class folders"
    ):
        data.load("imagenet", seed=0, folder=tmp_path, arguments=PART)
    (tmp_path / "train" / "n04").mkdir()
    with pytest.raises(ConfigError, match=r"train has no pictures of class n04\n[\s\S]*unpack"):
        data.load("imagenet", seed=0, folder=tmp_path, arguments={"classes": 4})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_99.JPEG\tn01\t0\t0\t1\t1", r"line 7, names val/images/val_99.JPEG, which does not exist"),
        ("val_0.JPEG\tn09\t0\t0\t1\t1", r"line 7, names the class 'n09'"),
        ("val_0.JPEG", r"line 7, names the class ''"),
    ],
)
def test_a_wrong_annotation_is_named_by_its_line(tmp_path, line, message):
    root = tiny(tmp_path)
    with (root / "val" / "val_annotations.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=message):
        data.load("tiny-imagenet", seed=0, folder=tmp_path, arguments=PART)


def test_no_annotations_at_all_are_refused(tmp_path):
    (tiny(tmp_path) / "val" / "val_annotations.txt").write_text("")
    with pytest.raises(ConfigError, match=r"val_annotations.txt is empty"):
        data.load("tiny-imagenet", seed=0, folder=tmp_path, arguments=PART)


def test_a_file_that_is_no_picture_is_named(tmp_path):
    root = tiny(tmp_path)
    (root / "val" / "images" / "val_0.JPEG").write_bytes(b"no picture")
    splits = data.load("tiny-imagenet", seed=0, folder=tmp_path, arguments=PART)
    with pytest.raises(ConfigError, match=r"val/images/val_0.JPEG cannot be decoded"):
        splits.test.head(1)
