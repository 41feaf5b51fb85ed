"""The other recipes, small, end to end: what their tickets are, and what their reports say."""

import json

import pytest

from deploy_sparse import Ticket
from deploy_sparse.cli.main import main
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.structure import Blocks, Channels, Dense, structure_of
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
    names = dense_masks(build("resnet_digits", widths=(16, 32, 32)))
    return {name: mask for name, mask in ticket.masks.items() if name in names}


def test_dense_trains_and_deploys_the_network_alone(tmp_path, capsys):
    result = run(capsys, tmp_path / "run", "dense")
    assert [row[:2] for row in result["timed"]["rows"]] == [["dense", "cpu"]]
    assert Ticket.load(tmp_path / "run/dense").hash == result["dense"]
    assert not (tmp_path / "run/ticket").exists()


def test_refill_plus_keeps_more_whole_channels_than_refill(tmp_path, capsys):
    kept = {}
    for share in ("0.0", "0.5"):
        rule = ["--refill.rounds", "[2]", "--refill.multiple", "1", "--refill.coupling", "layer"]
        run(capsys, tmp_path / share, "imp_refill_plus", *ROUNDS, *rule, "--refill.extra", share)
        masks = prunable(Ticket.load(tmp_path / share / "ticket"))
        assert all(isinstance(structure_of(mask), Channels | Dense) for mask in masks.values())
        kept[share] = {name: int(mask.flatten(1).any(dim=1).sum()) for name, mask in masks.items()}
    assert all(more >= kept["0.0"][name] for name, more in kept["0.5"].items())
    assert sum(kept["0.5"].values()) > 1.1 * sum(kept["0.0"].values())


@pytest.mark.parametrize(
    "rule",
    [
        ["--regroup.rounds", "[1, 2]"],
        ["--imp.group_aware", "true", "--regroup.rounds", "[2]", "--regroup.blocks", "equal"],
    ],
)
def test_regroup_leaves_blocks_and_says_how_full_they_are(tmp_path, capsys, rule):
    result = run(capsys, tmp_path / "run", "imp_regroup", *ROUNDS, *rule)
    structures = {n: structure_of(m) for n, m in prunable(Ticket.load(tmp_path / "run/ticket")).items()}
    assert all(isinstance(found, Blocks | Channels | Dense) for found in structures.values())
    assert any(isinstance(found, Blocks) for found in structures.values())
    report = (tmp_path / "run/report.md").read_text()
    assert f"## Blocks of round {result['regroup_round']}" in report
    assert all(f"| {name} |" in report for name in structures)
