"""Packed networks as files and as values; formats, precisions, training, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from pack_samples import block_mask, exactly_packed, look_ups, packed_layers, pairs_ticket, ticket_of
from small_networks import noise
from surgery_nets import masked
from torch import nn

from deploy_sparse.errors import SurgeryError
from deploy_sparse.surgery import SurgeryPlan, compact, load_compact
from deploy_sparse.surgery.packed import PackedConv2d, PackedLinear
from deploy_sparse.surgery.program import load_program
from deploy_sparse.surgery.spread import SpreadBatchNorm2d
from deploy_sparse.ties import ties

A, B = range(0, 32, 2), range(1, 32, 2)


class Small(nn.Module):
    """A stem, a residual branch of two layers, and two Linear layers."""

    def __init__(self, width=32, kernel=3):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a, self.b = (nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.hidden, self.fc = nn.Linear(width, width), nn.Linear(width, 16)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.norm_b(self.b(torch.relu(self.norm_a(self.a(x)))))
        return self.fc(torch.relu(self.hidden(x.mean((2, 3)))))


class Deeper(Small):
    """With a layer more."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(4, 4)


def factory():
    return Small().double()


PAIRS = {
    "a.weight": [(A, A), (B, B)],  # disjoint
    "b.weight": [(A, range(20)), (B, range(12, 32))],  # equal
    "hidden.weight": [(range(14), range(5)), (range(14, 30), range(3, 31))],  # free; two rows are in no block
    "fc.weight": [(range(16), range(4, 32))],  # one block: four rows of the hidden layer go
}
X = noise(2, 3, 6, 6)


@pytest.fixture(scope="module")
def made():
    return pairs_ticket(factory, PAIRS)


@pytest.fixture(scope="module")
def small(made):
    return exactly_packed(factory, made, X, [noise(3, 3, 9, 8)])


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("packed") / "small")


def test_every_form_is_there(small):
    found = {path: layer.packing.form for path, layer in packed_layers(small).items()}
    assert found == {"a": "disjoint", "b": "equal", "hidden": "free"}
    assert not small.module.training


def test_a_loaded_network_is_the_saved_one_to_the_bit(small, folder):
    loaded = load_compact(folder, factory)
    with torch.no_grad():
        assert torch.equal(loaded(X), small.module(X))
    assert not loaded.training
    state = small.module.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert {path: str(part) for path, part in loaded.named_modules()} == {
        path: str(part) for path, part in small.module.named_modules()
    }
    assert not any(x.is_meta for x in (*loaded.parameters(), *loaded.buffers()))


def test_a_saved_network_loads_without_any_code(small, folder):
    program = load_program(folder)
    with torch.no_grad():
        for x in (X, noise(5, 3, 6, 6)):
            torch.testing.assert_close(program(x), small.module(x), rtol=1e-12, atol=1e-12)


def test_the_norm_that_restores_rows_survives_the_disk(tmp_path):
    def last():
        return nn.Sequential(nn.Conv2d(32, 32, 3, bias=False), nn.BatchNorm2d(32)).double()

    x = noise(2, 32, 6, 6)
    result = exactly_packed(last, pairs_ticket(last, {"0.weight": PAIRS["a.weight"]}), x)
    loaded = load_compact(result.save(tmp_path / "small"), last)
    assert type(loaded[1]) is SpreadBatchNorm2d
    with torch.no_grad():
        assert torch.equal(loaded(x), result.module(x))
        assert torch.equal(load_program(tmp_path / "small")(x), result.module(x))


def test_tied_layers_stay_tied_beside_packed_ones(tmp_path):
    def tied():
        module = factory()
        module.second = nn.BatchNorm2d(32).double()
        module.second.weight = module.norm_a.bias  # tied, of a group that is renumbered
        module.norm_a.weight = module.norm_a.bias
        return module

    result = exactly_packed(tied, pairs_ticket(tied, {"a.weight": PAIRS["a.weight"]}), X)
    loaded = load_compact(result.save(tmp_path / "small"), tied)
    assert ties(loaded.state_dict()) == ties(result.module.state_dict()) != {}
    with torch.no_grad():
        assert torch.equal(loaded(X), result.module(X))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Small(24).double(), r"cuts 'hidden.weight' .* but the network has shape \(24, 24\)"),
        (lambda: Deeper().double(), r"another architecture: 'more.weight' is saved with nothing"),
        (lambda: Small(kernel=1).double(), r"\[32, 32, 1, 1\][\s\S]*\[32, 32, 3, 3\]"),
    ],
)
def test_another_factory_is_refused(folder, other, message):
    with pytest.raises(SurgeryError, match=message):
        load_compact(folder, other)


