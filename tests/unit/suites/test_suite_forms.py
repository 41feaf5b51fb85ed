"""Forms of real networks: cut and packed exactly, at the stated shares; and what lies in folders."""

import pytest
import torch

from deploy_sparse import zoo
from deploy_sparse.artifact import write_artifact
from deploy_sparse.config import config_from
from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import ArtifactError, ConfigError
from deploy_sparse.suites.config import Form, Network
from deploy_sparse.suites.forms import RANDOM, Maker
from deploy_sparse.ticket import ModelRef, Provenance, Ticket

CPU = load_target("cpu")
WIDTHS = {"widths": (32, 32, 64)}


def maker(**changes):
    entry = {
        "name": "one",
        "network": "resnet_digits",
        "forms": ["any"],
        "arguments": {"widths": [32, 32, 64]},
        **changes,
    }
    return Maker(config_from(Network, entry), (1,), 0.1, 0, lambda: None, lambda text: None)


def made(**values):
    return maker().make("any", Form(**values), CPU)


def outputs(module):
    with torch.no_grad():
        return module(maker().inputs[0])


def test_the_dense_network_is_the_same_each_time_and_its_norms_know_its_inputs():
    one, two = maker().make("dense", None, CPU), maker().make("dense", None, CPU)
    assert torch.equal(outputs(one.module), outputs(two.module))
    assert (one.macs, one.ticket, one.accuracy) == (one.dense_macs, None, None)
    assert 0.01 < float(outputs(one.module).std()) < 10, "numbers of one size, so that comparing them means something"
    assert float(one.module.bn1.running_mean.abs().sum()) > 0
    assert not one.module.training


def test_channels_are_cut_and_proven_equal():
    found = made(structure="channels", keep=0.5, multiple=16)
    assert found.module.conv1.out_channels == 16
    assert found.how == RANDOM
    assert found.macs / found.dense_macs == pytest.approx(0.25, abs=0.02)
    assert found.whole_macs == 0
    assert "in float64" in found.parity
    assert found.ticket


def test_layers_that_lose_nothing_are_counted():
    found = made(structure="channels", keep=0.5, layers="inner", multiple=1)
    module = maker().dense()
    shortcuts = [part for part in module.modules() if isinstance(part, torch.nn.Conv2d) and part.kernel_size == (1, 1)]
    whole = 9 * 32 * 64 + 64 * 10  # the stem at 8×8, and the head
    whole += sum(c.in_channels * c.out_channels * (4 // (i + 1) * 1) ** 2 for i, c in enumerate(shortcuts))
    assert found.whole_macs == whole


def test_blocks_run_as_blocks_with_no_less_than_the_stated_share():
    found = made(structure="blocks", keep=0.5, parts=2, multiple=16)
    assert "layers run as blocks" in found.how
    share = float(found.how.split("; ")[-1].split("%")[0])
    assert 50 <= share <= 60
    assert found.macs < found.dense_macs
    assert outputs(found.module).shape == (2, 10)


def saved_ticket(folder, model=None):
    module = zoo.build("resnet_digits", **WIDTHS)
    masks = {"stages.0.0.conv1.weight": torch.ones_like(module.stages[0][0].conv1.weight, dtype=torch.bool)}
    masks["stages.0.0.conv1.weight"][8:] = False
    reference = model or ModelRef("resnet_digits", {"widths": [32, 32, 64]}, (1, 8, 8))
    return Ticket(module.state_dict(), masks, reference, Provenance("test")).save(folder)


def test_a_ticket_in_a_folder_is_cut_and_brings_its_accuracy(tmp_path):
    saved_ticket(tmp_path / "ticket")
    found = made(structure="folder", path=str(tmp_path / "ticket"), accuracy=0.9)
    assert found.how == f"ticket {tmp_path / 'ticket'}"
    assert found.accuracy == 0.9
    assert found.ticket == Ticket.load(tmp_path / "ticket").hash
    assert found.module is not None


def test_a_folder_of_another_input_shape_is_refused(tmp_path):
    saved_ticket(tmp_path / "ticket", ModelRef("resnet_digits", {"widths": [32, 32, 64]}, (1, 16, 16)))
    with pytest.raises(ConfigError) as caught:
        made(structure="folder", path=str(tmp_path / "ticket"))
    assert "is of a network for inputs of shape [1, 16, 16], 'one' takes [1, 8, 8]" in caught.value.given


def test_a_folder_with_something_else_says_what_it_is(tmp_path):
    write_artifact(tmp_path / "odd", "checkpoint", {"x": b"1"}, {})
    for path, what in (("odd", "holds the artifact 'checkpoint'"), ("none", "is not there"), (".", "holds no network")):
        with pytest.raises(ArtifactError) as caught:
            made(structure="folder", path=str(tmp_path / path))
        assert caught.value.given == f"{tmp_path / path} {what}"
