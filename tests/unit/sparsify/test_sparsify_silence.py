"""Silence: a dropped channel is zero everywhere, so that what reads it may hold any weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy_sparse.sparsify.silence import silence
from deploy_sparse.structure import ChannelGroup, Producer, Slice
from deploy_sparse.surgery.graph import channel_groups


class Net(nn.Module):
    """Chain with biases and norms, a residual stream, a depthwise convolution, and a flattened classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a, self.norm1 = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.b, self.norm2 = nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6)
        self.after = nn.BatchNorm2d(6)
        self.depthwise, self.norm3 = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.hidden, self.fc = nn.Linear(6 * 4, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = torch.relu(self.norm0(self.stem(x)))
        x = torch.relu(self.after(x + self.norm2(self.b(torch.relu(self.norm1(self.a(x)))))))
        x = torch.relu(self.norm3(self.depthwise(x)))
        return self.fc(torch.relu(self.hidden(x.flatten(1))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2) if name.endswith("var") else tensor.normal_()
    return model, channel_groups(model, (torch.zeros(2, 2, 2, 2),))


def outputs(model, tensors):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 2, 2, 2, generator=generator)
    return torch.func.functional_call(model, tensors, (images,)).detach()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_whatever_reads_a_dropped_channel_does_not_matter(net, data):
    model, groups = net
    masks = {}
    for name in ("stem", "a", "b", "hidden"):
        weight = model.get_parameter(f"{name}.weight")
        alive = data.draw(st.lists(st.booleans(), min_size=len(weight), max_size=len(weight)))
        rows = torch.tensor(alive).reshape(-1, *[1] * (weight.dim() - 1))
        masks[f"{name}.weight"] = rows.expand_as(weight)
    found = silence(masks, model.state_dict(), groups)
    state = model.state_dict()
    masked = {name: state[name] * mask for name, mask in found.items()}
    # the masks of what reads channels are taken back, and the columns hold something else entirely
    loose = dict(masked)
    for group in groups:
        for reader in group.consumers:
            columns = (~found[reader.name]).flatten(1).all(dim=0) if reader.name in found else torch.zeros(1).bool()
            if bool(columns.any()):
                changed = loose[reader.name].flatten(1).clone()
                changed[:, columns] = 7.0
                rows = found[reader.name].flatten(1).any(dim=1, keepdim=True)
                loose[reader.name] = (changed * rows).reshape(state[reader.name].shape)
    torch.testing.assert_close(outputs(model, loose), outputs(model, masked), rtol=1e-5, atol=1e-5)


def test_everything_of_a_dropped_channel_is_masked(net):
    model, groups = net
    masks = {f"{n}.weight": torch.ones_like(model.get_parameter(f"{n}.weight")) > 0 for n in ("stem", "a", "b")}
    masks["a.weight"][3] = False
    masks["stem.weight"][[1, 2]] = False
    masks["b.weight"][[2, 4]] = False  # channel 2 of the stream is dropped by both of its writers
    found = silence(masks, model.state_dict(), groups)
    dropped = {name: (~mask).nonzero().flatten().tolist() for name, mask in found.items() if mask.dim() == 1}
    assert dropped == {
        "a.bias": [3], "norm1.weight": [3], "norm1.bias": [3],
        "stem.bias": [1, 2], "norm0.weight": [1, 2], "norm0.bias": [1, 2],
        "b.bias": [2, 4], "norm2.weight": [2, 4], "norm2.bias": [2, 4],
        "after.weight": [2], "after.bias": [2],
        "depthwise.bias": [2], "norm3.weight": [2], "norm3.bias": [2],
    }  # fmt: skip
    assert (~found["depthwise.weight"].flatten(1).any(dim=1)).nonzero().flatten().tolist() == [2]
    assert (~found["b.weight"].flatten(1).any(dim=0)).nonzero().flatten().tolist() == [3]
    assert (~found["a.weight"].any(dim=0).flatten(1).any(dim=1)).nonzero().flatten().tolist() == [2]
    assert (~found["hidden.weight"].any(dim=0)).nonzero().flatten().tolist() == [8, 9, 10, 11]  # 4 positions a channel


def test_rows_that_lose_their_last_column_are_dropped_in_turn():
    groups = [
        ChannelGroup("a", 2, (Producer(Slice("a", 0, (0, 1))),), consumers=(Slice("b", 1, (0, 1)),)),
        ChannelGroup("b", 2, (Producer(Slice("b", 0, (0, 1)), Slice("bias", 0, (0, 1))),), consumers=(Slice("c", 1, (0, 1)),)),
    ]  # fmt: skip
    weights = {"a": torch.ones(2, 3), "b": torch.ones(2, 2), "bias": torch.ones(2), "c": torch.ones(4, 2)}
    masks = {"a": torch.tensor([[True] * 3, [False] * 3]), "b": torch.tensor([[True, True], [False, True]])}
    for order in (groups, groups[::-1]):
        found = silence(masks, weights, order)
        assert found["b"].tolist() == [[True, False], [False, False]]
        assert found["bias"].tolist() == [True, False]
        assert found["c"][0].tolist() == [True, False]


def test_pinned_groups_and_dense_writers_are_left_alone():
    rows = Producer(Slice("a", 0, (0, 1)), Slice("bias", 0, (0, 1)))
    reader = Slice("b", 1, (0, 1))
    weights = {"a": torch.ones(2, 3), "bias": torch.ones(2), "b": torch.ones(4, 2)}
    masks = {"a": torch.tensor([[True] * 3, [False] * 3])}
    assert set(silence(masks, weights, [ChannelGroup("a", 2, (rows,), consumers=(reader,), pinned="why")])) == {"a"}
    other = Producer(Slice("dense", 0, (0, 1)))
    found = silence(masks, weights, [ChannelGroup("a", 2, (rows, other), consumers=(reader,))])
    assert set(found) == {"a", "bias"}


def test_the_given_masks_are_not_changed():
    masks = {"a": torch.tensor([[True], [False]]), "b": torch.ones(2, 2) > 0}
    group = ChannelGroup("a", 2, (Producer(Slice("a", 0, (0, 1))),), consumers=(Slice("b", 1, (0, 1)),))
    found = silence(masks, {"a": torch.ones(2, 1), "b": torch.ones(2, 2)}, [group])
    assert bool(masks["b"].all())
    assert not bool(found["b"].all())
