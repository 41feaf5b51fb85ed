"""Coupling: the pools of known networks, and removing their channels is what surgery can undo exactly."""

from functools import partial

import pytest
import torch
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.coupling import COUPLINGS, channel_pools, part_names, remove_
from deploy_sparse.sparsify.imp import dense_masks, head_of
from deploy_sparse.structure import ChannelGroup, Producer, Slice
from deploy_sparse.surgery.compact import compact
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al. 2018)."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Mixed(nn.Module):
    """Depthwise block with a gate inside a residual sum, then a dense block (Huang et al. 2017), a GLU and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(6, 9, 1, bias=False), nn.BatchNorm2d(9), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(9, 9, 3, padding=1, groups=9), nn.BatchNorm2d(9), nn.SiLU())
        self.gate, self.project = Gate(9, 4), nn.Sequential(nn.Conv2d(9, 6, 1), nn.BatchNorm2d(6))
        self.grow = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1))
            for c in (6, 10)
        )
        self.norm, self.glu, self.fc = nn.BatchNorm2d(14), nn.Linear(14, 10), nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.gate(self.depthwise(self.expand(x))))
        for layer in self.grow:
            x = torch.cat([x, layer(x)], dim=1)
        value, gate = self.glu(self.norm(x).mean((2, 3))).chunk(2, dim=1)
        return self.fc(value * torch.sigmoid(gate))


def small(name, **arguments):
    return partial(zoo.build, name, **arguments), zoo.entry(name).input_shape


NETWORKS = {
    "option A": small("resnet20", blocks=(2, 1, 1), widths=(4, 7, 11)),
    "bottleneck": small("resnet50", blocks=(1, 2), widths=(5, 6)),
    "digits": small("resnet_digits", widths=(5, 6, 9)),
    "mobilenet": small("mobilenet_v1", widths=(5, 6, 8), strides=(1, 2)),
    "flattened": small("vgg_digits", layout=(6, "M", 7, "M"), hidden=5),
    "mixed": (Mixed, (3, 8, 8)),
}


def traced(factory, shape, seed=0):
    """A network with random weights and norms (as trained ones are), and its channel groups."""
    torch.manual_seed(seed)
    model = factory().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and "zeros" not in name:
                tensor.normal_(0.2, 0.5 if tensor.dim() < 2 else tensor[0].numel() ** -0.5)
    return model, channel_groups(model, torch.zeros(2, *shape))


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    factory, shape = NETWORKS[request.param]
    return (request.param, factory, shape, *traced(factory, shape))


def pools_of(model, groups, coupling, **options):
    return channel_pools(dense_masks(model, head=True, **options), groups, coupling, head=head_of(model))


def masks_for(model, pools):
    parameters = dict(model.named_parameters())
    masks = dense_masks(model, head=True)
    return masks | {n: torch.ones_like(parameters[n], dtype=torch.bool) for n in part_names(pools) if n not in masks}


def positions(part, gone):
    return {i for i, channel in enumerate(part.channels) if channel >= 0 and bool(gone[channel])}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_surgery_removes_exactly_what_was_removed_from_the_masks(network, coupling, sparse):
    name, factory, shape, model, groups = network
    pools = pools_of(model, groups, coupling)
    masks = masks_for(model, pools)
    generator = torch.Generator().manual_seed(len(name) + 7 * sparse)
    if sparse:  # what Chase leaves: the rows that stay are unstructured-sparse
        for mask in masks.values():
            if mask.dim() > 1:
                mask &= torch.rand(mask.shape, generator=generator) < 0.6
    wanted, removed = {}, 0
    for pool in pools:
        share = (0.0, 0.4, 0.8)[int(torch.randint(3, (1,), generator=generator))]  # a third of the pools lose nothing
        gone = torch.rand(pool.size, generator=generator) < share
        gone[int(torch.randint(pool.size, (1,), generator=generator))] = False
        remove_(masks, pool, gone)
        removed += int(gone.sum())
        for part in pool.parts:
            wanted.setdefault((part.name, part.dim), set()).update(positions(part, gone))
    assert removed > len(pools) // 2
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    made = compact(Ticket(weights, masks, ModelRef("own", {}, shape), Provenance("test")), factory)
    found = {(cut.name, cut.dim): set(range(cut.size)) - set(cut.kept) for cut in made.plan.cuts}
    if sparse:  # a row may lose its last weight besides
        assert all(gone <= found.get(place, set()) for place, gone in wanted.items())
        return
    parameters = dict(model.named_parameters())
    assert {p: gone for p, gone in found.items() if p[0] in parameters} == {p: g for p, g in wanted.items() if g}
    assert made.plan.folds == ()
    assert made.parity.rounding is None
    assert made.parity.float64.max_rel < 1e-12


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_removal_touches_the_parts_of_these_channels_and_nothing_else(network, coupling):
    _, _, _, model, groups = network
    pools = pools_of(model, groups, coupling)
    for pool in pools:
        masks = masks_for(model, pools)
        before = {n: m.clone() for n, m in masks.items()}
        remove_(masks, pool, torch.zeros(pool.size, dtype=torch.bool))
        assert all(torch.equal(masks[n], before[n]) for n in masks)
        gone = torch.arange(pool.size) == pool.size - 1
        remove_(masks, pool, gone)
        expected = {n: m.clone() for n, m in before.items()}
        for part in pool.parts:
            rows = expected[part.name].movedim(part.dim, 0)
            for position in positions(part, gone):
                rows[position] = False
        assert all(torch.equal(masks[n], expected[n]) for n in masks)
        assert {n for n in masks if not torch.equal(masks[n], before[n])} == set(part_names((pool,)))


def test_pools_share_no_row_and_parts_hold_every_local_channel(network):
    _, _, _, model, groups = network
    for coupling in COUPLINGS:
        seen = set()
        pools = pools_of(model, groups, coupling)
        for pool in pools:
            assert pool.name == pool.writers[0].name
            assert set(pool.writers) <= set(pool.parts)
            for part in pool.parts:
                assert set(part.channels) - {-1} == set(range(pool.size))
            rows = {(w.name, i) for w in pool.writers for i, channel in enumerate(w.channels) if channel >= 0}
            assert not rows & seen
            seen |= rows
        assert set(part_names(pools)) <= {name for name, _ in model.named_parameters()}
        assert len(part_names(pools)) == len(set(part_names(pools)))


def test_internal_pools_are_among_those_of_prune_skip(network):
    _, _, _, model, groups = network
    internal, skip = (pools_of(model, groups, coupling) for coupling in COUPLINGS)
    assert set(internal) < set(skip)
    removable = sum(group.size for group in groups if group.pinned is None)
    assert sum(pool.size for pool in skip) == removable


def test_resnet50_on_imagenet():
    model = zoo.build("torchvision/resnet50").eval()
    groups = channel_groups(model, torch.zeros(2, 3, 64, 64))
    pools = pools_of(model, groups, "internal")
    assert sum(pool.size for pool in pools) == 7552
    expected = {name for name, _ in model.named_parameters() if name.endswith(("conv1.weight", "conv2.weight"))}
    assert {pool.name for pool in pools} == expected - {"conv1.weight"}
    first = next(pool for pool in pools if pool.name == "layer2.0.conv1.weight")
    assert part_names((first,)) == [
        "layer2.0.conv1.weight", "layer2.0.bn1.weight", "layer2.0.bn1.bias", "layer2.0.conv2.weight"
    ]  # fmt: skip
    skip = pools_of(model, groups, "prune_skip")
    assert sum(pool.size for pool in skip) == 7552 + 64 + 256 + 512 + 1024 + 2048
    stream = next(pool for pool in skip if pool.size == 2048)
    assert [rows.name for rows in stream.writers] == [
        "layer4.0.conv3.weight", "layer4.0.downsample.0.weight", "layer4.1.conv3.weight", "layer4.2.conv3.weight"
    ]  # fmt: skip
    assert "fc.weight" in part_names((stream,))


def test_resnet18_for_small_images():
    model = zoo.build("resnet18").eval()
    groups = channel_groups(model, torch.zeros(2, *zoo.entry("resnet18").input_shape))
    pools = pools_of(model, groups, "internal")
    assert sum(pool.size for pool in pools) == 1920
    blocks = [f"stages.{stage}.{block}" for stage in range(4) for block in range(2)]
    assert [pool.name for pool in pools] == [f"{block}.conv1.weight" for block in blocks]
    assert [[p.name for p in pool.parts if p.dim == 1] for pool in pools] == [[f"{b}.conv2.weight"] for b in blocks]


def test_vgg_all_convolutions_but_the_last():
    model = zoo.build("vgg19_bn").eval()
    groups = channel_groups(model, torch.zeros(2, 3, 32, 32))
    convolutions = [f"{path}.weight" for path, part in model.named_modules() if isinstance(part, nn.Conv2d)]
    assert len(convolutions) == 16
    assert [pool.name for pool in pools_of(model, groups, "internal")] == convolutions[:-1]
    assert [pool.name for pool in pools_of(model, groups, "prune_skip")] == convolutions
    without_head = channel_pools(dense_masks(model, head=True), groups, "internal")
    assert [pool.name for pool in without_head] == convolutions


def test_mobilenet_takes_its_depthwise_filters_along():
    model = zoo.build("mobilenet_v1").eval()
    groups = channel_groups(model, torch.zeros(2, 3, 32, 32))
    pools = pools_of(model, groups, "internal")
    assert len(pools) == 13
    depthwise = [f"{p}.weight" for p, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 13
    for pool, filters in zip(pools, depthwise, strict=True):
        assert len(pool.writers) == 1
        assert filters in part_names((pool,))
        assert filters != pool.name
    assert pools_of(model, groups, "prune_skip")[:13] == pools


def test_a_stream_with_shortcuts_without_weights_has_a_pool_for_each_set_of_writers():
    model = zoo.build("resnet20").eval()
    groups = channel_groups(model, torch.zeros(2, 3, 32, 32))
    assert sum(pool.size for pool in pools_of(model, groups, "internal")) == 3 * (16 + 32 + 64)
    ends = [f"stages.{stage}.{block}.conv2.weight" for stage in range(3) for block in range(3)]
    stream = [pool for pool in pools_of(model, groups, "prune_skip") if len(pool.writers) > 1]
    assert [(pool.size, [rows.name for rows in pool.writers]) for pool in stream] == [
        (16, ["conv1.weight", *ends]), (16, ends[3:]), (32, ends[6:])
    ]  # fmt: skip
    last = next(rows for rows in stream[1].writers if rows.name == ends[-1])
    assert last.channels == (*(-1,) * 16, *range(16), *(-1,) * 32)
    assert "stages.0.1.conv1.weight" in part_names(stream[:1])  # stage 1 reads the first 16 channels only
    assert "stages.0.1.conv1.weight" not in part_names(stream[1:])
    spared = pools_of(model, groups, "prune_skip", exclude=("conv1.weight",))
    assert [pool for pool in spared if len(pool.writers) > 1] == stream[1:]


def test_gates_concatenations_and_halves_of_one_layer():
    model, groups = traced(*NETWORKS["mixed"])
    internal = {pool.name: pool for pool in pools_of(model, groups, "internal")}
    assert list(internal) == ["gate.squeeze.weight", "grow.0.2.weight", "grow.1.2.weight", "grow.1.4.weight"]
    skip = {pool.name: pool for pool in pools_of(model, groups, "prune_skip")}
    assert [rows.name for rows in skip["stem.0.weight"].writers] == ["stem.0.weight", "project.0.weight"]
    assert [rows.name for rows in skip["expand.0.weight"].writers] == ["expand.0.weight", "gate.excite.weight"]
    assert "depthwise.0.bias" in part_names((skip["expand.0.weight"],))
    readers = {part.name: part.channels for part in skip["grow.0.4.weight"].parts if part.dim == 1}
    assert readers == {"grow.1.2.weight": (*(-1,) * 6, 0, 1, 2, 3), "glu.weight": (*(-1,) * 6, 0, 1, 2, 3, *(-1,) * 4)}
    assert skip["glu.weight"].writers == (Slice("glu.weight", 0, (0, 1, 2, 3, 4, 0, 1, 2, 3, 4)),)


def test_pinned_groups_and_layers_without_a_mask_have_no_pool():
    def group(name, reader, pinned=None):
        rows = Producer(Slice(name, 0, (0, 1)))
        return ChannelGroup(name, 2, (rows,), consumers=(Slice(reader, 1, (0, 1)),), pinned=pinned)

    groups = (group("a", "b"), group("b", "c"), group("c", "d", "why not"), group("d", "e"), group("e", "f"))
    masks = {name: torch.ones(2, 2, dtype=torch.bool) for name in "abce"} | {"a.bias": torch.ones(2) > 0}
    assert [pool.name for pool in channel_pools(masks, groups, "internal", head="f")] == ["a", "b"]
    assert [pool.name for pool in channel_pools(masks, groups, "prune_skip", head="f")] == ["a", "b", "e"]
    assert channel_pools({}, groups, "prune_skip") == ()


def test_internal_channels_have_one_writer_and_one_reader():
    a, b = Producer(Slice("a", 0, (0, 1))), Producer(Slice("b", 0, (0, 1)))
    c, d = Slice("c", 1, (0, 1)), Slice("d", 1, (0, 1))
    for producers, consumers, internal in (((a,), (c,), 1), ((a, b), (c,), 0), ((a,), (c, d), 0), ((a,), (), 0)):
        group = ChannelGroup("a", 2, producers, consumers=consumers)
        masks = {producer.weight.name: torch.ones(2, 2, dtype=torch.bool) for producer in producers}
        assert len(channel_pools(masks, (group,), "internal")) == internal
        assert len(channel_pools(masks, (group,), "prune_skip")) == 1


def test_weights_the_tracer_does_not_know_do_not_matter():
    model, groups = traced(*NETWORKS["digits"])
    known = pools_of(model, groups, "internal")
    more = {**dense_masks(model, head=True), "other": torch.ones(2, 2, dtype=torch.bool)}
    assert channel_pools(more, groups, "internal", head=head_of(model)) == known


def test_what_does_not_fit_is_refused():
    model, groups = traced(*NETWORKS["digits"])
    with pytest.raises(ConfigError, match=r"coupling 'prune_skips'[\s\S]*internal, prune_skip[\s\S]*mean 'prune_skip'"):
        pools_of(model, groups, "prune_skips")
    pool = pools_of(model, groups, "internal")[0]
    masks = masks_for(model, (pool,))
    with pytest.raises(TicketError, match=r"have shape \(3,\)[\s\S]*each of its 5 channels"):
        remove_(masks, pool, torch.ones(3, dtype=torch.bool))
    with pytest.raises(TicketError, match=r"'stages.0.0.bn1.weight' has no mask[\s\S]*part_names"):
        remove_(dense_masks(model), pool, torch.ones(5, dtype=torch.bool))
