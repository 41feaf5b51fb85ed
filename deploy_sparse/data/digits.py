"""scikit-learn's handwritten digits: 1,797 real 8×8 images, ten classes, shipped with the library (no download)."""

from __future__ import annotations

import numpy as np
import torch
from sklearn import datasets
from sklearn.model_selection import train_test_split

from .splits import Description, Split, Splits

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.15


def load_digits(description: Description, seed: int) -> Splits:
    """Stratified train / validation / test splits; images ``[N, 1, 8, 8]``, normalised by the training split."""
    images, labels = datasets.load_digits(return_X_y=True)
    everything = np.arange(len(labels))
    rest, test = train_test_split(everything, test_size=TEST_SHARE, random_state=seed, stratify=labels)
    train, validation = train_test_split(
        rest, test_size=VALIDATION_SHARE / (1 - TEST_SHARE), random_state=seed, stratify=labels[rest]
    )
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)  # [N, 64] -> [N, 1, 8, 8]
    mean, deviation = pixels[train].mean(), pixels[train].std()
    pixels = (pixels - mean) / deviation
    targets = torch.tensor(labels, dtype=torch.int64)
    parts = {
        name: Split(pixels[part], targets[part])
        for name, part in (("train", train), ("validation", validation), ("test", test))
    }
    return Splits(
        "digits", description.classes, description.image_shape, **parts, augmentation=description.augmentation
    )
