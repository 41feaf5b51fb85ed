"""Compact networks as modules and as files."""

from __future__ import annotations

import re

import pytest
import torch
from surgery_nets import (
    SHAPE,
    Block,
    RandomNet,
    groups_by_name,
    masked,
    outputs,
    randomised,
    rows_masked,
    silent_masks,
    ticket,
)
from torch import nn

import deploy_sparse
from deploy_sparse.errors import ArtifactError, SurgeryError, TicketError
from deploy_sparse.surgery import SurgeryPlan, channel_groups, compact, load_compact
from deploy_sparse.surgery.compact import checked_inputs
from deploy_sparse.surgery.notes import readable
from deploy_sparse.ticket import ModelRef, Ticket

STEPS = [Block("projection", 4), Block("depthwise", 1), Block("concat", 3), Block("chain", 3, padded=False)]
X = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(3))


def factory():
    return RandomNet(STEPS, flatten=True)


@pytest.fixture(scope="module")
def made():
    dense = randomised(factory())
    masks = silent_masks(dense, channel_groups(dense, X), lambda group: [0])
    return ticket(dense, {**masks, **rows_masked(dense, {"hidden.weight": [1, 2]})})  # live biases: a fold as well


@pytest.fixture(scope="module")
def small(made):
    return compact(made, factory)


@pytest.fixture
def saved(small, tmp_path):
    return small, small.save(tmp_path / "small")


def test_module_is_ordinary_smaller_and_in_evaluation_mode(small):
    result = small
    assert type(result.module) is RandomNet
    assert not any(part.training for part in result.module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in result.module.modules())
    assert result.plan.cost_after.parameters < result.plan.cost_before.parameters
    depthwise = result.module.steps[1].body[0]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 3
    for part in result.module.modules():
        if isinstance(part, nn.Conv2d):
            assert part.weight.shape[:2] == (part.out_channels, part.in_channels // part.groups)
        elif isinstance(part, nn.Linear):
            assert part.weight.shape == (part.out_features, part.in_features)
        elif isinstance(part, nn.BatchNorm2d):
            assert part.weight.shape == part.running_var.shape == (part.num_features,)
    assert result.module(X).shape == (4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_gradient_flags_and_random_state_are_kept(dtype):
    def frozen():
        module = RandomNet(STEPS, flatten=True).to(dtype)
        module.stem.requires_grad_(False)
        return module.train()

    dense = randomised(frozen())
    masks = silent_masks(dense, channel_groups(dense, X.to(dtype)), lambda group: [1])
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    result = compact(ticket(dense, masks), frozen)
    assert torch.equal(torch.rand(1), expected)
    assert {p.dtype for p in result.module.parameters()} == {dtype}
    flags = {name: p.requires_grad for name, p in frozen().named_parameters()}
    assert {name: p.requires_grad for name, p in result.module.named_parameters()} == flags


def test_example_inputs_of_the_caller_are_used(made):
    result = compact(made, factory, (X,))
    assert result.parity.inputs[0] == "the example inputs [4, 3, 8, 8]"


def test_ticket_without_input_shape_needs_example_inputs(made):
    bare = Ticket(made.weights, made.masks, ModelRef("user factory"), made.provenance)
    with pytest.raises(SurgeryError, match="does not say the shape of one input sample"):
        compact(bare, factory)
    assert compact(bare, factory, X).module(X).shape == (4, 4)


def test_loaded_network_gives_bit_equal_outputs_without_the_ticket(saved):
    result, folder = saved
    loaded = load_compact(folder, factory)
    assert torch.equal(outputs(loaded, X), outputs(result.module, X))
    assert not any(part.training for part in loaded.modules())
    assert not any(t.is_meta for t in loaded.state_dict().values())
    assert loaded.steps[1].body[0].groups == 3
    assert SurgeryPlan.load(folder) == result.plan


def test_created_biases_come_back(tmp_path):
    def small():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 5, 1, bias=False), nn.Conv2d(5, 2, 1))

    dense = randomised(small())
    masks = {**rows_masked(dense, {"0.weight": [1], "2.weight": [0]})}
    result = compact(ticket(dense, masks), small)
    assert result.module[2].bias.shape == (4,)  # new: it takes up the constant; row 0 was empty and is gone
    loaded = load_compact(result.save(tmp_path / "small"), small)
    assert torch.equal(outputs(loaded, X), outputs(result.module, X))


