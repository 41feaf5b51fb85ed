"""Masks of networks that something else pruned: read from zeros and from masks beside the weights, or refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from deploy_sparse import Ticket
from deploy_sparse.errors import TicketError
from deploy_sparse.ticket import ModelRef


def net(seed=0):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 5))
    nn.init.normal_(made[1].weight)
    nn.init.normal_(made[1].bias)
    return made


def pruned_by_torch(seed=0):
    made = net(seed)
    prune.ln_structured(made[0], "weight", amount=2, n=1, dim=0)
    prune.random_unstructured(made[4], "weight", amount=0.3)
    prune.random_unstructured(made[4], "bias", amount=2)
    return made


def test_masks_of_torch_prune_get_the_plain_names_and_the_dense_values():
    made = pruned_by_torch()
    ticket = Ticket.from_masked_model(made, model=ModelRef("user factory", input_shape=(3, 4, 4)))
    assert list(ticket.weights) == list(net().state_dict())
    assert torch.equal(ticket.weights["0.weight"], made[0].weight_orig)
    assert set(ticket.masks) == {"0.weight", "4.weight", "4.bias"}
    assert torch.equal(ticket.masks["4.weight"], made[4].weight_mask.bool())
    assert int(ticket.masks["0.weight"].reshape(6, -1).any(dim=1).sum()) == 4
    assert ticket.provenance.method == "masked model"
    assert ticket.model.input_shape == (3, 4, 4)
    plain = net(1)
    plain.load_state_dict(ticket.validate(plain).masked_weights())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(plain.eval()(x), made.eval()(x))


@given(st.integers(0, 10**6), st.floats(0.05, 0.9), st.booleans())
@settings(max_examples=25, deadline=None)
def test_zeros_masks_and_state_dicts_say_the_same(seed, share, as_state):
    """Pruned, with masks removed again, and with masks beside plain weights: one and the same function."""
    hooked = net(seed)
    for layer in (hooked[0], hooked[4]):
        prune.random_unstructured(layer, "weight", amount=share)
    state = hooked.state_dict()
    beside = {k.replace("_orig", ""): v for k, v in state.items()}
    plain = net(seed)
    plain.load_state_dict({k: v * beside.get(f"{k}_mask", 1) for k, v in beside.items() if not k.endswith("_mask")})
    for source in (hooked, plain, beside):
        given_source = source.state_dict() if as_state and isinstance(source, nn.Module) else source
        ticket = Ticket.from_masked_model(given_source)
        assert set(ticket.masks) == {"0.weight", "4.weight"}
        for name in ticket.masks:
            assert torch.equal(ticket.masks[name], beside[f"{name}_mask"].bool())
        assert all(torch.equal(ticket.masked_weights()[k], plain.state_dict()[k]) for k in plain.state_dict())


def test_the_source_is_neither_changed_nor_shared():
    made = pruned_by_torch()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    ticket = Ticket.from_masked_model(made)
    for tensor in ticket.weights.values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


def test_entries_go_with_their_channel_only():
    made = net()
    with torch.no_grad():
        made[0].weight[:2] = 0
        made[0].bias[:3] = 0  # the third channel still has its row
        made[1].weight[0], made[1].bias[0], made[1].bias[1] = 0, 0, 0
        made[4].weight[:, 3] = 0
    ticket = Ticket.from_masked_model(made)
    assert ticket.masks["0.bias"].tolist() == [False, False, True, True, True, True]
    assert ticket.masks["1.weight"].tolist() == ticket.masks["1.bias"].tolist() == [False] + [True] * 5
    assert not bool(ticket.masks["4.weight"][:, 3].any())
    assert "4.bias" not in ticket.masks


def test_weights_and_norms_that_start_as_zeros_are_not_masked():
    made = net()
    made.add_module("zero", nn.Linear(5, 5))
    made.add_module("norm", nn.BatchNorm1d(5))
    with torch.no_grad():
        made.zero.weight.zero_()
        made.zero.bias.zero_()
        made.norm.weight.zero_()
        made[0].weight[0] = 0
    assert set(Ticket.from_masked_model(made).masks) == {"0.weight"}


def test_buffers_and_integers_are_not_weights():
    made = net()
    made.register_buffer("attn_mask", torch.tensor([[0.0, -100.0], [0.0, 0.0]]))
    made.register_buffer("index", torch.zeros(2, 2, dtype=torch.long))
    with torch.no_grad():
        made[0].weight[0] = 0
    ticket = Ticket.from_masked_model(made)
    assert set(ticket.masks) == {"0.weight"}
    assert torch.equal(ticket.weights["attn_mask"], made.attn_mask)
    assert "attn_mask" in Ticket.from_masked_model(made.state_dict()).weights


def test_a_zero_behind_a_mask_counts_too():
    made = net()
    with torch.no_grad():
        made[0].weight[0] = 0
    prune.custom_from_mask(made[0], "weight", torch.ones_like(made[0].weight).index_fill_(0, torch.tensor([5]), 0))
    rows = Ticket.from_masked_model(made).masks["0.weight"].reshape(6, -1).any(dim=1)
    assert rows.tolist() == [False, True, True, True, True, False]


def with_parametrization():
    return parametrizations.weight_norm(nn.Sequential(nn.Linear(3, 3))[0])


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized():
    made = net()
    parametrize.register_parametrization(made[4], "weight", Halved())
    return made


def spectral():
    made = net()
    spectral_norm(made[4])
    return made


def with_old_weight_norm():
    state = net().state_dict()
    weight = state.pop("4.weight")
    return {**state, "4.weight_g": weight.norm(dim=1, keepdim=True), "4.weight_v": weight}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (parametrized, r"'4.weight' is computed from '4.parametrizations.weight.original'[\s\S]*remove_parametrizations\(module, 'weight'\), with module = 4"),
        (with_parametrization, r"'weight' is computed from[\s\S]*with module = the network"),
        (spectral, r"'4.weight' is computed from '4.weight_orig'[\s\S]*remove_spectral_norm\(module, 'weight'\), with module = 4"),
        (with_old_weight_norm, r"'4.weight' is computed from '4.weight_g'[\s\S]*remove_weight_norm"),
    ],
)  # fmt: skip
def test_computed_weights_are_refused_with_the_cure(source, message):
    with pytest.raises(TicketError, match=message):
        Ticket.from_masked_model(source())


def changed(**changes):
    return {**net().state_dict(), **{name.replace("__", "."): value for name, value in changes.items()}}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: net(), r"nothing is pruned: no weight has a mask or an exact zero[\s\S]*oneshot_ticket"),
        (lambda: changed(**{"0.weight_mask": torch.ones(6, 3, 3, 3)}), "nothing is pruned"),
        (lambda: changed(**{"0.wieght_mask": torch.ones(6, 3, 3, 3), "0.weight_mask": torch.zeros(6, 3, 3, 3)}), r"layer '0.weight' has no channel left"),
        (lambda: changed(**{"1.conv.weight_mask": torch.ones(6)}), r"mask '1.conv.weight_mask' belongs to no weight: neither '1.conv.weight' nor '1.conv.weight_orig'"),
        (lambda: changed(**{"0.weight_mask": torch.ones(6, 1, 1, 1)}), r"mask '0.weight_mask' has shape \(6, 1, 1, 1\), its weight \(6, 3, 3, 3\)[\s\S]*expand_as"),
        (lambda: changed(**{"0.weight_mask": torch.full((6, 3, 3, 3), 0.5)}), r"mask '0.weight_mask' has other values than 0 and 1"),
        (lambda: changed(**{"0.weight_mask": torch.zeros(6, 3, 3, 3), "0.weight_orig": torch.ones(6, 3, 3, 3)}), r"'0.weight' and '0.weight_orig' are both there"),
        (lambda: {"state_dict": net().state_dict(), "epoch": 3}, r"entry 'state_dict' is of type OrderedDict[\s\S]*source\['state_dict'\]"),
        (lambda: net().to("meta"), r"'0.weight' is on the meta device"),
        (lambda: 3, "a int was given"),
        (lambda: changed(**{"0.weight": torch.full((6, 3, 3, 3), float("nan")), "4.weight": torch.eye(5, 24)}), "NaN or infinite"),
    ],
)  # fmt: skip
def test_unclear_sources_are_refused(source, message):
    with pytest.raises(TicketError, match=message):
        Ticket.from_masked_model(source())


def tied():
    made = nn.ModuleDict({"table": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    made["head"].weight = made["table"].weight
    return made


def test_tied_weights_with_zeros_stay_tied():
    made = tied()
    with torch.no_grad():
        made["table"].weight[2] = 0
    ticket = Ticket.from_masked_model(made)
    assert ticket.weights["head.weight"] is ticket.weights["table.weight"]
    assert torch.equal(ticket.masks["head.weight"], ticket.masks["table.weight"])


def test_a_mask_on_one_of_two_tied_names_is_refused():
    made = tied()
    prune.random_unstructured(made["table"], "weight", amount=3)
    with pytest.raises(TicketError, match=r"'table.weight' has a mask, 'head.weight' has none[\s\S]*same mask"):
        Ticket.from_masked_model(made)
    prune.custom_from_mask(made["head"], "weight", made["table"].weight_mask)
    assert Ticket.from_masked_model(made).weights["head.weight"].shape == (7, 4)


def test_a_masked_model_goes_through_surgery_and_the_disk(tmp_path):
    from deploy_sparse import compact

    made = pruned_by_torch()
    ticket = Ticket.from_masked_model(made)
    ticket.save(tmp_path / "ticket")
    assert Ticket.load(tmp_path / "ticket").hash == ticket.hash
    x = torch.randn(2, 3, 4, 4)
    found = compact(ticket, factory=net, example_inputs=(x,))
    assert torch.allclose(found.module(x), made.eval()(x), atol=1e-5)
