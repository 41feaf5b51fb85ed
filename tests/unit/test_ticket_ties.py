"""Tied weights are stored once and come back as one tensor, under one mask."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deploy_sparse import Ticket
from deploy_sparse.errors import ArtifactError, TicketError
from deploy_sparse.ticket import ModelRef, Provenance
from deploy_sparse.ties import copied, retied, tie_, ties, untied


def net():
    torch.manual_seed(0)
    made = nn.ModuleDict({"table": nn.Embedding(7, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 7)})
    made["head"].weight = made["table"].weight
    return made


def mask(seed=0):
    return torch.rand(7, 4, generator=torch.Generator().manual_seed(seed)) > 0.5


def make(masks=None, module=None):
    state = (module or net()).state_dict()
    return Ticket(state, {"table.weight": mask()} if masks is None else masks, ModelRef("tied"), Provenance("test"))


def test_ties_are_names_of_the_very_same_tensor():
    one = torch.randn(4, 4)
    state = {"a": one, "b": one, "c": one.clone(), "d": one.t(), "e": one[:2], "f": one.detach(), "g": torch.ones(0)}
    state["h"] = state["g"]
    assert ties(state) == {"b": "a", "f": "a"}
    assert list(untied(state, ties(state))) == ["a", "c", "d", "e", "g", "h"]
    own = copied(state)
    assert list(own) == list(state)
    assert own["b"] is own["a"]
    assert own["a"].data_ptr() != one.data_ptr()
    assert all(torch.equal(own[name], state[name]) for name in state)


def test_ties_on_meta_are_seen_and_equal_shapes_are_not_mistaken_for_them():
    with torch.device("meta"):
        made = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
    assert ties(made.state_dict()) == {}
    made[2].weight = made[0].weight
    assert ties(made.state_dict()) == {"2.weight": "0.weight"}


def test_a_loaded_module_trains_tied_weights_as_one():
    made = net()
    aliases = ties(made.state_dict())
    stored = untied(copied(made.state_dict()), aliases)
    other = nn.ModuleDict({"table": nn.Embedding(7, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 7)})
    other.load_state_dict(retied(stored, aliases), assign=True)
    assert other["head"].weight is not other["table"].weight
    tie_(other, aliases)
    assert other["head"].weight is other["table"].weight
    assert len(list(other.parameters())) == 4
    with pytest.raises(AttributeError):
        tie_(other, {"head.nothing": "table.nothing"})


def test_the_disk_holds_one_tensor_and_gives_back_two_names(tmp_path):
    ticket = make()
    ticket.save(tmp_path / "t")
    stored = load_file(tmp_path / "t" / "ticket.safetensors")
    assert "weight/table.weight" in stored
    assert "weight/head.weight" not in stored
    assert json.loads((tmp_path / "t" / "ticket.json").read_text())["ties"] == {"head.weight": "table.weight"}
    loaded = Ticket.load(tmp_path / "t")
    assert loaded.weights["head.weight"] is loaded.weights["table.weight"]
    assert loaded.hash == ticket.hash
    loaded.validate(net())
    loaded.save(tmp_path / "t")  # the same content: no second artifact, no error


def test_the_hash_tells_tied_from_equal():
    state = net().state_dict()
    untied_state = {name: tensor.clone() for name, tensor in state.items()}
    masks = {"table.weight": mask()}
    apart = Ticket(untied_state, masks, ModelRef("tied"), Provenance("test"))
    assert apart.hash != make().hash


def test_a_ticket_without_ties_says_nothing_of_them(tmp_path):
    Ticket({"w": torch.ones(2, 2)}, {}, ModelRef("net"), Provenance("test")).save(tmp_path / "t")
    assert "ties" not in json.loads((tmp_path / "t" / "ticket.json").read_text())


@pytest.mark.parametrize("names", [("table.weight",), ("head.weight",), ("table.weight", "head.weight")])
def test_one_mask_serves_both_names(tmp_path, names):
    ticket = make(dict.fromkeys(names, mask()))
    ticket.save(tmp_path / "t")
    for each in (ticket, Ticket.load(tmp_path / "t")):
        found = each.masked_weights()
        assert found["table.weight"] is found["head.weight"]
        assert torch.equal(found["table.weight"] == 0, ~mask())
        assert found.keys() == net().state_dict().keys()


def test_different_masks_for_one_tensor_are_refused(tmp_path):
    other = mask(1)
    differing = int((mask() != other).sum())
    with pytest.raises(
        TicketError,
        match=rf"'table.weight' and 'head.weight' are one tied tensor, but their masks differ in {differing}",
    ):
        make({"table.weight": mask(), "head.weight": other}).save(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_tie_to_a_missing_tensor_is_no_readable_ticket(tmp_path):
    from deploy_sparse.artifact import read_artifact, write_artifact

    make().save(tmp_path / "t")
    body = read_artifact(tmp_path / "t", "ticket", remake="").body
    payload = {"ticket.safetensors": (tmp_path / "t" / "ticket.safetensors").read_bytes()}
    write_artifact(tmp_path / "bad", "ticket", payload, {**body, "ties": {"head.weight": "nowhere"}})
    with pytest.raises(ArtifactError, match=r"not a readable ticket \(KeyError"):
        Ticket.load(tmp_path / "bad")