def test_buffers_outside_the_state_dict_come_from_the_factory(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(3.0), persistent=False)
            self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)) * self.scale)

    dense = randomised(Scaled())
    result = compact(ticket(dense, rows_masked(dense, {"a.weight": [2]})), Scaled)
    loaded = load_compact(result.save(tmp_path / "small"), Scaled)
    assert torch.equal(outputs(loaded, X), outputs(result.module, X))
    assert result.plan.groups[0].kept == (0, 1, 3)


def test_saving_twice_is_a_no_op_and_another_network_never_overwrites(saved):
    result, folder = saved
    assert result.save(folder) == folder
    dense = randomised(factory(), seed=1)
    other = compact(ticket(dense, {}), factory)
    with pytest.raises(ArtifactError, match="already holds another plan"):
        other.save(folder)


def test_truncated_file_is_refused(saved):
    _, folder = saved
    path = folder / "compact.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"compact\.safetensors is damaged: it has \d+ bytes"):
        load_compact(folder, factory)


@pytest.mark.parametrize("name", ["compact.safetensors", "plan.json"])
def test_flipped_bit_is_refused(saved, name):
    _, folder = saved
    data = bytearray((folder / name).read_bytes())
    where = data.index(b'"kept": "') + 9 if name == "plan.json" else len(data) - 5
    data[where] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="is damaged"):
        load_compact(folder, factory)


def test_ticket_folder_is_no_compact_network(made, tmp_path):
    made.save(tmp_path / "ticket")
    with pytest.raises(ArtifactError, match=r"ticket.* not .*plan"):
        load_compact(tmp_path / "ticket", factory)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RandomNet(STEPS[:1], flatten=True),
        lambda: RandomNet([*STEPS, Block("max", 1)], flatten=False),
        lambda: RandomNet([Block("projection", 9), *STEPS[1:]], flatten=True),
        lambda: nn.Linear(3, 2),
    ],
)
def test_factory_of_another_architecture_is_refused(saved, wrong):
    _, folder = saved
    with pytest.raises(SurgeryError, match="pass the factory of that network"):
        load_compact(folder, wrong)


def test_factory_with_other_uncut_layers_is_refused_by_name(tmp_path):
    def small(classes=2):
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, classes, 1))

    result = compact(ticket(randomised(small()), {}), small)
    folder = result.save(tmp_path / "small")
    with pytest.raises(SurgeryError, match=r"'2\.weight' is saved with shape \(2, 4, 1, 1\), the narrowed network has"):
        load_compact(folder, lambda: small(3))


def test_ticket_for_another_architecture_is_refused(made):
    with pytest.raises(TicketError, match="the ticket is for another architecture"):
        compact(made, lambda: RandomNet(STEPS[:1], flatten=True))


def test_not_a_number_is_refused(made):
    weights = {name: tensor.clone() for name, tensor in made.weights.items()}
    weights["fc.bias"][0] = torch.nan
    with pytest.raises(TicketError, match=r"'fc\.bias' has 1 entries that are NaN"):
        compact(Ticket(weights, made.masks, made.model, made.provenance), factory)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (nn.Linear(2, 2), "an instance of Linear"),
        (lambda: None, "one that returns None"),
        (lambda: 3, "one that returns int"),
        (None, "None"),
        (nn.Linear, "which needs arguments"),
    ],
)
def test_what_is_no_factory_is_refused_in_one_way(saved, made, given, said):
    text = rf"factory must be a function without arguments that returns the dense nn\.Module; got .*{said}"
    with pytest.raises(SurgeryError, match=text):
        compact(made, given)
    with pytest.raises(SurgeryError, match=text):
        load_compact(saved[1], given)


@pytest.mark.parametrize(("weights", "given"), [("float64", "float32"), ("float16", "float32"), ("float32", "float64")])
def test_inputs_of_another_precision_than_the_weights_are_named(weights, given):
    def small():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).to(getattr(torch, weights))

    made = ticket(randomised(small()), {})
    with pytest.raises(SurgeryError) as caught:
        compact(made, small, X.to(getattr(torch, given)))
    assert caught.value.given == f"the example inputs are {given}, the weights {weights}"
    assert f"example_inputs.to(torch.{weights})" in str(caught.value)