def test_another_order_of_channels_is_refused(small, folder, tmp_path):
    """The order belongs to the format: a state dict of the same shapes and other indices is not taken."""
    layer = load_compact(folder, factory).b
    state = small.module.b.state_dict()
    with pytest.raises(SurgeryError, match=r"'columns' is of another packing"):
        layer.load_state_dict({**state, "columns": state["columns"].flip(0)})


def test_the_plan_survives_json_and_the_disk(small, folder):
    plan = SurgeryPlan.from_json(json.loads(json.dumps(small.plan.to_json())))
    assert plan == small.plan
    assert SurgeryPlan.load(folder) == small.plan
    assert plan.shape.packed == {"a", "b", "hidden"}
    assert plan.notes() == small.plan.notes()
    (line,) = [line for line in plan.notes() if "of blocks" in line]
    assert line.startswith("3 layers of blocks: 1 disjoint, 1 equal, 1 free; ")


def test_the_note_names_every_look_up(small):
    (line,) = [line for line in small.plan.notes() if "of blocks" in line]
    assert look_ups(small) == ["before b", "before hidden"]
    assert line.endswith("; 2 look channels up before (b, hidden)")
    assert not any("unmasked" in note for note in small.plan.notes())  # what is packed is full


def test_the_table_and_the_summary_tell_which_layers_are_blocks(small):
    rows = {row[0]: row[1:] for row in small.plan.layer_table()[1]}
    assert rows["a.weight"] == ("32×32×3×3", "32×32×3×3, 2 disjoint blocks", "50.0%")
    assert rows["hidden.weight"][1].endswith("2 free blocks")
    assert rows["stem.weight"] == ("32×3×3×3", "32×3×3×3", "100.0%")
    found = json.loads(json.dumps(small.plan.summary()))
    assert found["packed"] == {"a": "disjoint", "b": "equal", "hidden": "free"}
    assert (found["format"], found["choice"]) == ("packed", [])


def test_the_cost_is_of_the_blocks(small, made):
    whole = sum(weight.numel() for weight in small.module.parameters())
    assert small.plan.cost_after.parameters == whole
    cut = compact(made, factory, X).plan
    hidden = 26 * 32 - (10 * 16 + 16 * 32)  # 5 and 28 columns are padded to multiples of 16
    assert cut.cost_after.macs - small.plan.cost_after.macs == 36 * 32 * 16 * 9 + hidden


def test_a_loaded_network_trains_on(folder):
    torch.manual_seed(0)
    network = load_compact(folder, factory).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    before = {
        path: layer.unpack().detach().clone() for path, layer in network.named_modules() if hasattr(layer, "unpack")
    }
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (network(X) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(before) == {"a", "b", "hidden"}
    for path, weight in before.items():
        after = network.get_submodule(path).unpack()
        assert not torch.equal(after, weight)
        assert not after[weight == 0].any()  # nothing grows outside of the blocks
    assert network.norm_a.num_batches_tracked == 5


# Formats


def test_dense_is_the_masked_network(made):
    result = compact(made, factory, X, format="dense")
    expected = masked(factory, made).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in result.module.state_dict().items())
    assert result.plan.cost_after == result.plan.cost_before
    assert not result.plan.cuts
    assert not result.plan.shape.packs
    notes = result.plan.notes()
    assert "dense: the masked network as it is" in notes
    assert not any("nothing could be cut" in note for note in notes)
    assert result.parity.float64.max_rel == 0


def test_a_dense_network_is_saved_and_loaded(made, tmp_path):
    result = compact(made, factory, X, format="dense")
    with torch.no_grad():
        assert torch.equal(load_compact(result.save(tmp_path / "d", program=False), factory)(X), result.module(X))


