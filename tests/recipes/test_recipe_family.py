"""The other recipes, small, end to end: what their tickets are, and what their reports say."""

import json

import torch

from deploy_sparse import Ticket
from deploy_sparse.cli.main import main
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.sparsify.refill import refill
from deploy_sparse.structure import Blocks, Channels, Dense, structure_of
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.surgery.plan import SurgeryPlan
from deploy_sparse.zoo import build

TINY = [
    "--config", "resnet_digits", "--model.arguments", "{widths = [16, 32, 32]}", "--fit.epochs", "2", "--fit.warmup_epochs", "0", "--runtime.threads", "1",
    "--deploy.targets", '["cpu"]', "--deploy.batches", "[1]", "--deploy.duration_s", "0.05", "--json",
]  # fmt: skip
ROUNDS = ["--imp.rounds", "2", "--imp.rewind_epoch", "1"]


def run(capsys, folder, recipe, *more):
    assert main(["run", recipe, "--out", str(folder), *TINY, *more]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def prunable(ticket):
    names = dense_masks(build(ticket.model.name, **ticket.model.arguments))
    return {name: mask for name, mask in ticket.masks.items() if name in names}


def test_dense_trains_and_deploys_the_network_alone(tmp_path, capsys):
    result = run(capsys, tmp_path / "run", "dense")
    assert [row[:2] for row in result["timed"]["rows"]] == [["dense", "cpu"]]
    assert Ticket.load(tmp_path / "run/dense").hash == result["dense"]
    assert not (tmp_path / "run/ticket").exists()


def test_refill_plus_keeps_more_whole_channels_than_refill(tmp_path, capsys):
    rule = ["--refill.rounds", "[2]", "--refill.multiple", "1", "--refill.coupling", "layer", "--refill.extra", "0.5"]
    run(capsys, tmp_path / "run", "imp_refill_plus", *ROUNDS, *rule)
    ticket, trained = Ticket.load(tmp_path / "run/ticket"), Ticket.load(tmp_path / "run/rounds/2")
    groups = channel_groups(build(ticket.model.name, **ticket.model.arguments), (torch.zeros(2, 1, 8, 8),))
    plain = refill(trained.masks, trained.weights, groups, coupling="layer", multiple=1)
    kept = {}
    for rule, masks in (("refill", {name: plain[name] for name in prunable(ticket)}), ("refill+", prunable(ticket))):
        assert all(isinstance(structure_of(mask), Channels | Dense) for mask in masks.values())
        kept[rule] = {name: int(mask.flatten(1).any(dim=1).sum()) for name, mask in masks.items()}
    assert all(more >= kept["refill"][name] for name, more in kept["refill+"].items())
    assert sum(kept["refill+"].values()) > 1.1 * sum(kept["refill"].values())


def check_blocks(folder, result):
    """The prunable weights are in blocks, channels or dense, some in blocks, and the report says how full they are."""
    structures = {name: structure_of(mask) for name, mask in prunable(Ticket.load(folder / "ticket")).items()}
    assert all(isinstance(found, Blocks | Channels | Dense) for found in structures.values())
    assert any(isinstance(found, Blocks) for found in structures.values())
    report = (folder / "report.md").read_text()
    assert f"## Blocks of round {result['regroup_round']}" in report
    assert all(f"| {name} |" in report for name in structures)


def test_regroup_leaves_blocks_and_says_how_full_they_are(small_regroup_run):
    folder, result = small_regroup_run
    assert result["regroup_round"] in (1, 2)
    assert SurgeryPlan.load(folder / "compact").format == "auto"
    check_blocks(folder, result)


def test_group_aware_regroup_leaves_equal_blocks_which_are_deployed_packed(tmp_path, capsys):
    rule = ["--imp.group_aware", "true", "--regroup.rounds", "[2]", "--regroup.blocks", "equal"]
    result = run(capsys, tmp_path / "run", "imp_regroup", *ROUNDS, *rule, "--deploy.format", "packed")
    assert SurgeryPlan.load(tmp_path / "run/compact").format == "packed"
    check_blocks(tmp_path / "run", result)
