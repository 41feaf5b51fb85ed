"""FLOPs by the DST papers' conventions, against their published figures for ResNet-50 on 224×224 images."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse import zoo
from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.distribution import counts, erk
from deploy_sparse.sparsify.flops import Flops, TrainingFlops, flops
from deploy_sparse.surgery.cost import layer_macs

MACS = {"stem": 1000, "conv": 600, "head": 10}


@pytest.fixture(scope="module")
def resnet50():
    """Multiply-accumulates and shapes of torchvision's ResNet-50, by weight; no weight is made."""
    with torch.device("meta"):
        network = zoo.build("torchvision/resnet50").eval()
        macs = layer_macs(network, (torch.zeros(1, 3, 224, 224),))
    return macs, {name: tuple(p.shape) for name, p in network.named_parameters() if name in macs}


def evenly(size, count):
    """``count`` survivors of ``size``, spread evenly."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.arange(count) * size // count] = True
    return mask


@pytest.mark.parametrize(
    ("removed", "published"), [(0.1, 0.871), (0.2, 0.751), (0.3, 0.640), (0.4, 0.538), (0.5, 0.446), (0.6, 0.362)]
)
def test_uniform_internal_widths_of_resnet_50(resnet50, removed, published):
    """Every block's two internal widths lose the same share; fractions of a channel are carried to the next width."""
    macs, shapes = resnet50
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    channels = gone = 0
    for name, shape in shapes.items():
        for layer, reader in ((".conv1.", ".conv2."), (".conv2.", ".conv3.")):
            if layer in name:
                channels += shape[0]
                count = round(removed * channels) - gone
                gone += count
                masks[name][:count] = False
                masks[name.replace(layer, reader)][:, :count] = False
    assert channels == 7552
    found = flops(macs, masks)
    assert found.supported_share == pytest.approx(published, abs=0.001)
    assert found.theoretical == pytest.approx(found.supported)  # whatever is left is full


@pytest.mark.parametrize(("density", "printed"), [(0.2, 0.42), (0.1, 0.24)])
def test_erk_costs_what_rigl_prints_and_no_gpu_gains(resnet50, density, printed):
    macs, shapes = resnet50
    left = counts(shapes, erk(shapes, density))
    masks = {name: evenly(math.prod(shape), left[name]).reshape(shape) for name, shape in shapes.items()}
    found = flops(macs, masks)
    assert found.theoretical_share == pytest.approx(printed, abs=0.007)
    assert found.supported_share == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("density", [0.2, 0.1])
def test_uniform_density_costs_itself_and_what_stays_dense(resnet50, density):
    macs, shapes = resnet50
    masks = {
        name: evenly(math.prod(shape), round(density * math.prod(shape))).reshape(shape)
        for name, shape in shapes.items()
        if name != "conv1.weight"
    }
    stem = macs["conv1.weight"] / sum(macs.values())
    assert flops(macs, masks).theoretical_share == pytest.approx(stem + density * (1 - stem), abs=1e-5)


def test_rows_and_columns_that_are_empty_are_what_a_gpu_saves():
    conv = torch.zeros(4, 6, 3, 3, dtype=torch.bool)
    conv[1, 0, 2, 2] = conv[1, 3, 0, 0] = conv[2, 3] = True  # two of four rows, two of six columns
    head = torch.tensor([[True, False], [False, False]])
    norm = torch.zeros(4, dtype=torch.bool)
    found = flops(MACS, {"conv": conv, "head": head, "bn": norm})
    assert found.dense == 1610
    assert found.theoretical == pytest.approx(1000 + 600 * (2 + 9) / 216 + 10 / 4)
    assert found.supported == pytest.approx(1000 + 600 * (2 / 4) * (2 / 6) + 10 / 4)
    assert found.theoretical_share == found.theoretical / 1610
    assert found.supported_share == found.supported / 1610