def test_channels_packs_nothing(made):
    result = compact(made, factory, X, format="channels")
    assert not packed_layers(result)
    assert result.plan.shape.orders == ()


def test_without_blocks_the_packed_network_is_the_cut_one(tmp_path):
    mask = torch.rand(32, 32, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    single = ticket_of(factory(), {"a.weight": mask})
    result = compact(single, factory, X, format="packed")
    assert result.plan.shape == compact(single, factory, X).plan.shape
    assert result.plan.choice == ("packed: nothing, as no layer that can be packed has a mask of blocks",)
    assert result.plan.notes()[0] == result.plan.choice[0]


def test_one_block_of_whole_channels_is_cut_and_not_packed(small):
    assert type(small.module.fc) is nn.Linear
    assert small.module.fc.weight.shape == (16, 26)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"format": "package"}, ("format='package'", "one of dense, channels, packed", "did you mean 'packed'?")),
        ({"format": "auto"}, ("format='auto'", "one of dense, channels, packed", "choose one of them")),
        (
            {"format": "packed", "layers": ["stem"]},
            ("layer 'stem' cannot be packed: its mask is no union of blocks", "some of 'a', 'b', 'hidden'", "leave it out"),
        ),
        ({"format": "packed", "layers": ["nothing"]}, ("layer 'nothing' cannot be packed", "'a'", "leave it out")),
        (
            {"format": "packed", "layers": ["hidden.weight"]},
            ("layer 'hidden.weight' cannot be packed", "did you mean 'hidden'? leave it out"),
        ),
        ({"format": "packed", "layers": "hidden"}, ("layers='hidden'", "a list of paths", "pass layers=['hidden']")),
        ({"layers": ["a"]}, ("layers to pack in the format 'channels'", "the format 'packed' only", "leave them out")),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(made, options, error):
    with pytest.raises(SurgeryError) as caught:
        compact(made, factory, X, **options)
    text = str(caught.value)
    assert all(part in text for part in error), text


def test_an_empty_list_of_layers_packs_nothing_and_says_so(made):
    result = compact(made, factory, X, format="packed", layers=[])
    assert result.plan.shape == compact(made, factory, X).plan.shape
    assert result.plan.choice == ("packed: nothing, as no layer was asked for",)


def test_no_layer_at_all_is_said_too():
    with pytest.raises(SurgeryError, match="no layer at all"):
        compact(ticket_of(factory(), {}), factory, X, format="packed", layers=["a"])


# Precisions and memory formats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_precision_is_packed(dtype, tmp_path):
    def typed():
        return Small().to(dtype)

    result = compact(pairs_ticket(typed, PAIRS), typed, X.to(dtype), format="packed")
    assert {parameter.dtype for parameter in result.module.parameters()} == {dtype}
    assert {type(layer) for layer in packed_layers(result).values()} == {PackedConv2d, PackedLinear}
    loaded = load_compact(result.save(tmp_path / "small", program=False), typed)
    with torch.no_grad():
        assert torch.equal(loaded(X.to(dtype)), result.module(X.to(dtype)))


def test_channels_last_is_packed(tmp_path):
    def innermost():
        return factory().to(memory_format=torch.channels_last)

    x = X.to(memory_format=torch.channels_last)
    result = exactly_packed(innermost, pairs_ticket(innermost, PAIRS), x)
    loaded = load_compact(result.save(tmp_path / "small", program=False), innermost)
    with torch.no_grad():
        y, z = result.module(x), loaded(x)
    assert torch.equal(y, z)
    for name, tensor in result.module.state_dict().items():
        assert loaded.state_dict()[name].stride() == tensor.stride(), name


def test_networks_without_memory_can_be_loaded_and_frozen_layers_stay_frozen(made, tmp_path):
    def frozen():
        module = factory()
        module.a.requires_grad_(False)
        return module

    result = exactly_packed(frozen, made, X)
    loaded = load_compact(result.save(tmp_path / "small", program=False), frozen)
    for module in (result.module, loaded):
        flags = {path: {p.requires_grad for p in module.get_submodule(path).parameters()} for path in ("a", "b")}
        assert flags == {"a": {False}, "b": {True}}
    assert block_mask(loaded.a.unpack(), PAIRS["a.weight"]).sum() == (loaded.a.unpack() != 0).sum()
