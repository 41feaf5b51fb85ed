"""BatchNorm statistics measured anew: plain averages over batches, of BatchNorm alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from train_samples import network

from deploy_sparse.errors import ConfigError
from deploy_sparse.train.batchnorm import reestimate_
from deploy_sparse.train.tensors import copy_state


def batches(count, size=4):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(size, 1, 4, 4, generator=generator) for _ in range(count)]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.one_of(st.none(), st.floats(0, 1)))
def test_statistics_are_the_plain_average_over_the_batches(count, size, momentum):
    model, images = network(), batches(count, size)
    model[1].momentum = momentum
    model[1].running_mean.fill_(7.0)  # of an earlier life
    model[1].num_batches_tracked.fill_(9)
    before = copy_state(model)
    reestimate_(model, iter(images))
    with torch.no_grad():
        seen = [model[0](part) for part in images]  # each [size, 4, 4, 4]
    mean = torch.stack([part.mean((0, 2, 3)) for part in seen]).mean(0)
    variance = torch.stack([part.var((0, 2, 3)) for part in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert int(model[1].num_batches_tracked) == count
    assert model[1].momentum == momentum
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_only_batchnorm_is_in_training_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1), nn.InstanceNorm2d(1, track_running_stats=True))
    images = batches(2)
    other = copy_state(model[2])
    reestimate_(model.train(), images)
    torch.testing.assert_close(model[1].running_mean, torch.cat(images).mean((0, 2, 3)))
    assert all(torch.equal(value, other[name]) for name, value in model[2].state_dict().items())


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        (nn.Conv2d(1, 1, 1), batches(1), r"without BatchNorm[\s\S]*leave the re-estimation out"),
        (nn.BatchNorm2d(1, track_running_stats=False), batches(1), r"without BatchNorm"),
        (nn.BatchNorm2d(1), [], r"from no batch of images[\s\S]*at least one batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, images, message):
    with pytest.raises(ConfigError, match=message):
        reestimate_(model, images)
