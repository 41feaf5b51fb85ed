"""Surgery's tracer understands every network of the zoo: nothing but the classifier's outputs must stay."""

import pytest
import torch

from deploy_sparse import zoo
from deploy_sparse.surgery.compact import compact
from deploy_sparse.surgery.graph import NETWORK_OUTPUT, channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_channel_but_the_outputs_can_be_removed(name):
    network = zoo.build(name).eval()
    groups = channel_groups(network, torch.zeros(2, *zoo.entry(name).input_shape))
    pinned = [group for group in groups if group.pinned is not None]
    assert [(group.size, group.pinned) for group in pinned] == [(10, NETWORK_OUTPUT)]
    removable = [group for group in groups if group.pinned is None]
    convolutions = {f"{path}.weight": m for path, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)}
    depthwise = {name for name, convolution in convolutions.items() if convolution.groups > 1}
    assert len(depthwise) == (13 if name == "mobilenet_v1" else 0)
    assert set(convolutions) - depthwise <= {p.weight.name for group in removable for p in group.producers}
    assert depthwise <= {part.name for group in removable for part in group.shared}


def test_a_stream_with_padded_shortcuts_gets_narrower_exactly():
    """Stage 1 writes channels 0 to 3 of the stream, stage 2 widens it to 8, stage 3 to 16."""
    torch.manual_seed(0)
    arguments = {"blocks": (1, 1, 1), "widths": (4, 8, 16)}
    network = zoo.build("resnet20", **arguments)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    groups = channel_groups(network, torch.zeros(2, 3, 32, 32))
    (stream,) = [group for group in groups if any("zeros" in part.name for part in group.statistics)]
    assert stream.size == 16
    written = {producer.weight.name for producer in stream.producers}
    assert written == {"conv1.weight", *(f"stages.{stage}.0.conv2.weight" for stage in range(3))}

    gone = {1, 5, 10, 11}
    masks = {}
    for part in [*(p for q in stream.producers for p in (q.weight, *q.norms)), *stream.shared, *stream.consumers]:
        mask = masks.setdefault(part.name, torch.ones_like(weights[part.name], dtype=torch.bool))
        mask.index_fill_(part.dim, torch.tensor([i for i, c in enumerate(part.channels) if c in gone]), False)
        weights[part.name] *= mask
    ticket = Ticket(weights, masks, ModelRef("resnet20", arguments, (3, 32, 32)), Provenance("by hand"))
    small = compact(ticket, lambda: zoo.build("resnet20", **arguments)).module  # raises where the function differs
    assert [stage[0].conv2.out_channels for stage in small.stages] == [3, 6, 12]
    assert [stage[0].shortcut.zeros.shape[1] for stage in small.stages[1:]] == [3, 6]
