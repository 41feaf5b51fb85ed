"""Inputs and networks that cannot be meant are refused in the same words, whatever is called."""

from __future__ import annotations

import re

import pytest
import torch
from small_networks import ticket_without
from torch import nn

from deploy_sparse import oneshot_ticket
from deploy_sparse.errors import SurgeryError
from deploy_sparse.surgery import channel_groups, compact, plan_from_ticket

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.c(torch.relu(self.a(x))).mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.c(torch.relu(self.a(x)))


class Scaling(Network):
    def forward(self, x):
        return super().forward(x.float() / 255)


class Named(Network):
    def forward(self, x, *, scale):
        return super().forward(x) * scale


CALLS = {
    "compact": lambda factory, x: compact(ticket_without(factory(), {"a.weight": [1]}), factory, x),
    "plan": lambda factory, x: plan_from_ticket(ticket_without(factory(), {"a.weight": [1]}), factory(), x),
    "groups": lambda factory, x: channel_groups(factory(), x),
    "oneshot": lambda factory, x: oneshot_ticket(factory(), x),
}
BYTES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
REFUSED = {
    "bytes": (Network, BYTES, r"inputs are uint8 of shape \[2, 3, 8, 8\].*weights in float32", r"float32\) / 255$"),
    "counts": (Network, BYTES.long(), r"inputs are int64 of shape \[2, 3, 8, 8\].*in float32", r"torch\.float32\)$"),
    "truths": (Network, BYTES.bool(), r"inputs are bool of shape \[2, 3, 8, 8\].*in float32", r"torch\.float32\)$"),
    "rows": (Tokens, torch.ones(2, 3, dtype=torch.int64), r"inputs are int64 of shape \[2, 3\]", r"torch\.float32\)$"),
    "bytes the other way round": (
        Network,
        BYTES.permute(0, 2, 3, 1),
        r"does not accept these inputs \(\[2, 8, 8, 3\] of uint8\)",
        "mend the shape",
    ),
    "dict": (Network, {"x": X}, "example_inputs is a dict", "by position"),
    "array": (Network, X.numpy(), "example_inputs is ndarray", r"torch\.as_tensor"),
    "nothing": (Network, None, "example_inputs is None", "pass tensors"),
    "no samples": (Network, X[:0], "a batch of 0 samples", "two samples"),
    "too many": (Network, (X, X), "Network does not accept these inputs .*too many positional", "by position"),
    "keyword": (Named, X, "missing a required .*'scale'", "keyword-only"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", REFUSED)
def test_inputs_are_refused_in_the_same_words_everywhere(what, call):
    factory, given, said, cure = REFUSED[what]
    if (what, call) == ("nothing", "compact"):
        said, cure = "the ticket does not say the shape", "pass example_inputs"
    with pytest.raises(SurgeryError) as caught:
        CALLS[call](factory, given)
    assert re.search(said, caught.value.given)
    assert re.search(cure, caught.value.fix)


def test_images_as_floating_numbers_are_asked_for():
    with pytest.raises(SurgeryError, match="expected: floating numbers, scaled and normalised as in training"):
        channel_groups(Network(), BYTES)
    with pytest.raises(SurgeryError, match="for images, as floating numbers"):
        channel_groups(Network(), BYTES.permute(0, 2, 3, 1))


@pytest.mark.parametrize("call", ["compact", "plan", "groups"])
def test_a_network_that_scales_bytes_itself_takes_them(call):
    assert CALLS[call](Scaling, BYTES)


class Lazy(Network):
    def __init__(self):
        super().__init__()
        self.c = nn.LazyConv2d(4, 1)


@pytest.mark.parametrize("call", [channel_groups, oneshot_ticket])
def test_lazy_layers_that_never_ran_are_named(call):
    with pytest.raises(SurgeryError, match=r"'c\.weight' has no shape yet: it belongs to a lazy layer"):
        call(Lazy(), X)
    ran = Lazy()
    ran(X)
    assert call(ran, X)


class Scripted(Network):
    def __init__(self):
        super().__init__()
        self.c = torch.jit.trace(nn.Conv2d(6, 4, 1), torch.zeros(1, 6, 8, 8))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("call", [channel_groups, oneshot_ticket])
def test_torchscript_is_named(call):
    with pytest.raises(SurgeryError, match="cannot be traced: layer 'c' is a TorchScript module"):
        call(Scripted(), X)


class Shy(Network):
    """Tells less about itself than PyTorch's modules do."""

    def named_parameters(self, *args, **kwargs):
        return ((name, x) for name, x in super().named_parameters(*args, **kwargs) if not name.startswith("c"))

    def named_modules(self, *args, **kwargs):
        yield "", self


def test_a_network_that_hides_parameters_is_followed():
    made = ticket_without(Network(), {"a.weight": [1], "a.bias": [1]})
    result = compact(made, Shy, X)
    assert result.module.c.weight.shape == (4, 5, 1, 1)
    assert result.parity.float64.max_rel < 1e-12