def test_without_masks_everything_is_dense():
    assert flops(MACS, {}) == Flops(1610.0, 1610.0, 1610.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 9), st.integers(1, 9), st.sampled_from([(), (3, 3)]))
def test_theoretical_never_exceeds_supported_nor_supported_dense(seed, density, rows, columns, kernel):
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(rows, columns, *kernel, generator=generator) < density for name in ("conv", "head")}
    found = flops(MACS, masks)
    assert 1000 - 1e-9 <= found.theoretical <= found.supported + 1e-9
    assert found.supported <= found.dense == 1610
    counted = sum(MACS[name] * int(mask.sum()) / mask.numel() for name, mask in masks.items())
    assert found.theoretical == pytest.approx(1000 + counted)


def test_masks_of_another_network_are_refused():
    full = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(TicketError, match=r"no mask is of a layer[\s\S]*'hed'[\s\S]*did you mean 'head'"):
        flops(MACS, {"hed": full})
    scale = ~full[:, :, None]  # a parameter of three axes that multiplies channels one by one
    assert flops(MACS, {"head": full, "layer_scale": scale}) == flops(MACS, {})
    assert flops(MACS, {"bias": full[0]}) == flops(MACS, {})


def test_a_network_without_layers_is_refused():
    with pytest.raises(ConfigError, match="does no multiply-accumulate"):
        flops({"unused": 0}, {})


@pytest.mark.parametrize("interval", [1, 100, 1000])
def test_training_costs_what_rigl_says(interval):
    """Evci et al. 2020: (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1) a step, where dense training takes 3 f_D."""
    found = Flops(dense=100.0, theoretical=21.0, supported=80.0)
    spent = TrainingFlops()
    for _ in range(3):
        spent = spent.after(interval, found).after(1, found, dense_gradients=1)
    steps = 3 * (interval + 1)
    assert spent.theoretical / steps == pytest.approx((3 * 21 * interval + 2 * 21 + 100) / (interval + 1))
    assert spent.supported / steps == pytest.approx((3 * 80 * interval + 2 * 80 + 100) / (interval + 1))
    assert spent.dense == 300 * steps
    assert spent.theoretical_share == spent.theoretical / spent.dense
    assert spent.supported_share == spent.supported / spent.dense
    assert spent == TrainingFlops().after(steps, found, dense_gradients=3)


def test_training_follows_masks_that_change():
    early, late = Flops(10.0, 4.0, 10.0), Flops(10.0, 2.0, 5.0)
    spent = TrainingFlops().after(6, early, 2).after(4, late)
    assert spent == TrainingFlops(theoretical=(6 * 3 - 2) * 4 + 2 * 10 + 24, supported=160 + 20 + 60, dense=300)
    assert spent.theoretical_share < 1
    assert TrainingFlops().theoretical_share == TrainingFlops().supported_share == 1


def test_dense_training_costs_the_same_with_and_without_dense_gradients():
    dense = Flops(7.0, 7.0, 7.0)
    assert TrainingFlops().after(5, dense, 5) == TrainingFlops().after(5, dense) == TrainingFlops(105.0, 105.0, 105.0)


@pytest.mark.parametrize(("steps", "dense"), [(2, 3), (2, -1), (-1, 0)])
def test_impossible_numbers_of_dense_gradients_are_refused(steps, dense):
    with pytest.raises(ConfigError, match=f"{dense} dense gradients in {steps} steps"):
        TrainingFlops().after(steps, Flops(1.0, 1.0, 1.0), dense)


def test_a_checkpoint_holds_every_digit():
    spent = TrainingFlops().after(12_345_678, Flops(4089184256.0, 989000123.25, 3.1e9), 12_345)
    stored = spent.to_tensor()
    assert stored.dtype == torch.float64
    assert TrainingFlops.from_tensor(stored) == spent
    assert dataclasses.astuple(spent) == tuple(stored.tolist())
    with pytest.raises(TicketError, match=r"shape \(2,\)"):
        TrainingFlops.from_tensor(stored[:2])
