"""What is no batch is refused before a network runs; labels that are no classes once it did."""

import pytest
import torch
from torch import nn

from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify import entry_scores
from deploy_sparse.sparsify.channel_scores import channel_scores
from deploy_sparse.sparsify.imp import dense_masks

X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize("score", ["snip", "grasp", "saliency"])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([X], r"batch 0 is no pair of tensors but Tensor"),
        ([(X, Y), (X,)], r"batch 1 is no pair of tensors but tuple"),
        ([(X, Y.float())], r"batch 0 has labels of shape \[4\] and type torch.float32"),
        ([(X, X)], r"batch 0 has labels of shape \[4, 6\]"),
        ([(X, Y[:3])], r"batch 0 has images of shape \[4, 6\] and 3 labels"),
        ([(X[:0], Y[:0])], r"batch 0 is empty[\s\S]*N of 1 or more"),
        ([(X, Y + 1)], r"labels from 1 to 3 for a network of 3 classes[\s\S]*labels from 0 to 2"),
        ([(X, Y - 1)], r"labels from -1 to 1 for a network of 3 classes"),
    ],
)
def test_what_is_no_batch_is_refused(score, batches, message):
    model = network()
    find = {
        "snip": entry_scores.snip,
        "grasp": entry_scores.grasp,
        "saliency": lambda model, masks, batches: channel_scores("saliency", masks, model=model, batches=batches),
    }[score]
    with pytest.raises(ConfigError, match=message):
        find(model, dense_masks(model), batches)


def test_labels_need_rows_of_logits():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Unflatten(1, (1, 3)))
    with pytest.raises(ConfigError, match=r"a network with output \[4, 1, 3\] for 4 labels"):
        entry_scores.snip(model, dense_masks(model), [(X, Y)])
