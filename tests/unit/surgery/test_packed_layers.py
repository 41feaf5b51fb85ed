"""Packed layers compute what the masked dense layer computes, and train like it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_samples import dense_conv, dense_linear, difference, mask_of, masked_, packing, packings
from torch import nn
from torch.nn.utils import parametrizations

from deploy_sparse.errors import SurgeryError
from deploy_sparse.surgery.packed import PackedConv2d, PackedLinear, packing_of

EXACT = 1e-12

# One of every form, with rows in no block and padding where the form has it.
DISJOINT = packing(7, 5, (3, 3), "disjoint", [((1, 4, 6), (0, 3)), ((0, 2, 5), (1, 4))])
EQUAL = packing(8, 6, (3, 3), "equal", [((1, 4, 6), (0, 3, 5)), ((0, 2, 5, 7), (1, 3))], tile=4)
FREE = packing(7, 6, (3, 3), "free", [((1, 4, 6), (0, 3, 5)), ((0, 2), (1, 3))], tile=4)
POSITIONS = dataclasses.replace(FREE, form="positions")
CONVS = {"disjoint": DISJOINT, "equal": EQUAL, "free": FREE, "positions": POSITIONS}


def linear_form(found):
    """The packing of the same channels of a Linear."""
    blocks = tuple(
        dataclasses.replace(block, columns=tuple(column // 9 for column in block.columns[::9]))
        for block in found.blocks
    )
    return dataclasses.replace(found, kernel=(), blocks=blocks)


LINEARS = {name: linear_form(found) for name, found in CONVS.items() if name != "positions"}
LINEARS["straight"] = packing(4, 6, (), "free", [((0, 1), (0, 3, 5)), ((2, 3), (1, 3))], tile=4)
LAYERS = [
    *(pytest.param(PackedConv2d, dense_conv, found, id=f"conv-{name}") for name, found in CONVS.items()),
    *(pytest.param(PackedLinear, dense_linear, found, id=f"linear-{name}") for name, found in LINEARS.items()),
]


def example(found, dtype=torch.float64, seed=1):
    rng = torch.Generator().manual_seed(seed)
    shape = (2, found.in_channels, 6, 5) if found.kernel else (2, 3, found.in_channels)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


@st.composite
def conv_options(draw):
    padding = draw(
        st.one_of(st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("same"), st.just("valid"))
    )
    sizes = st.one_of(st.integers(1, 2), st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return {
        "padding": padding,
        "stride": 1 if padding == "same" else draw(sizes),
        "dilation": draw(st.one_of(st.integers(1, 2), st.tuples(st.integers(1, 2), st.integers(1, 2)))),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "bias": draw(st.booleans()),
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own layer copies its input
@settings(max_examples=100, deadline=None)
@given(packings(), conv_options(), st.integers(5, 9), st.integers(5, 9), st.booleans())
def test_convolution_equals_the_masked_one(found, options, height, width, batched):
    dense = dense_conv(found, **options)
    packed = PackedConv2d.of(dense, found)
    masked_(dense, found)
    x = torch.randn(2, found.in_channels, height, width, dtype=torch.float64)
    x = x if batched else x[0]
    assert difference(packed(x), dense(x)) <= EXACT
    with torch.no_grad():
        assert difference(packed(x), dense(x)) <= EXACT
    assert torch.equal(packed.unpack(), dense.weight)


@settings(max_examples=60, deadline=None)
@given(packings(linear=True), st.booleans(), st.sampled_from([(), (3,), (2, 3), (2, 1, 3), (1, 2, 2, 2)]))
def test_linear_equals_the_masked_one(found, bias, shape):
    dense = dense_linear(found, bias=bias)
    packed = PackedLinear.of(dense, found)
    masked_(dense, found)
    x = torch.randn(*shape, found.in_channels, dtype=torch.float64)
    assert difference(packed(x), dense(x)) <= EXACT
    with torch.no_grad():
        assert difference(packed(x), dense(x)) <= EXACT
    assert torch.equal(packed.unpack(), dense.weight)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("found", LINEARS.values(), ids=LINEARS)
def test_linear_of_nothing(found, shape):
    layer = PackedLinear.of(dense_linear(found), found)
    assert layer(torch.ones(*shape, found.in_channels, dtype=torch.float64)).shape == (*shape, found.out_channels)


@settings(max_examples=60, deadline=None)
@given(st.booleans().flatmap(lambda linear: packings(linear=linear, forms=("disjoint",), orders=True)), st.booleans())
def test_orders_left_to_the_neighbours(found, bias):
    make, kind = (dense_conv, PackedConv2d) if found.kernel else (dense_linear, PackedLinear)
    dense = make(found, bias=bias)
    packed = kind.of(dense, found)
    masked_(dense, found)
    x = example(found) if not found.kernel else torch.randn(2, found.in_channels, 5, 6, dtype=torch.float64)
    axis = 1 if found.kernel else -1
    wanted = dense(x) if found.restore else dense(x).index_select(axis, torch.tensor(found.rows))
    given_x = x if found.gather else x.index_select(axis, torch.tensor(found.columns))
    assert difference(packed(given_x), wanted) <= EXACT
    assert torch.equal(packed.unpack(), dense.weight)
    assert (packed.unpack_bias() is None) if dense.bias is None else torch.equal(packed.unpack_bias(), dense.bias)


@settings(max_examples=30, deadline=None)
@given(packings(forms=("free", "equal")), st.integers(1, 16))
def test_any_mask_of_blocks_is_packed(found, tile):
    """Each block repeated until it has the rows that make it one."""
    taps = found.taps
    mask = mask_of(found).repeat_interleave(8, dim=0)
    again = packing_of(mask, tile=tile)
    assert torch.equal(mask_of(again), mask)
    dense = nn.Conv2d(found.in_channels, len(mask), found.kernel, dtype=torch.float64)
    packed = PackedConv2d.of(dense, again)
    masked_(dense, again)
    x = torch.randn(1, found.in_channels, 4, 4, dtype=torch.float64)
    assert difference(packed(x), dense(x)) <= EXACT
    assert all(column % taps == 0 for block in again.blocks for column in block.columns[::taps])


@pytest.mark.parametrize(("kind", "make", "found"), LAYERS)
def test_training_follows_the_masked_layer(kind, make, found):
    """Two steps with momentum: the same weights in the blocks, nothing outside, and none in the padding."""
    dense = make(found)
    packed = kind.of(dense, found).train()
    masked_(dense, found)
    mask, x = mask_of(found), example(found)
    target = torch.randn_like(dense(x))
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for layer in (packed, dense)
    ]
    for _ in range(2):
        for layer, optimizer in zip((packed, dense), optimizers, strict=True):
            optimizer.zero_grad()
            inputs = x.clone().requires_grad_()
            (layer(inputs) - target).square().mean().backward()
            if layer is packed:
                gradient = inputs.grad
            else:
                assert difference(gradient, inputs.grad) <= EXACT
                layer.weight.grad.mul_(mask)
            optimizer.step()
    assert difference(packed.unpack(), dense.weight) <= EXACT
    assert difference(packed.unpack_bias(), dense.bias) <= EXACT
    assert not packed.unpack()[~mask].any()
    assert all(parameter.grad is not None for parameter in packed.parameters())
    with torch.no_grad():  # which computes with the padding as it is
        assert difference(packed(x), dense(x)) <= EXACT


@pytest.mark.parametrize(("kind", "make", "found"), LAYERS)
def test_state_dict_through_a_shell(kind, make, found):
    dense = make(found).eval()
    packed = kind.of(dense, found)
    shell = kind.shell(dense, found)
    assert {x.device.type for x in (*shell.parameters(), *shell.buffers())} == {"meta"}
    assert not shell.training
    assert shell.extra_repr() == packed.extra_repr()
    shape = shell(example(found).to("meta")).shape
    shell.load_state_dict(shell.state_dict(), strict=True, assign=True)  # without memory there is nothing to compare
    shell.load_state_dict(packed.state_dict(), strict=True, assign=True)
    assert torch.equal(shell(example(found)), packed(example(found)))
    assert shape == packed(example(found)).shape
    filled = kind.shell(dense, found, device="cpu")
    assert not filled(example(found)).any()
    filled.load_state_dict(packed.state_dict())
    assert torch.equal(filled.unpack(), packed.unpack())


@pytest.mark.parametrize(("kind", "make", "found"), LAYERS)
def test_state_dict_of_another_packing_is_refused(kind, make, found):
    state = kind.of(make(found), found).state_dict()
    other = dataclasses.replace(found, blocks=(*found.blocks[1:], found.blocks[0]))
    if found.form == "free":  # equal sizes, so that only the indices tell
        first, second = found.blocks
        moved = tuple(sorted({*first.rows[1:], second.rows[0]})), tuple(sorted({*second.rows[1:], first.rows[0]}))
        other = dataclasses.replace(
            found,
            blocks=tuple(dataclasses.replace(b, rows=rows) for b, rows in zip(found.blocks, moved, strict=True)),
        )
    with pytest.raises(
        SurgeryError, match=r"the state dict's '(columns|rows)' is of another packing\n  expected: the order of"
    ):
        kind.shell(make(other), other).load_state_dict(state, assign=True)


def test_state_dict_names_the_layer_and_is_strict():
    layer = PackedConv2d.of(dense_conv(DISJOINT), DISJOINT)
    network = nn.Sequential(nn.ReLU(), layer)
    state = network.state_dict()
    assert list(state) == ["1.weight", "1.bias", "1.columns", "1.rows", "1.places"]
    assert state["1.weight"].shape == (6, 2, 3, 3)
    for missing in state:
        with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
            network.load_state_dict({name: x for name, x in state.items() if name != missing})
    with pytest.raises(SurgeryError, match=r"the state dict's '1\.columns'"):
        network.load_state_dict({**state, "1.columns": state["1.columns"].flip(0)})
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.weight"):
        network.load_state_dict({**state, "1.weight": torch.zeros(3, 2, 3, 3)})


@pytest.mark.parametrize(("found", "name"), [(EQUAL, "weight"), (FREE, "weights.1"), (POSITIONS, "weights.1")])
def test_weights_in_the_padding_are_refused(found, name):
    layer = PackedConv2d.of(dense_conv(found), found)
    state = {key: x.clone() for key, x in layer.state_dict().items()}
    state[name][-1, -1] = 1.0
    with pytest.raises(SurgeryError, match="weights other than zero in the padding"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(("kind", "make", "found"), LAYERS)
def test_copies_are_independent(kind, make, found):
    packed = kind.of(make(found), found)
    twin, x = copy.deepcopy(packed), example(found)
    before = packed(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert torch.equal(packed(x), before)
    assert difference(twin(x), 2 * before) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "make", "found"), LAYERS)
def test_floating_types(kind, make, found, dtype):
    dense = make(found)
    packed = kind.of(dense, found).to(dtype)
    masked_(dense, found)
    y = packed(example(found, dtype))
    assert y.dtype == dtype
    assert packed.columns.dtype == torch.int64
    assert difference(y, dense(example(found))) <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("found", CONVS.values(), ids=CONVS)
def test_channels_last(found):
    dense = dense_conv(found, padding=1)
    packed = PackedConv2d.of(dense, found).to(memory_format=torch.channels_last)
    masked_(dense, found)
    x = example(found)
    assert difference(packed(x.to(memory_format=torch.channels_last)), dense(x)) <= EXACT
    assert torch.equal(packed.unpack(), dense.weight)


@pytest.mark.parametrize(("kind", "make", "found"), LAYERS)
def test_exported_program(kind, make, found):
    packed, x = kind.of(make(found), found), example(found)
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            program = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            assert difference(program.module()(torch.cat([x, x])), packed(torch.cat([x, x]))) <= EXACT


def test_what_is_frozen_stays_frozen():
    dense = dense_conv(FREE)
    dense.weight.requires_grad_(False)
    packed = PackedConv2d.of(dense, FREE)
    assert {name: p.requires_grad for name, p in packed.named_parameters()} == {
        "bias": True,
        "weights.0": False,
        "weights.1": False,
    }


def test_pack_from_tensors():
    weight, bias = torch.randn(7, 6, 3, 3), torch.randn(7)
    packed = PackedConv2d.pack(weight, bias, FREE, stride=2, padding=(1, 0), dilation=1, padding_mode="reflect")
    assert (packed.stride, packed.padding, packed.dilation, packed.padding_mode) == ((2, 2), (1, 0), (1, 1), "reflect")
    assert torch.equal(packed.unpack(), weight * mask_of(FREE))
    assert torch.equal(packed.unpack_bias(), bias)
    assert PackedLinear.pack(torch.randn(7, 5), None, LINEARS["disjoint"]).unpack_bias() is None


def test_texts():
    dense = dense_conv(DISJOINT, stride=2, padding=1, padding_mode="circular")
    assert PackedConv2d.of(dense, DISJOINT).extra_repr() == (
        "5, 7, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), padding_mode=circular, "
        "disjoint: 2 blocks of 3×2, gather, restore"
    )
    straight = LINEARS["straight"]
    assert PackedLinear.of(dense_linear(straight), straight).extra_repr() == (
        "in_features=6, out_features=4, free: 2 blocks of 2×4, gather"
    )
    many = packing(8, 4, (1, 1), "free", [((i, i + 4), range(i + 1)) for i in range(4)])
    assert "4 blocks of 2×1, 2×2, 2×3, …, gather, restore" in PackedConv2d.of(dense_conv(many), many).extra_repr()


def normed():
    return parametrizations.weight_norm(nn.Conv2d(5, 7, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: PackedConv2d.of(nn.Conv2d(6, 7, 3), DISJOINT),
            r"a weight of shape \[7, 6, 3, 3\](.|\n)*\[7, 5, 3, 3\]",
        ),
        (lambda: PackedConv2d.shell(nn.Conv2d(6, 7, 3), DISJOINT), r"a weight of shape \[7, 6, 3, 3\]"),
        (lambda: PackedConv2d.pack(torch.ones(7, 5, 3, 3), torch.ones(6), DISJOINT), r"and a bias of shape \[6\]"),
        (
            lambda: PackedConv2d.of(nn.Conv2d(10, 10, 3, groups=2), DISJOINT),
            r"groups=2(.|\n)*plain torch.nn.Conv2d with groups=1",
        ),
        (lambda: PackedConv2d.of(nn.Linear(5, 7), DISJOINT), "expected: a plain torch.nn.Conv2d"),
        (lambda: PackedConv2d.of(normed(), DISJOINT), "remove parametrizations"),
        (lambda: PackedLinear.of(nn.Bilinear(5, 5, 7), LINEARS["disjoint"]), "expected: a plain torch.nn.Linear\n"),
        (lambda: PackedLinear(DISJOINT), "a packing with a kernel of"),
        (lambda: PackedConv2d(LINEARS["disjoint"]), "the packing of a Linear for a Conv2d"),
        (lambda: PackedConv2d(DISJOINT, padding_mode="zero"), "padding_mode='zero' .did you mean 'zeros'"),
        (lambda: PackedConv2d(DISJOINT, padding="same", stride=2), "padding='same' with stride="),
        (lambda: PackedConv2d(DISJOINT, padding="full"), "padding='full'"),
        (lambda: PackedConv2d(DISJOINT, padding=-1), "padding=.-1, -1. .from 0 on"),
        (lambda: PackedConv2d(DISJOINT, stride=0), "stride=.0, 0. and dilation="),
        (
            lambda: PackedConv2d(DISJOINT)(torch.ones(1, 8, 4, 4)),
            r"an input of shape \[1, 8, 4, 4\](.|\n)*with 5 channels",
        ),
        (lambda: PackedLinear(LINEARS["free"])(torch.ones(2, 8)), r"an input of shape \[2, 8\](.|\n)*6 channels"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(SurgeryError, match=message):
        call()


@pytest.mark.parametrize("size", [(2, 6), (6, 2), (1, 1)])
def test_positions_refuse_inputs_smaller_than_the_kernel(size):
    layer = PackedConv2d(POSITIONS)
    with pytest.raises(SurgeryError, match=r"padding included[\s\S]*at least the extent of the 3 × 3 kernel"):
        layer(torch.randn(2, 6, *size))
    assert layer(torch.randn(2, 6, 3, 3)).shape == (2, 7, 1, 1)
