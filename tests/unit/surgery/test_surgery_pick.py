"""Large tensors are picked from a few rows at a time; the outcome is that of picking at once."""

import pytest
import torch

from deploy_sparse.surgery.narrow import pick
from deploy_sparse.surgery.parts import Cut


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0,), (1,)])
def test_a_large_tensor_loses_the_same_positions(dims):
    tensor = torch.arange(2100 * 2100).reshape(2100, 2100)
    kept = {0: (0, *range(3, 1999, 7), 2099), 1: tuple(range(1, 2100, 3))}
    made = pick(tensor, [Cut("weight", dim, 2100, kept[dim]) for dim in dims])
    expected = tensor
    for dim in dims:
        expected = expected.index_select(dim, torch.tensor(kept[dim]))
    assert torch.equal(made, expected)


def test_a_large_convolution_weight_keeps_its_taps():
    tensor = torch.arange(700 * 700 * 9).reshape(700, 700, 3, 3)
    kept = (1, *range(100, 699))
    assert torch.equal(pick(tensor, [Cut("weight", d, 700, kept) for d in (0, 1)]), tensor[list(kept)][:, list(kept)])