def test_resnet18_with_half_of_every_free_group_masked():
    models = pytest.importorskip("torchvision.models")

    def resnet():
        return models.resnet18(weights=None, num_classes=10)

    dense = randomised(resnet())
    shape = (3, 32, 32)
    groups = channel_groups(dense, torch.zeros(2, *shape))
    assert [g.pinned for g in groups] == [None] * 12 + ["network output"]
    stream = groups_by_name(dense, shape)["conv1.weight"]
    assert [p.weight.name for p in stream.producers] == [
        "conv1.weight",
        "layer1.0.conv2.weight",
        "layer1.1.conv2.weight",
    ]
    half = silent_masks(dense, groups, lambda group: range(0, group.size, 2))
    made = ticket(dense, half, shape)
    result = compact(made, resnet)
    assert all(len(g.kept) == g.size // 2 for g in result.plan.groups[:-1])
    assert 0.25 < result.plan.cost_after.macs / result.plan.cost_before.macs < 0.3
    assert result.parity.float64.max_rel < 1e-12
    x = torch.randn(2, *shape, dtype=torch.float64)
    reference, output = outputs(masked(resnet, made).double(), x), outputs(result.module.double(), x)
    assert torch.allclose(output, reference, rtol=0, atol=1e-12 * float(reference.abs().max()))


def test_it_prints_as_one_line(small, made):
    before, after = small.plan.cost_before, small.plan.cost_after
    assert repr(small) == (
        f"Compact(RandomNet, {before.parameters:,} → {after.parameters} parameters, "
        f"{readable(before.macs)} → {readable(after.macs)} MACs)"
    )
    assert repr(made).startswith(
        f"Ticket(user factory, {len(made.masks)} of {len(made.weights)} tensors masked, density "
    )
    assert "\n" not in repr(made)


def test_the_program_may_be_left_out(small, tmp_path):
    folder = small.save(tmp_path / "small", program=False)
    assert {path.name for path in folder.iterdir()} == {"plan.json", "compact.safetensors"}
    with pytest.raises(ArtifactError, match=r"holds no compact\.pt2"):
        deploy_sparse.load_program(folder)
    assert torch.equal(outputs(load_compact(folder, factory), X), outputs(small.module, X))


def test_the_program_loads_without_the_factory(saved):
    result, folder = saved
    assert torch.allclose(deploy_sparse.load_program(folder)(X), outputs(result.module, X), atol=1e-5)


@pytest.mark.parametrize("dim", [2, 3])
def test_channels_last_comes_back(tmp_path, dim):
    conv, layout = ((nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d))[dim - 2]

    def net():
        return nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 6, 1), nn.ReLU(), conv(6, 2, 2)).to(memory_format=layout)

    x = torch.randn(2, 3, *[6] * dim)
    masks = rows_masked(net(), {"0.weight": [1]})
    result = compact(ticket(randomised(net()), masks, tuple(x.shape[1:])), net, x)
    with torch.no_grad():  # both memory formats at once by its shape; some code asks for the strides
        weight = result.module[2].weight
        weight.set_(torch.empty_like(weight, memory_format=layout).copy_(weight))
    loaded = load_compact(result.save(tmp_path / "small", program=False), net)
    strides = {name: t.stride() for name, t in result.module.state_dict().items()}
    assert not result.module[4].weight.is_contiguous()
    assert {name: t.stride() for name, t in loaded.state_dict().items()} == strides
    assert torch.equal(outputs(loaded, x), outputs(result.module, x))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)

    def forward(self, x, *, scale):
        return self.a(x) * scale


@pytest.mark.parametrize(
    ("module", "given", "said", "cure"),
    [
        (nn.Conv2d(3, 4, 1), {"x": X}, "example_inputs is a dict", "by position"),
        (nn.Conv2d(3, 4, 1), "images", "example_inputs is str", "pass tensors"),
        (nn.Conv2d(3, 4, 1), X.numpy(), "example_inputs is ndarray", r"torch\.as_tensor\(array\)"),
        (nn.Conv2d(3, 4, 1), X[:0], r"a batch of 0 samples, of shape \[0, 3, 8, 8\]", "two samples or more"),
        (nn.Conv2d(3, 4, 1), (X, X), r"Conv2d does not accept these inputs .*too many positional", "by position"),
        (Named(), X, "missing a required .*'scale'", "keyword-only"),
    ],
    ids=["dict", "text", "array", "empty", "too many", "keyword"],
)
def test_inputs_that_no_weights_could_help_are_refused_by_kind(module, given, said, cure):
    made = ticket(module, rows_masked(module, {next(iter(module.state_dict())): [0]}))
    for call in (lambda: compact(made, lambda: module, given), lambda: deploy_sparse.oneshot_ticket(module, given)):
        with pytest.raises(SurgeryError, match=said) as caught:
            call()
        assert re.search(cure, caught.value.fix)


def test_arguments_that_hooks_add_are_not_missed():
    def net():
        module = Named()
        module.register_forward_pre_hook(lambda _, args, kwargs: (args, {"scale": 2.0}), with_kwargs=True)
        return module

    assert checked_inputs(X, net()) == (X,)
