"""Augmentation moves, mirrors and turns whole images; random crops keep within their picture and their limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from deploy_sparse.data.augment import NUMBERS, augmented
from deploy_sparse.data.draws import Stream, uniforms
from deploy_sparse.data.files import CROP_AREA, CROP_NUMBERS, CROP_SIDES, crop_box
from deploy_sparse.data.splits import Augmentation

NEARLY_ONE = 1 - 2**-53


def numbers(count):
    return uniforms(NUMBERS, Stream.AUGMENTATION, 0, 0, torch.arange(count))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shifts_move_whole_images_by_up_to_the_given_pixels_and_fill_with_zeros(dtype):
    image = torch.arange(1, 13).reshape(1, 3, 4).to(dtype)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    seen = set()
    for moved in augmented(image.expand(400, 1, 3, 4), Augmentation(shift=2), numbers(400)):
        assert moved.dtype == dtype
        moves = [(i, j) for i in range(5) for j in range(5) if torch.equal(padded[:, i : i + 3, j : j + 4], moved)]
        assert moves
        seen.add(moves[0])
    assert len(seen) == 25


def test_flips_mirror_half_of_the_images():
    image = torch.arange(6.0).reshape(1, 2, 3)
    shown = augmented(image.expand(400, 1, 2, 3), Augmentation(flip=True), numbers(400))
    mirrored = sum(torch.equal(one, image.flip(2)) for one in shown)
    assert mirrored + sum(torch.equal(one, image) for one in shown) == 400
    assert 150 < mirrored < 250


@pytest.mark.parametrize("shape", [(2, 5, 5), (1, 4, 4)])
def test_a_quarter_turn_is_exact(shape):
    images = torch.arange(math.prod(shape), dtype=torch.uint8).reshape(1, *shape)
    for angle, turns in ((NEARLY_ONE, 1), (0.0, -1), (0.5, 0)):
        turned = augmented(images, Augmentation(rotation=90.0), torch.tensor([[0, 0, 0, angle]], dtype=torch.float64))
        assert torch.equal(turned, images.rot90(turns, (2, 3)))


def test_rotation_keeps_the_aspect_of_oblong_images():
    images = torch.zeros(1, 1, 9, 17)
    images[0, 0, 4, 5:12] = 1.0  # seven pixels across, through the middle
    upright = torch.zeros(1, 1, 9, 17)
    upright[0, 0, 1:8, 8] = 1.0  # and down
    turned = augmented(images, Augmentation(rotation=90.0), torch.zeros(1, NUMBERS, dtype=torch.float64))
    assert torch.equal(turned, upright)


def test_rotation_stays_within_its_degrees_and_fills_with_zeros():
    images = torch.ones(200, 1, 33, 33)
    images[:, :, 16, 17:] = 2.0  # a hand pointing right
    turned = augmented(images, Augmentation(rotation=20.0), numbers(200))
    angles = []
    for image in turned[:, 0]:
        rows, columns = (image == 2).nonzero().to(torch.float64).sub(16).mean(0)
        angles.append(math.degrees(math.atan2(-rows, columns)))
    assert min(angles) > -21.5
    assert max(angles) < 21.5
    assert min(angles) < -15 < 15 < max(angles)
    assert float(turned.min()) == 0.0


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 600), width=st.integers(1, 600),
    drawn=st.lists(st.floats(0, NEARLY_ONE), min_size=CROP_NUMBERS, max_size=CROP_NUMBERS),
)  # fmt: skip
def test_crops_lie_in_the_picture(height, width, drawn):
    top, left, down, across = crop_box(height, width, drawn)
    assert 0 <= top <= top + down <= height
    assert 0 <= left <= left + across <= width
    assert down * across > 0


def test_crops_are_spread_as_torchvisions():
    rows = uniforms(CROP_NUMBERS, Stream.AUGMENTATION, 0, torch.arange(3000)).tolist()
    ours = torch.tensor([crop_box(375, 500, row) for row in rows], dtype=torch.float64)
    picture = torch.zeros(3, 375, 500)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draw = RandomResizedCrop.get_params
        theirs = torch.tensor([draw(picture, list(CROP_AREA), list(CROP_SIDES)) for _ in rows], dtype=torch.float64)
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        for ours_one, theirs_one in zip(spreads(ours), spreads(theirs), strict=True):
            assert abs(float(ours_one.quantile(share) - theirs_one.quantile(share))) < 0.04


def spreads(boxes):
    """Share of the area, log of the sides' ratio, and the place of the corner as a share of the room for it."""
    top, left, down, across = boxes.T
    return down * across / (375 * 500), (across / down).log(), top / (376 - down), left / (501 - across)


def test_where_no_crop_fits_the_middle_is_taken_with_the_nearest_sides():
    assert crop_box(10, 400, [NEARLY_ONE] * CROP_NUMBERS) == (0, 193, 10, 13)
    assert crop_box(400, 10, [NEARLY_ONE] * CROP_NUMBERS) == (193, 0, 13, 10)


def test_numbers_are_a_function_of_their_key_alone():
    together = uniforms(5, Stream.TASK, 7, torch.arange(100))
    assert torch.equal(together[40:50], uniforms(5, Stream.TASK, 7, torch.arange(40, 50)))
    assert torch.equal(together[:, :3], uniforms(3, Stream.TASK, 7, torch.arange(100)))
    assert len(torch.unique(torch.cat([together, uniforms(5, Stream.TASK, 8, torch.arange(100))]))) == 1000


def test_numbers_are_split_mix_64():
    # with one key part 0 the state is SplitMix64's first output for seed 0, and the numbers its outputs for that state
    mask = 2**64 - 1

    def reference(state, count):
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            yield z ^ (z >> 31)

    first = next(reference(0, 1))
    assert first == 0xE220A8397B1DCDAF  # the published first output
    assert uniforms(4, 0)[0].tolist() == [(word >> 11) * 2.0**-53 for word in reference(first, 4)]


def test_numbers_are_uniform():
    drawn = uniforms(4, Stream.PICTURES, 3, torch.arange(50_000))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn[:, 2].to(torch.float32), 50, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 100  # chi-squared, 49 degrees of freedom
    assert torch.corrcoef(drawn.T).sub(torch.eye(4)).abs().max() < 0.02
